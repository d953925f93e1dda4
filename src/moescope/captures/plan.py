"""What a capture is going to be, before anything is computed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moescope.captures.options import CaptureOptions
from moescope.captures.places import Place
from moescope.captures.registry import BlockTensor, LogitsTensor, recordable
from moescope.corpora.corpus import Corpus
from moescope.corpora.tokens import tokenizer_sha256
from moescope.errors import CaptureError
from moescope.models.patching import is_changed
from moescope.models.view import MoELayer, MoEModel


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """A model, its layers and the tensors to record."""

    model: MoEModel
    """The model."""
    corpus: Corpus
    """The text."""
    options: CaptureOptions
    """As asked for, completed: routing included, layers and dtype named."""
    layers: list[MoELayer]
    """Layers to record, in the order of the forward pass."""
    narrow: list[BlockTensor]
    """Recorded for every token."""
    wide: list[BlockTensor]
    """Recorded for the sample."""
    per_token: list[LogitsTensor]
    """Computed from logits, for every token."""

    @classmethod
    def make(cls, model: MoEModel, corpus: Corpus, options: CaptureOptions) -> "Plan":
        """Complete the options and check that the model can deliver.

        Raises:
            CaptureError: An unknown tensor, or one that a layer does not have.
            OptionError: A layer that is dense or does not exist.
        """
        if is_changed(model.model):
            raise CaptureError(
                f"{model.name} is changed by an intervention, which a capture cannot say",
                remedy="Capture outside of it; `observe` sees the changed model",
            )
        names = list(dict.fromkeys(("routing", *options.record)))
        tensors = [recordable(name) for name in names]
        blocks = [tensor for tensor in tensors if isinstance(tensor, BlockTensor)]
        layers = _layers(model, options.layers)
        for tensor in tensors:
            _require_available(tensor, model, layers)
        dtype = options.dtype or str(model.dtype).removeprefix("torch.")
        completed = asdict(options) | {
            "record": tuple(names),
            "layers": tuple(dict.fromkeys(sorted(layer.index for layer in layers))),
            "dtype": dtype,
        }
        return cls(
            model=model,
            corpus=corpus,
            options=CaptureOptions(**completed),
            layers=layers,
            narrow=[tensor for tensor in blocks if tensor.kind == "narrow"],
            wide=[tensor for tensor in blocks if tensor.kind == "wide"],
            per_token=[tensor for tensor in tensors if isinstance(tensor, LogitsTensor)],
        )

    @property
    def places(self) -> list[Place]:
        """Those of the layers."""
        return [Place.of(layer) for layer in self.layers]

    @property
    def dtype(self) -> torch.dtype:
        """Of the wide tensors."""
        dtype: torch.dtype = getattr(torch, str(self.options.dtype))
        return dtype

    def identity(self) -> dict[str, Any]:
        """What has to be equal for two captures to be the same, as JSON can hold it."""
        options = asdict(self.options)
        return {
            "model": {
                "fingerprint": self.model.fingerprint,
                "dtype": str(self.model.dtype).removeprefix("torch."),
            },
            "tokenizer_sha256": tokenizer_sha256(self.model.tokenizer),
            "corpus": self.corpus.description,
            "options": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in options.items()
            },
        }

    def description(self, unused_slots: Mapping[str, int]) -> dict[str, Any]:
        """What the manifest says beyond the identity, given the slots that were not used."""
        config = self.model.model.config
        return {
            "model": {
                "name": self.model.name,
                "revision": self.model.revision,
                "class": type(self.model.model).__name__,
                "model_type": config.model_type,
                "vocab_size": config.get_text_config().vocab_size,
                "num_hidden_layers": config.get_text_config().num_hidden_layers,
            },
            "domains": self.corpus.domains,
            "layers": [
                {
                    "stack": layer.stack,
                    "index": layer.index,
                    "family": layer.family,
                    "num_experts": layer.num_experts,
                    "top_k": layer.top_k,
                    "hidden_size": layer.hidden_size,
                    "intermediate_size": layer.intermediate_size,
                    "weighs_inputs": layer.weighs_inputs,
                    "unused_slots": unused_slots[str(Place.of(layer))],
                }
                for layer in self.layers
            ],
        }


def _layers(model: MoEModel, indices: tuple[int, ...] | None) -> list[MoELayer]:
    """Layers to record; a number stands for the layers of that number in all stacks."""
    if indices is None:
        return model.layers
    if not indices:
        raise CaptureError("there are no layers to record", remedy="Name at least one")
    for missing in set(indices) - {layer.index for layer in model.layers}:
        model.layer(missing, model.layers[-1].stack)  # says which ones there are
    return [layer for layer in model.layers if layer.index in indices]


def _require_available(
    tensor: BlockTensor | LogitsTensor, model: MoEModel, layers: list[MoELayer]
) -> None:
    remedy = f"Leave {tensor.name} out"
    if isinstance(tensor, LogitsTensor) and model.model.config.is_encoder_decoder:
        raise CaptureError(
            f"{tensor.name} cannot be recorded: {model.name} is an encoder-decoder; its encoder "
            "reads the whole row before its decoder predicts a token of it",
            remedy=remedy,
        )
    if isinstance(tensor, LogitsTensor) or tensor.needs != "shared expert":
        return
    for layer in layers:
        if not layer.has_shared_expert:
            raise CaptureError(
                f"{tensor.name} cannot be recorded: layer {layer.index} has no shared expert",
                remedy=remedy,
            )
