"""Strict reading of YAML files and command-line options into dataclasses."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from tyro.constructors import PrimitiveConstructorSpec

from moescope.errors import OptionError, unknown

Options = TypeVar("Options")

IntList = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT[,INT...]",
        instance_from_str=lambda words: tuple(int(word) for word in words[0].split(",") if word),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    ),
]
"""Whole numbers; on the command line separated by commas."""


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        OptionError: The file is missing or is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"cannot read {path}", got=error) from error


def build(options: type[Options], values: object, where: str) -> Options:
    """Make a dataclass from a mapping; an unknown key or an unfit value is an error.

    Args:
        options: The dataclass; nested dataclasses are built from nested mappings.
        values: A mapping from field names to values; None means no values.
        where: What the mapping is, for the error message.

    Raises:
        OptionError: An unknown key (with a suggestion), a missing or an unfit value.
    """
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise OptionError(f"{where} must hold keys and values", got=repr(values))
    hints = get_type_hints(options, include_extras=True)
    for key in values:
        if key not in hints:
            raise unknown(f"key in {where}:", key, hints)
    fields = dataclasses.fields(options)  # type: ignore[arg-type]
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise OptionError(f"{where} lacks {', '.join(missing)}")
    return options(
        **{key: _fit(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    )


def _fit(hint: Any, value: object, where: str) -> object:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        raise OptionError(f"{where}: {problem['msg']}", got=repr(problem["input"])) from error
