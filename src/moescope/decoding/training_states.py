"""The states that a tuned lens is trained and judged on, by the part that documents play."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Batch
from moescope.decoding.columns import watch
from moescope.decoding.endings import Ending, endings
from moescope.errors import CorpusError
from moescope.models.readout import Readout
from moescope.models.view import MoEModel

Part = Literal["training", "choice", "held_out"]
"""What documents are for: gradients, the choice among the translators of several steps, or what
is reported."""

_OF_TEN: dict[Part, tuple[int, ...]] = {
    "held_out": (0, 1),
    "choice": (2,),
    "training": (3, 4, 5, 6, 7, 8, 9),
}


def belongs(documents: Int64[Tensor, " n"], part: Part, seed: int) -> Bool[Tensor, " n"]:
    """Whether documents, by their running numbers, are in a part; seven of any ten are trained on.

    Args:
        documents: On the CPU.
        part: The part.
        seed: Of the choice within every ten consecutive documents.
    """
    found, owners = torch.unique(documents, return_inverse=True)
    places = [
        np.random.default_rng([seed, number // 10]).permutation(10)[number % 10]
        for number in found.tolist()
    ]
    return torch.tensor(np.isin(places, _OF_TEN[part]))[owners]


class States(NamedTuple):
    """States of some positions, in fp32, where the readout is."""

    last: Float[Tensor, "tokens hidden"]
    """What the final norm is given."""
    layers: Float[Tensor, "layers tokens hidden"]
    """The residual stream after each layer."""


@dataclass(frozen=True, eq=False, kw_only=True)
class StateSource:
    """The states of a model on a text, batch by batch."""

    readout: Readout
    """Of the model."""
    endings: list[Ending]
    """The layers."""
    corpus: Corpus
    """The text."""
    seed: int
    """Of the parts."""

    @classmethod
    def of(cls, model: MoEModel, corpus: Corpus, seed: int) -> "StateSource":
        """Find what decodes the states of a model.

        Raises:
            ModelError: Its states cannot be decoded: no language-model head, no sparse decoder
                layers, several streams.
        """
        found = endings(model)
        return cls(readout=Readout.of(model), endings=found, corpus=corpus, seed=seed)

    @property
    def layers(self) -> list[int]:
        """The model's own numbers of the layers, in the order of the pass."""
        return [ending.layer.index for ending in self.endings]

    def states(self, part: Part) -> Iterator[States]:
        """Those of the documents of one part.

        Raises:
            CorpusError: No document belongs to the part.
        """
        empty = True
        for batch in self.corpus.batches(self.readout.model.tokenizer):
            kept = batch.kept.flatten().nonzero()[:, 0]
            positions = kept[belongs(batch.documents.flatten()[kept], part, self.seed)]
            if len(positions):
                empty = False
                yield self.at(batch, positions)
        if empty:
            raise CorpusError(
                f"no document of the text falls to the part {part!r}",
                remedy="Take more documents: of any ten, two are held out",
            )

    def at(self, batch: Batch, positions: Int64[Tensor, " tokens"]) -> States:
        """Those at some positions of a batch: `p` of row `r` is `r * length + p`."""
        ids, mask = batch.input_ids, batch.attention_mask
        with self.readout.model.evaluating():
            last, layers = watch(self.readout, self.endings, ids, mask, positions)
        device = self.readout.device
        outputs = [layer.output.to(device, torch.float32) for layer in layers]
        return States(last.to(device, torch.float32), torch.stack(outputs))
