"""What remains of a fit once its chunk is done: errors per document, and of a pair its adapter.

A source expert against many targets is many fits; most are controls, of which only the errors
matter. Whoever keeps the outcomes of finished chunks can go on after an interruption.
"""

import hashlib
import json
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from moescope.alignment.solver import CurvePoint, Fit
from moescope.errors import AlignmentError
from moescope.experts.adapter import Adapter
from moescope.runs import write_text

Label = tuple[str | int, ...]
"""("pair", target), ("same output space", target, j), ("all random", first of the targets that
share it, j), or ("self", whether told of its inputs)."""


@dataclass(frozen=True, kw_only=True)
class ControlLabels:
    """What one target is compared with."""

    same_output_space: tuple[Label, ...]
    """Random targets with its down projection."""
    all_random: tuple[Label, ...]
    """Random targets with three random matrices."""
    ceiling: Label
    """The hidden-rotation self."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """One fit, reduced."""

    errors: Float[np.ndarray, " documents"]
    """Squared errors summed over dimensions and over the tokens of each held-out document."""
    fit: Fit | None = None
    """The fit itself, of pairs and of the hidden-rotation self."""


class OutcomeFolder(MutableMapping[Label, Outcome]):
    """Outcomes on disk: what is there is complete, so that an interrupted call can go on.

    A folder belongs to one source expert, its tokens, targets and options: nothing in it says so.

    Args:
        folder: Where to write; made when needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __setitem__(self, label: Label, outcome: Outcome) -> None:
        record: dict[str, Any] = {"label": label, "errors": outcome.errors.tolist()}
        if outcome.fit is not None:
            fit = outcome.fit
            fit.adapter.save(self._adapter(label))
            record["fit"] = {
                "constant": fit.constant.tolist(),
                "steps": fit.steps,
                "converged": fit.converged,
                "constant_kept": fit.constant_kept,
                "cut_short": fit.cut_short,
                "curve": fit.curve,
                "published_mse": fit.published_mse,
            }
        write_text(self._record(label), json.dumps(record))  # last: it says that all is there

    def __getitem__(self, label: Label) -> Outcome:
        if not self._record(label).exists():
            raise KeyError(label)
        record = self._read(self._record(label))
        errors = np.array(record["errors"], dtype=np.float64)
        if "fit" not in record:
            return Outcome(errors=errors)
        fit = record["fit"]
        fit["constant"] = torch.tensor(fit["constant"])
        fit["curve"] = tuple(CurvePoint(*point) for point in fit["curve"])
        return Outcome(errors=errors, fit=Fit(adapter=Adapter.load(self._adapter(label)), **fit))

    def __delitem__(self, label: Label) -> None:
        if label not in self:
            raise KeyError(label)
        self._record(label).unlink()
        self._adapter(label).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[Label]:
        for path in sorted(self.folder.glob("*.json")):
            yield tuple(self._read(path)["label"])

    def __len__(self) -> int:
        return sum(1 for _ in self.folder.glob("*.json"))

    def __contains__(self, label: object) -> bool:
        return isinstance(label, tuple) and self._record(label).exists()

    def _record(self, label: Label) -> Path:
        # Names of targets are the caller's: they need not be names of files.
        return self.folder / f"{hashlib.sha256(json.dumps(label).encode()).hexdigest()[:16]}.json"

    def _adapter(self, label: Label) -> Path:
        return self._record(label).with_suffix(".safetensors")

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AlignmentError(
                f"cannot read the fit {path}", got=error, remedy="Delete its folder and fit again"
            ) from error
        return record
