"""What a capture is going to be, before anything is computed."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from moescope.captures.options import CaptureOptions
from moescope.captures.registry import BlockTensor, LogitsTensor, recordable
from moescope.captures.shards import SCHEMA
from moescope.corpora.corpus import Corpus
from moescope.corpora.tokens import tokenizer_sha256
from moescope.errors import CaptureError
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
        names = list(dict.fromkeys(("routing", *options.record)))
        tensors = [recordable(name) for name in names]
        blocks = [tensor for tensor in tensors if isinstance(tensor, BlockTensor)]
        layers = _layers(model, options.layers)
        for tensor in blocks:
            _require_available(tensor, layers)
        dtype = options.dtype or str(model.dtype).removeprefix("torch.")
        completed = asdict(options) | {
            "record": tuple(names),
            "layers": tuple(layer.index for layer in layers),
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
    def dtype(self) -> torch.dtype:
        """Of the wide tensors."""
        dtype: torch.dtype = getattr(torch, str(self.options.dtype))
        return dtype

    def identity(self) -> dict[str, Any]:
        """What has to be equal for two captures to be the same, as JSON can hold it."""
        options = asdict(self.options)
        return {
            "schema": SCHEMA,
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

    def description(self) -> dict[str, Any]:
        """What the manifest says beyond the identity."""
        config = self.model.model.config
        return {
            "model": {
                "name": self.model.name,
                "revision": self.model.revision,
                "class": type(self.model.model).__name__,
                "model_type": config.model_type,
                "vocab_size": config.vocab_size,
                "num_hidden_layers": config.num_hidden_layers,
            },
            "domains": self.corpus.domains,
            "layers": [
                {
                    "index": layer.index,
                    "family": layer.family,
                    "num_experts": layer.num_experts,
                    "top_k": layer.top_k,
                    "hidden_size": layer.hidden_size,
                    "intermediate_size": layer.intermediate_size,
                }
                for layer in self.layers
            ],
        }


def _layers(model: MoEModel, indices: tuple[int, ...] | None) -> list[MoELayer]:
    """Decoder layers to record.

    An encoder's tokens are other tokens than the decoder's; the format has one list of tokens.
    """
    decoder = [layer for layer in model.layers if layer.stack == "decoder"]
    if indices is None:
        if not decoder:
            raise CaptureError(f"{model.name} has no decoder layer with experts")
        return decoder
    if not indices:
        raise CaptureError("there are no layers to record", remedy="Name at least one")
    chosen = {model.layer(index).index for index in indices}
    return [layer for layer in decoder if layer.index in chosen]


def _require_available(tensor: BlockTensor, layers: list[MoELayer]) -> None:
    if tensor.needs != "shared expert":
        return
    for layer in layers:
        if not layer.has_shared_expert:
            raise CaptureError(
                f"{tensor.name} cannot be recorded: layer {layer.index} has no shared expert",
                remedy=f"Leave {tensor.name} out",
            )
