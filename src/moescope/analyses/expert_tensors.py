"""Tensors of all experts of a model that do not fit in memory together.

FOLDER/NAME-L3.safetensors            one tensor per expert of layer 3
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moescope.errors import MoEScopeError
from moescope.runs import write_atomically


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertTensors:
    """One tensor per expert: a layer is computed once, kept on disk, and read expert by expert."""

    folder: Path
    """Where they are kept; it says what they depend on."""
    name: str
    """What they are, as part of the names of files."""
    compute: Callable[[int], Mapping[int, Tensor]]
    """Those of a layer, by number of the expert."""

    def of(self, layer: int, expert: int, rows: int | None = None) -> Tensor:
        """That of one expert, or its first rows.

        Raises:
            MoEScopeError: The file is damaged.
        """
        path = self.folder / f"{self.name}-L{layer}.safetensors"
        if not path.exists():
            tensors = {str(e): tensor.contiguous() for e, tensor in self.compute(layer).items()}
            write_atomically(path, lambda temporary: save_file(tensors, temporary))
        try:
            with safe_open(path, framework="pt") as file:
                kept: Tensor = file.get_slice(str(expert))[:rows]
        except (OSError, SafetensorError) as error:
            raise MoEScopeError(
                f"cannot read {path}", got=error, remedy="Delete it: it is made again"
            ) from error
        return kept
