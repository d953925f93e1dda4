"""What was measured of each swap, kept so that an interrupted run goes on after it.

    RUN/results/swaps/KEY/baseline.npz, encoder-1-3.npz, ...

KEY names everything that the numbers depend on, but for the swap.
"""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Int64

from moescope.captures.places import Place
from moescope.errors import MoEScopeError
from moescope.runs import Run, write_atomically


@dataclass(frozen=True, eq=False)
class Measured:
    """What one pass found."""

    units: pd.DataFrame
    """By document: tokens and sum of the loss; by question: loss of the answer, and exact."""
    counts: Mapping[Place, Int64[np.ndarray, "groups experts"]]
    """How often each expert was used, by layer and group of documents or questions."""


class Kept:
    """Measurements of the swaps of one model on one text or one set of questions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, run: Run, key: Mapping[str, object]) -> "Kept":
        """The folder for everything that `key` names."""
        return cls(run.parts_folder("swaps", key))

    def load(self, name: str) -> Measured | None:
        """What was saved under a name; None if nothing was.

        Raises:
            MoEScopeError: The file is truncated or altered.
        """
        path = self._path(name)
        if not path.exists():
            return None
        counts, units = dict[Place, Int64[np.ndarray, "groups experts"]](), {}
        for key, array in _arrays(path).items():
            match key.split():
                case ["encoder" | "decoder" as stack, layer]:
                    counts[Place(stack, int(layer))] = array
                case _:
                    units[key] = array
        return Measured(pd.DataFrame(units), counts)

    def save(self, name: str, measured: Measured) -> None:
        """Keep a measurement."""
        arrays = {str(column): measured.units[column].to_numpy() for column in measured.units}
        for place, counts in measured.counts.items():
            arrays[f"{place.stack} {place.layer}"] = counts

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)

        write_atomically(self._path(name), write)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise MoEScopeError(
            f"cannot read what was measured of a swap: {path}",
            got=error,
            remedy="Delete the file and run the same command again",
        ) from error
