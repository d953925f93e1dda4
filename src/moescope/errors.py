"""Every error moescope raises on purpose, in one small tree.

MoEScopeError
├── ModelError             a model that cannot be loaded or understood
│   └── ConformanceError   a block whose output cannot be rebuilt from its parts
├── CorpusError            text that cannot be read
├── CaptureError           a capture folder that is missing, altered or of another model
├── AlignmentError         tensors that cannot be aligned
└── OptionError            an option or configuration key that does not exist or does not fit
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches


class MoEScopeError(Exception):
    """An error for the user: what happened and, where known, what was got, expected, and to do.

    Args:
        what: What went wrong, one sentence without a full stop.
        got: The value that was found.
        expected: What would have been accepted.
        remedy: What the user can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        parts = [f"{what}."]
        parts += [f"Got: {got}."] if got is not None else []
        parts += [f"Expected: {expected}."] if expected is not None else []
        parts += [remedy if remedy.endswith("?") else f"{remedy}."] if remedy is not None else []
        super().__init__(" ".join(parts))


class ModelError(MoEScopeError):
    """A model that cannot be loaded or understood."""


class ConformanceError(ModelError):
    """A block whose output cannot be rebuilt from its routing, experts and shared expert."""


class CorpusError(MoEScopeError):
    """Text that cannot be read."""


class CaptureError(MoEScopeError):
    """A capture folder that is missing, altered, or belongs to another model."""


class AlignmentError(MoEScopeError):
    """Tensors that cannot be aligned."""


class OptionError(MoEScopeError):
    """An option or a configuration key that does not exist or does not fit."""


def unknown(
    kind: str, name: object, known: Iterable[str], error: type[MoEScopeError] = OptionError
) -> MoEScopeError:
    """An error for a name that nobody registered, with the nearest known one.

    Args:
        kind: What the name should have been the name of, such as "analysis".
        name: The unknown name.
        known: The names there are.
        error: The class of the error.
    """
    names = sorted(known)
    near = get_close_matches(str(name), names, n=1)
    return error(
        f"unknown {kind} {name!r}",
        expected=", ".join(names),
        remedy=f"Did you mean {near[0]!r}?" if near else None,
    )


def require_least(options: object, least: Mapping[str, int | float]) -> None:
    """Refuse options below the least that they may be; None is no value.

    Args:
        options: What holds them.
        least: The least value by name.

    Raises:
        OptionError: One of them is smaller, or NaN.
    """
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and not value >= smallest:
            raise OptionError(f"{name} is too small", got=value, expected=f"at least {smallest}")
