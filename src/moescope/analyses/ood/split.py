"""Documents in two halves, and the tokens of one expert by half and domain."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from moescope.alignment.options import MINIMUM_HELD_OUT, MINIMUM_TRAIN
from moescope.alignment.samples import Samples
from moescope.captures.read import Capture, Recorded
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.models.view import MoELayer

HALVES = (0, 1)
"""Documents of one are tested with what was trained on those of the other."""


def halves(capture: Capture, seed: int) -> Int64[Tensor, " documents"]:
    """To which half each document belongs: as many of every domain in either."""
    random = np.random.default_rng(seed)
    half = torch.zeros(len(capture.document_domains), dtype=torch.int64)
    for domain in range(len(capture.domains)):
        own = (capture.document_domains == domain).nonzero()[:, 0].numpy()
        half[torch.from_numpy(random.permutation(own)[1::2])] = 1
    return half


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample:
    """The recorded tokens of one expert, in random order, and where they come from."""

    inputs: Float[Tensor, "tokens hidden"]
    """In fp32."""
    documents: Int64[Tensor, " tokens"]
    """Document numbers."""
    half: Int64[Tensor, " tokens"]
    """Of their documents."""
    domain: Int64[Tensor, " tokens"]
    """Position among the domains asked for; -1 for others."""

    @classmethod
    def of(
        cls,
        capture: Capture,
        recorded: Recorded,
        half: Int64[Tensor, " documents"],
        domains: Sequence[str],
        seed: int,
    ) -> "Sample":
        """From what a capture holds."""
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(recorded.tokens)))
        documents = capture.documents[recorded.tokens[order]]
        number = torch.full((len(capture.domains),), -1)
        for position, name in enumerate(domains):
            number[capture.domains.index(name)] = position
        return cls(
            inputs=recorded.values[order].float(),
            documents=documents,
            half=half[documents],
            domain=number[capture.document_domains[documents]],
        )

    def here(self, half: int, domain: int) -> Bool[Tensor, " tokens"]:
        """Tokens of one domain in one half."""
        return (self.half == half) & (self.domain == domain)

    def fewest(self, domains: Sequence[str]) -> int:
        """Tokens of the half and domain that has fewest."""
        cells = [(half, domain) for half in HALVES for domain in range(len(domains))]
        return min(int(self.here(*cell).sum()) for cell in cells)


def usable(fewest: int) -> bool:
    """Whether every domain has tokens enough to train on and to test on."""
    return fewest >= max(MINIMUM_TRAIN, MINIMUM_HELD_OUT)


@dataclass(frozen=True, eq=False, kw_only=True)
class Work:
    """What one expert does, ready for fits that are tested on one half of the documents."""

    sample: Sample
    """Its tokens."""
    outputs: Float[Tensor, "tokens hidden"]
    """What it makes of them."""
    tested: int
    """The half to test on; the other trains."""
    domains: Sequence[str]
    """Names of the domains."""
    number: int
    """Training tokens of every adapter."""

    @classmethod
    def of(
        cls,
        layer: MoELayer,
        expert: int,
        sample: Sample,
        *,
        tested: int,
        domains: Sequence[str],
        number: int,
    ) -> "Work":
        """With the expert's own outputs."""
        weights = layer.expert_weights(expert).to(dtype=torch.float32, device="cpu")
        return cls(
            sample=sample,
            outputs=weights(sample.inputs),
            tested=tested,
            domains=domains,
            number=number,
        )

    def train(self, domain: str) -> Samples:
        """As many tokens of a domain as of any; of all together, as many of each."""
        if domain != RESERVED_DOMAIN:
            return self._first(self._trains(self.domains.index(domain)), self.number)
        parts = len(self.domains)
        sizes = [self.number // parts + (i < self.number % parts) for i in range(parts)]
        rows = [self._trains(i).nonzero()[:size, 0] for i, size in enumerate(sizes)]
        return self._samples(torch.cat(rows))

    def test(self, domain: str) -> Samples:
        """All tokens of a domain in the other half."""
        here = self.sample.here(self.tested, self.domains.index(domain))
        return self._samples(here.nonzero()[:, 0])

    def tests(self) -> Samples:
        """The same of all domains."""
        here = (self.sample.half == self.tested) & (self.sample.domain >= 0)
        return self._samples(here.nonzero()[:, 0])

    def mean(self, domain: str) -> Float[Tensor, " hidden"]:
        """Mean output over all training tokens of a domain."""
        return self.outputs[self._trains(self.domains.index(domain))].mean(0)

    def _trains(self, domain: int) -> Bool[Tensor, " tokens"]:
        return self.sample.here(1 - self.tested, domain)

    def _first(self, here: Bool[Tensor, " tokens"], number: int) -> Samples:
        return self._samples(here.nonzero()[:number, 0])

    def _samples(self, rows: Int64[Tensor, " some"]) -> Samples:
        s = self.sample
        return Samples(s.inputs[rows], self.outputs[rows], s.documents[rows])
