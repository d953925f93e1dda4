"""One affine map per layer, from states of the residual stream to what the last layer would return.

FOLDER/translators.safetensors    per layer l: `l.weight` [hidden, hidden], `l.bias` [hidden]
FOLDER/translators.json           written last: without it the folder holds no translators
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from moescope.captures.shards import write_shard
from moescope.errors import ModelError, OptionError
from moescope.models.view import MoEModel
from moescope.runs import library_versions, read_json, write_json

SCHEMA = "moescope-translators-1"
_TENSORS = "translators.safetensors"
_JSON = "translators.json"


@dataclass(frozen=True, eq=False, kw_only=True)
class Translators:
    """The tuned lens of a model: h becomes h + W h + b (Belrose et al. 2023, arXiv 2303.08112).

    Raises:
        ModelError: They hold numbers that are not finite.
    """

    weights: Mapping[int, Float[Tensor, "hidden hidden"]]
    """W by layer, as in `nn.Linear`: [out, in]."""
    biases: Mapping[int, Float[Tensor, " hidden"]]
    """b by layer."""
    model_fingerprint: str
    """Of the model whose states these are, as `MoEModel.fingerprint`."""
    training: Mapping[str, Any]
    """What they were trained with: options, text, tokens, seed."""

    def __post_init__(self) -> None:
        assert set(self.weights) == set(self.biases)
        for layer, weight in self.weights.items():
            if not (weight.isfinite().all() and self.biases[layer].isfinite().all()):
                raise ModelError(
                    f"the translator of layer {layer} holds numbers that are not finite",
                    remedy="Train with a smaller learning rate",
                )

    @classmethod
    def identity(cls, model: MoEModel, layers: Sequence[int]) -> "Translators":
        """Translators that change nothing: the logit lens."""
        hidden = model.layers[0].hidden_size
        return cls(
            weights={layer: torch.zeros(hidden, hidden) for layer in layers},
            biases={layer: torch.zeros(hidden) for layer in layers},
            model_fingerprint=model.fingerprint,
            training={},
        )

    @property
    def layers(self) -> list[int]:
        """The model's own numbers of the decoder layers that there is a translator for."""
        return sorted(self.weights)

    def __call__(
        self, layer: int, states: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens hidden"]:
        """States after a layer as the final norm expects them, in fp32, where the states are.

        Raises:
            OptionError: There is no translator for this layer.
        """
        if layer not in self.weights:
            raise OptionError(
                "there is no translator for this layer", got=layer, expected=f"one of {self.layers}"
            )
        given = states.float()
        weight, bias = self.weights[layer].to(given), self.biases[layer].to(given)
        return given + torch.addmm(bias, given, weight.T)

    def require_model(self, model: MoEModel) -> None:
        """Refuse another model than the one whose states these were trained on.

        Raises:
            ModelError: It is another one, or was changed since.
        """
        found = model.fingerprint
        if found != self.model_fingerprint:
            raise ModelError(
                f"the translators are not those of the model {model.name!r}",
                got=f"translators of {self.model_fingerprint[:12]}",
                expected=f"of {found[:12]}",
                remedy="Train them for this model, with `moescope tuned-lens`",
            )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write them, atomically: what was in the folder before is gone first."""
        folder = Path(folder)
        (folder / _JSON).unlink(missing_ok=True)
        tensors = {f"{layer}.weight": self.weights[layer].detach().cpu() for layer in self.layers}
        tensors |= {f"{layer}.bias": self.biases[layer].detach().cpu() for layer in self.layers}
        content = {
            "schema": SCHEMA,
            "tensors": write_shard(folder, _TENSORS, tensors),
            "layers": self.layers,
            "model_fingerprint": self.model_fingerprint,
            "training": self.training,
            "libraries": library_versions(),
        }
        write_json(folder / _JSON, content)

    @staticmethod
    def present(folder: str | os.PathLike[str]) -> bool:
        """Whether a folder holds translators that were written to the end."""
        return (Path(folder) / _JSON).is_file()

    @staticmethod
    def digest(folder: str | os.PathLike[str]) -> str | None:
        """SHA-256 of what a folder says about its translators, their checksum included.

        None where there are none.
        """
        if not Translators.present(folder):
            return None
        return hashlib.sha256((Path(folder) / _JSON).read_bytes()).hexdigest()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Translators":
        """Read what `save` wrote; `require_model` tells whether it fits a model.

        Raises:
            ModelError: The folder holds no translators, those of another format, or damaged ones.
        """
        folder = Path(folder)
        if not cls.present(folder):
            raise ModelError(
                f"{folder} holds no translators",
                expected=f"{_JSON} and {_TENSORS}",
                remedy="Train them with `moescope tuned-lens RUN`; they are in RUN/translators",
            )
        content = read_json(folder / _JSON)
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ModelError(f"{folder / _JSON} has another format", expected=SCHEMA)
        tensors = _read(folder / _TENSORS, content["tensors"]["sha256"])
        layers = content["layers"]
        return cls(
            weights={layer: tensors[f"{layer}.weight"] for layer in layers},
            biases={layer: tensors[f"{layer}.bias"] for layer in layers},
            model_fingerprint=content["model_fingerprint"],
            training=content["training"],
        )


def _read(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a file with this checksum."""
    remedy = f"Copy it again, or delete {path.parent} and train again"
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ModelError(f"{path} was altered: its checksum differs", remedy=remedy)
        return load(data)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path}", got=error, remedy=remedy) from error
