"""Which class of sparse block belongs to which family, where the common pattern does not do."""

import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import TypeVar

from moescope.errors import ModelError
from moescope.models import families
from moescope.models.view import MoELayer

Family = TypeVar("Family", bound=type[MoELayer])

_BY_BLOCK_CLASS: dict[str, type[MoELayer]] = {}


def register(block_class: str) -> Callable[[Family], Family]:
    """Have blocks of the class of that name seen through the family this decorates.

    Raises:
        ModelError: Another family took that class.
    """

    def registered(family: Family) -> Family:
        if block_class in _BY_BLOCK_CLASS:
            raise ModelError(
                f"{family.__qualname__} and {_BY_BLOCK_CLASS[block_class].__qualname__} both "
                f"describe {block_class}"
            )
        _BY_BLOCK_CLASS[block_class] = family
        return family

    return registered


@cache
def _read_family_files() -> None:
    for file in pkgutil.iter_modules(families.__path__):
        import_module(f"{families.__name__}.{file.name}")


def by_block_class() -> Mapping[str, type[MoELayer]]:
    """The families with a file of their own, by the name of the class of their sparse block."""
    _read_family_files()
    return _BY_BLOCK_CLASS
