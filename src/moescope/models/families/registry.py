"""Which class of sparse block belongs to which family."""

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TypeVar

from moescope.errors import ModelError
from moescope.models import families
from moescope.models.view import MoELayer

Family = TypeVar("Family", bound=type[MoELayer])

_BY_BLOCK_CLASS: dict[str, type[MoELayer]] = {}


def register(family: Family) -> Family:
    """Have blocks of the class named `family.block_class` seen through `family`.

    Raises:
        ModelError: Another family took that class or that name.
    """
    for other in _BY_BLOCK_CLASS.values():
        if other.block_class == family.block_class or other.family == family.family:
            raise ModelError(
                f"{family.__qualname__} and {other.__qualname__} both describe "
                f"{family.family} / {family.block_class}"
            )
    _BY_BLOCK_CLASS[family.block_class] = family
    return family


@cache
def _read_family_files() -> None:
    for file in pkgutil.iter_modules(families.__path__):
        import_module(f"{families.__name__}.{file.name}")


def by_block_class() -> Mapping[str, type[MoELayer]]:
    """The families there are, by the name of the class of their sparse block."""
    _read_family_files()
    return _BY_BLOCK_CLASS


def supported() -> str:
    """Names of the families, for messages."""
    return ", ".join(sorted(family.family for family in by_block_class().values()))
