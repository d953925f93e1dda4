"""Adapters between experts on disk: what is there is complete.

FOLDER/L1E0-to-L4E3.safetensors       the adapter
FOLDER/L1E0-to-L4E3.json              written last: the pair is done
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moescope.errors import AlignmentError, MoEScopeError
from moescope.experts.adapter import Adapter
from moescope.runs import read_json, write_json


class Source(NamedTuple):
    """An expert that is to be replaced."""

    layer: int
    """The model's own layer number."""
    expert: int
    """Its number within the layer."""

    def __str__(self) -> str:
        return f"L{self.layer}E{self.expert}"


class Target(NamedTuple):
    """An expert that is to stand in for it, or a random one in the place of that."""

    layer: int
    """The model's own layer number; it may be the layer of the source."""
    expert: int
    """Its number within the layer."""
    random: int | None = None
    """Which random expert with its down projection; None for itself."""

    def __str__(self) -> str:
        name = f"L{self.layer}E{self.expert}"
        return name if self.random is None else f"{name}-random{self.random}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A source and the target that is to stand in for it, behind its adapter."""

    source: Source
    target: Target
    adapter: Adapter | None
    """None where there are too few tokens or constant outputs."""
    inner_fvu: float
    """FVU on tokens set aside within the training documents: to choose by. NaN without adapter."""
    row: dict[str, Any]
    """The columns of `AlignmentResult`, errors on the held-out documents among them."""
    random: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """FVU on the held-out documents of every random target, by kind; empty without controls."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FitFolder:
    """The fits of one run, capture and set of options, and with controls of one set of targets."""

    folder: Path
    """Where they lie."""

    def write(self, fitted: Fitted) -> None:
        """Keep a fit."""
        pair = fitted.source, fitted.target
        if fitted.adapter is not None:
            fitted.adapter.save(self._adapter(*pair))
        record = {"inner_fvu": fitted.inner_fvu, "row": fitted.row, "random": fitted.random}
        write_json(self._record(*pair), record)

    def holds(self, source: Source, target: Target) -> bool:
        """Whether there is a whole fit."""
        path = self._record(source, target)
        if not path.exists():
            return False
        # Only a pair that could not be fitted has no adapter.
        return self._adapter(source, target).exists() or self._read(path)["row"]["fvu"] is None

    def read(self, source: Source, target: Target) -> Fitted:
        """A fit that is there.

        Raises:
            AlignmentError: Its files are damaged.
        """
        record, path = self._read(self._record(source, target)), self._adapter(source, target)
        return Fitted(
            source=source,
            target=target,
            adapter=Adapter.load(path) if path.exists() else None,
            inner_fvu=_number(record["inner_fvu"]),
            row={name: _number(value) for name, value in record["row"].items()},
            random=record.get("random", {}),
        )

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            record: dict[str, Any] = read_json(path)
        except MoEScopeError as error:
            raise AlignmentError(
                f"cannot read the fit {path}", got=error, remedy="Delete it: it is made again"
            ) from error
        return record

    def _record(self, source: Source, target: Target) -> Path:
        return self.folder / f"{source}-to-{target}.json"

    def _adapter(self, source: Source, target: Target) -> Path:
        return self.folder / f"{source}-to-{target}.safetensors"


def _number(value: Any) -> Any:
    """JSON has no NaN."""
    return math.nan if value is None else value
