"""A converted model with what is known of it, and the folder that it is written to."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError

from moescope.errors import MoEScopeError, OptionError
from moescope.models.view import MoEModel
from moescope.runs import disk_is_full, write_json

PROBES = 64  # random tokens on which logits are compared
_PROVENANCE = "conversion.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class Conversion:
    """A converted model, and how far it is from the dense one."""

    model: MoEModel
    """With the tokenizer of the dense model."""
    difference: float
    """Norm of the difference of the logits over that of the dense logits, on random tokens."""
    kept: bool
    """Whether the output is that of the dense model, up to rounding."""
    provenance: dict[str, Any]
    """The dense model, the method and its options."""

    def __str__(self) -> str:
        layer = self.model.layers[0]
        name = type(self.model.model).__name__
        says = "The output is kept" if self.kept else "The output is not kept"
        return (
            f"{self.provenance['method']} of {self.provenance['dense']}: {name} with "
            f"{len(self.model.layers)} layers of {layer.num_experts} experts, {layer.top_k} per "
            f"token, {self.model.model.num_parameters():,} parameters. {says}: logits differ by "
            f"{self.difference:.2g} of their norm, on {PROBES} random tokens."
        )

    def as_dict(self) -> dict[str, Any]:
        """What `conversion.json` says."""
        measured = {"logit_difference": self.difference, "output_kept": self.kept}
        return self.provenance | measured | {"probe_tokens": PROBES}

    def save(self, out: str | PathLike[str]) -> None:
        """Write the model, its tokenizer and `conversion.json` to a folder: all of it or nothing.

        Raises:
            OptionError: There is something in that place.
            MoEScopeError: The disk is full.
        """
        out = Path(out)
        require_absent(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as room:
                folder = Path(room) / "partial"
                self.model.model.save_pretrained(folder)
                if self.model.tokenizer is not None:
                    self.model.tokenizer.save_pretrained(folder)
                write_json(folder / _PROVENANCE, self.as_dict())
                folder.replace(out)
        except (OSError, SafetensorError) as error:
            if not disk_is_full(error):
                raise
            raise MoEScopeError(
                f"the disk is full: {out} was not written", remedy="Free some space and try again"
            ) from error


def require_absent(out: Path) -> None:
    """Refuse to write over something.

    Raises:
        OptionError: There is something in that place.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OptionError(f"{out} exists already", expected="a new folder")
