"""Which tokens an alignment learns from, and which it is measured on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from moescope.alignment.options import MINIMUM_HELD_OUT, MINIMUM_TRAIN
from moescope.alignment.samples import Samples
from moescope.captures.read import Capture, Recorded
from moescope.models.view import MoELayer

TARGET_ROWS = 1_024
"""Most inputs of a target expert in its own layer that the start of a fit is taken from."""


def held_out_documents(capture: Capture, share: float, seed: int) -> Bool[Tensor, " documents"]:
    """Choose documents for the reported errors, about the same share of every domain.

    A domain of at least two documents gives at least one and keeps at least one.
    """
    domain_of = capture.document_domains
    random = np.random.default_rng(seed)
    held_out = torch.zeros(len(domain_of), dtype=torch.bool)
    for domain in range(len(capture.domains)):
        documents = (domain_of == domain).nonzero()[:, 0].numpy()
        size = min(max(1, round(share * len(documents))), len(documents) - 1)
        held_out[torch.from_numpy(random.permutation(documents)[: max(0, size)])] = True
    return held_out


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """The recorded tokens of a capture, split by document."""

    capture: Capture
    held_out: Tensor
    """[documents]: those of the reported errors."""
    most: int
    """Most tokens of a source expert, training and held out together."""
    seed: int
    """Of the choice among more."""

    def rows(
        self, recorded: Recorded
    ) -> tuple[Int64[Tensor, " training"], Int64[Tensor, " aside"]]:
        """Random rows of an expert's sample, in random order: to learn from, and held out."""
        random = np.random.default_rng(self.seed)
        chosen = torch.from_numpy(random.permutation(len(recorded.tokens))[: self.most])
        aside = self.held_out[self.capture.documents[recorded.tokens[chosen]]]
        return chosen[~aside], chosen[aside]

    def least_training(self, sources: Iterable[tuple[int, Sequence[int]]]) -> int | None:
        """Training tokens of the expert that has least, among those with enough for a number.

        Args:
            sources: Layers with their experts.
        """
        sizes = []
        for layer, experts in sources:
            for recorded in self.capture.expert_samples(layer, experts).values():
                training, aside = map(len, self.rows(recorded))
                if training >= MINIMUM_TRAIN and aside >= MINIMUM_HELD_OUT:
                    sizes.append(training)
        return min(sizes, default=None)

    def samples(
        self, layer: MoELayer, expert: int, recorded: Recorded, most_training: int | None
    ) -> tuple[Samples, Samples]:
        """What an expert does, in fp32: to learn from, at most so many, and held out."""
        training, aside = self.rows(recorded)
        weights = layer.expert_weights(expert).to(dtype=torch.float32, device="cpu")

        def on(rows: Int64[Tensor, " rows"]) -> Samples:
            rows = rows.sort().values
            inputs = recorded.values[rows].float()
            return Samples(inputs, weights(inputs), self.capture.documents[recorded.tokens[rows]])

        return on(training[:most_training]), on(aside)

    def target_inputs(
        self, layer: int, experts: Sequence[int]
    ) -> Mapping[int, Float[Tensor, "tokens hidden"]]:
        """Random inputs that experts have in their own layer, from training documents only."""
        inputs = {}
        for expert, recorded in self.capture.expert_samples(layer, experts).items():
            trained_on = ~self.held_out[self.capture.documents[recorded.tokens]]
            rows = trained_on.nonzero()[:, 0].numpy()
            chosen = np.random.default_rng(self.seed).permutation(rows)[:TARGET_ROWS]
            inputs[expert] = recorded.values[torch.from_numpy(chosen)].float()
        return inputs
