"""The change of input that lets one expert stand in for another."""

import json
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from moescope.errors import AlignmentError, unknown
from moescope.runs import write_atomically

FORMAT = "moescope-adapter-1"

Form = Literal["layer_norm", "linear", "orthogonal", "low_rank", "scale", "identity"]
"""What an adapter may do to an input x of H dimensions:

layer_norm  LayerNorm(W x + b) * gain + shift, W any matrix (MoE Align)
linear      W x + shift
orthogonal  gain * W x + shift, W orthogonal, gain one number
low_rank    LayerNorm(D x + U V x + b) * gain + shift, D diagonal, U V of rank r
scale       gain * x + shift, gain one number per dimension
identity    x
"""

TENSORS: dict[str, tuple[str, ...]] = {
    "layer_norm": ("weight", "bias", "gain", "shift"),
    "linear": ("weight", "shift"),
    "orthogonal": ("weight", "gain", "shift"),
    "low_rank": ("diagonal", "left", "right", "bias", "gain", "shift"),
    "scale": ("gain", "shift"),
    "identity": (),
}
"""The tensors that an adapter of each form consists of, all of them trained."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A change of input of one of the forms of `Form`; the tensors its form lacks are None.

    Raises:
        AlignmentError: The tensors are not those of the form.
        OptionError: There is no such form.
    """

    weight: Float[Tensor, "hidden hidden"] | None = None
    """W, as in `nn.Linear`: [out, in]."""
    bias: Float[Tensor, " hidden"] | None = None
    """b, added before LayerNorm: the forms without one have none."""
    gain: Float[Tensor, " #hidden"] | None = None
    """Scale, after normalisation where there is one."""
    shift: Float[Tensor, " hidden"] | None = None
    """Added after the scale."""
    eps: float = 1e-5
    """Added to the variance inside LayerNorm."""
    diagonal: Float[Tensor, " hidden"] | None = None
    """D."""
    left: Float[Tensor, "hidden rank"] | None = None
    """U."""
    right: Float[Tensor, "rank hidden"] | None = None
    """V."""
    form: Form = "layer_norm"
    """Which of the forms this is."""

    def __post_init__(self) -> None:
        if self.form not in TENSORS:
            raise unknown("adapter form", self.form, TENSORS)
        if set(self.tensors()) != set(TENSORS[self.form]):
            raise AlignmentError(
                f"these tensors do not make an adapter of form {self.form}",
                got=list(self.tensors()),
                expected=list(TENSORS[self.form]),
            )

    def __call__(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """Inputs for the target expert."""
        parts = self.tensors()
        mixed = x
        if "weight" in parts:
            mixed = linear(x, parts["weight"], self.bias)
        if "left" in parts:
            narrow = linear(x, parts["right"])  # [tokens, rank]
            mixed = parts["diagonal"] * x + linear(narrow, parts["left"], self.bias)
        if self.bias is not None:
            return layer_norm(mixed, self.bias.shape, self.gain, self.shift, self.eps)
        if "gain" in parts:
            mixed = parts["gain"] * mixed
        return mixed + parts["shift"] if "shift" in parts else mixed

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the form, by name."""
        names = ("weight", "diagonal", "left", "right", "bias", "gain", "shift")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def rank(self) -> int:
        """Rank of the trained matrix, 0 where the form has none."""
        if self.left is not None:
            return self.left.shape[1]
        return 0 if self.weight is None else self.weight.shape[0]

    @property
    def num_parameters(self) -> int:
        """Numbers in its tensors."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> "Adapter":
        """The same adapter in another dtype or on another device."""
        moved: dict[str, Any] = {
            name: tensor.to(dtype=dtype or tensor.dtype, device=device or tensor.device)
            for name, tensor in self.tensors().items()
        }
        return replace(self, **moved)

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file, atomically."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors().items()}
        # One key only: several are written in an order that changes from run to run.
        metadata = {FORMAT: json.dumps({"eps": self.eps, "form": self.form})}
        write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Adapter":
        """Read what `save` wrote; files that name no form hold "layer_norm".

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
                told = {"form": "layer_norm"} | json.loads(metadata[FORMAT])
                if told["form"] not in TENSORS:
                    raise unknown("adapter form", told["form"], TENSORS, AlignmentError)
                tensors = {name: file.get_tensor(name) for name in TENSORS[told["form"]]}
        except (OSError, SafetensorError) as error:
            raise AlignmentError(f"cannot read the adapter {path}", got=error) from error
        return cls(**tensors, **told)
