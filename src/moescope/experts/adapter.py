"""The change of input that lets one expert stand in for another."""

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from moescope.errors import AlignmentError
from moescope.runs import write_atomically

FORMAT = "moescope-adapter-1"
_TENSORS = ("weight", "bias", "gain", "shift")


@dataclass(frozen=True, eq=False)
class Adapter:
    """`A(x) = LayerNorm(W x + b) * gain + shift` (MoE Align)."""

    weight: Float[Tensor, "hidden hidden"]
    """W, as in `nn.Linear`: [out, in]."""
    bias: Float[Tensor, " hidden"]
    """b."""
    gain: Float[Tensor, " hidden"]
    """Elementwise scale after normalisation."""
    shift: Float[Tensor, " hidden"]
    """Added after the scale."""
    eps: float = 1e-5
    """Added to the variance inside LayerNorm."""

    def __call__(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """Inputs for the target expert."""
        mixed = linear(x, self.weight, self.bias)
        return layer_norm(mixed, self.gain.shape, self.gain, self.shift, self.eps)

    @property
    def hidden_size(self) -> int:
        """Width of inputs and outputs."""
        return self.bias.shape[0]

    @property
    def num_parameters(self) -> int:
        """Trained numbers: H * H + 3 H."""
        return sum(getattr(self, name).numel() for name in _TENSORS)

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> "Adapter":
        """The same adapter in another dtype or on another device."""
        moved = {
            name: getattr(self, name).to(dtype=dtype, device=device or self.bias.device)
            for name in _TENSORS
        }
        return Adapter(**moved, eps=self.eps)

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file, atomically."""
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in _TENSORS}
        # One key only: several are written in an order that changes from run to run.
        metadata = {FORMAT: json.dumps({"eps": self.eps})}
        write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Adapter":
        """Read what `save` wrote.

        Raises:
            AlignmentError: The file is missing, altered, or no adapter.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if FORMAT not in metadata:
                    raise AlignmentError(
                        f"{path} is not an adapter", got=list(metadata), expected=FORMAT
                    )
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
        except (OSError, SafetensorError) as error:
            raise AlignmentError(f"cannot read the adapter {path}", got=error) from error
        return cls(**tensors, **json.loads(metadata[FORMAT]))
