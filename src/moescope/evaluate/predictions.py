"""What a model predicts for the tokens of a corpus, batch by batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from moescope.corpora.packing import Batch
from moescope.errors import ModelError
from moescope.models.view import MoEModel

_VALUES_AT_ONCE = 1 << 24
"""Logits in fp32 at a time: 64 MiB, however long the batch and large the vocabulary."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Targets:
    """The predictions of a batch that count, on the device of its logits.

    The state at a position predicts the next token of the row. It counts where the position is
    kept by the corpus (no padding, no first position of a row unless asked for) and both tokens
    belong to one document, which is the one the loss belongs to. So the first token of a document
    is never predicted from the end of the document before it, packed or not; the end token between
    two documents is one of the first of them, and its prediction counts. Padding is no target,
    even where the corpus keeps it.
    """

    positions: Int64[Tensor, " counted"]
    """Where the predictions are: position `p` of row `r` is `r * length + p`."""
    ids: Int64[Tensor, " counted"]
    """The tokens to be predicted."""
    documents: Int64[Tensor, " counted"]
    """Running numbers of their documents; on the CPU."""
    domains: Int64[Tensor, " counted"]
    """Indices into the domains of the corpus; on the CPU."""

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "Targets":
        """Find them in a batch."""
        counted = torch.zeros_like(batch.kept)
        counted[:, :-1] = (
            batch.kept[:, :-1]
            & batch.attention_mask[:, 1:].bool()
            & (batch.documents[:, :-1] == batch.documents[:, 1:])
        )
        positions = counted.flatten().nonzero()[:, 0]
        return cls(
            positions=positions.to(device),
            ids=batch.input_ids.flatten()[positions + 1].to(device),
            documents=batch.documents.flatten()[positions],
            domains=batch.domains.flatten()[positions],
        )

    def chunks(self, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions and ids of so few targets at a time that their fp32 logits stay small."""
        size = max(1, _VALUES_AT_ONCE // vocabulary)
        return zip(torch.split(self.positions, size), torch.split(self.ids, size), strict=True)


def forward(model: MoEModel, batch: Batch) -> Float[Tensor, "positions vocabulary"]:
    """Logits at all positions of a batch, in the dtype of the model.

    Raises:
        ModelError: The model has no language-model head.
    """
    output = model.forward(batch.input_ids, batch.attention_mask, head=True)
    if "logits" not in output:
        raise ModelError(
            f"the model {model.name!r} predicts no tokens",
            got=f"a {type(model.model).__name__}",
            expected="a model with a language-model head",
        )
    logits: Tensor = output.logits.flatten(0, 1)
    return logits


def losses(
    logits: Float[Tensor, "positions vocabulary"], targets: Targets
) -> Float[Tensor, " counted"]:
    """Negative log-likelihood of each target, in nats."""
    parts = [
        cross_entropy(logits[positions].float(), ids, reduction="none")
        for positions, ids in targets.chunks(logits.shape[1])
    ]
    return torch.cat(parts)


def require_decoder_only(model: MoEModel) -> None:
    """Refuse a model whose loss on a plain text would mean little.

    Raises:
        ModelError: The model is an encoder-decoder.
    """
    if model.model.config.is_encoder_decoder:
        raise ModelError(
            f"the model {model.name!r} is an encoder-decoder: it was not trained to go on with a "
            "plain text",
            remedy="Evaluate it on tasks, with `evaluate.tasks`",
        )


@contextmanager
def evaluating(model: MoEModel) -> Iterator[None]:
    """Evaluation mode and no gradients.

    Not inference mode: what an intervention makes meanwhile may be used in training later.
    """
    with model.evaluating(), torch.no_grad():
        yield
