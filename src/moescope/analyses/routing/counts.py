"""Counts of one layer's routing, shard by shard: their size does not depend on the tokens."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray as Array

from moescope.analyses.routing.survey import Survey
from moescope.captures.read import Capture
from moescope.captures.stream import TokenShard
from moescope.measures.coactivation import count_pairs
from moescope.measures.jackknife import GROUPS
from moescope.measures.routing import count_experts, router_entropy_bits
from moescope.models.view import Stack


@dataclass(frozen=True, kw_only=True)
class Onward:
    """How the tokens of each expert go on to the next layer."""

    layer: int
    """Number of that layer."""
    together: Int[Array, "groups experts next_experts"]
    """Tokens that have the one expert here and the other there."""
    used: Int[Array, "groups next_experts"]
    """Tokens that have the expert there."""


@dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """Routing of one layer, counted."""

    stack: Stack
    """Decoder or encoder."""
    layer: int
    """The model's own layer number."""
    top_k: int
    """Experts per token."""
    used: Int[Array, "domains groups experts"]
    """Tokens that have the expert in their top-k."""
    documents: Int[Array, "kept experts"]
    """The same by document, for documents whose counts are kept apart."""
    together: Int[Array, "groups experts experts"]
    """Tokens that have both experts in their top-k."""
    onward: Onward | None
    """None for the last layer."""
    vocabulary: Int[Array, "vocabulary experts"]
    """Tokens by vocabulary index and expert, int32."""
    logits: Float[Array, "sampled experts"]
    """Router logits of the sample."""
    router_entropy_bits: float
    """Mean entropy of the softmax over a token's router logits, in bits."""

    @property
    def num_experts(self) -> int:
        """Number of routed experts."""
        return int(self.documents.shape[1])

    @property
    def names(self) -> dict[str, object]:
        """First columns of every table."""
        return {"stack": self.stack, "layer": self.layer}

    def by_expert(self, domain: int = -1) -> Int[Array, " experts"]:
        """Tokens of each expert in a domain; -1 for all together."""
        return np.asarray(self.by_group(domain).sum(0))

    def by_group(self, domain: int = -1) -> Int[Array, "groups experts"]:
        """The same by group of documents."""
        return np.asarray(self.used.sum(0) if domain < 0 else self.used[domain])


def count_layer(capture: Capture, layer: int, survey: Survey) -> LayerCounts:
    """Read one layer's routing, and the experts of the next recorded one."""
    experts = capture.layer_facts(layer)["num_experts"]
    counting = _Counting(capture, layer, survey)
    for shard in capture.token_shards():
        counting.add(shard)
    return LayerCounts(
        stack=capture.stack,
        layer=layer,
        top_k=counting.top_k,
        used=counting.used.reshape(len(capture.domains), GROUPS, experts),
        documents=counting.documents[:-1],
        together=counting.together,
        onward=counting.onward,
        vocabulary=counting.vocabulary,
        logits=np.concatenate(counting.logits),
        router_entropy_bits=counting.entropy / capture.num_tokens,
    )


class _Counting:
    """The counts of a layer while they grow."""

    def __init__(self, capture: Capture, layer: int, survey: Survey) -> None:
        def experts_of(number: int) -> int:
            return int(capture.layer_facts(number)["num_experts"])

        self._layer, self._survey = layer, survey
        experts = experts_of(layer)
        kept = len(survey.kept)
        self.top_k, self.entropy = 0, 0.0
        self.logits: list[Array] = []
        self.used = np.zeros((len(capture.domains) * GROUPS, experts), dtype=np.int64)
        self.documents = np.zeros((kept + 1, experts), dtype=np.int64)  # the last: all others
        self.vocabulary = np.zeros((len(survey.vocabulary), experts), dtype=np.int32)
        self.together = np.zeros((GROUPS, experts, experts), dtype=np.int64)
        self.onward: Onward | None = None
        if following := [number for number in capture.layers if number > layer]:
            others = experts_of(following[0])
            self.onward = Onward(
                layer=following[0],
                together=np.zeros((GROUPS, experts, others), dtype=np.int64),
                used=np.zeros((GROUPS, others), dtype=np.int64),
            )

    def add(self, shard: TokenShard) -> None:
        """Count one shard."""
        documents, survey = shard.documents.numpy(), self._survey
        groups = survey.group_of[documents]
        experts = shard.experts(self._layer).numpy()
        logits = shard.logits(self._layer).numpy()
        self.top_k = experts.shape[1]
        self.entropy += float(router_entropy_bits(logits).sum(dtype=np.float64))
        here = survey.sample[np.searchsorted(survey.sample, shard.tokens.start) :]
        here = here[here < shard.tokens.stop] - shard.tokens.start
        self.logits.append(logits[here].astype(np.float64))
        count_experts(self.used, shard.domain_of.numpy() * GROUPS + groups, experts)
        count_experts(self.documents, survey.place_of[documents], experts)
        count_experts(self.vocabulary, shard.token_ids.numpy(), experts)
        count_pairs(self.together, groups, experts, experts)
        if self.onward is not None:
            following = shard.experts(self.onward.layer).numpy()
            count_experts(self.onward.used, groups, following)
            count_pairs(self.onward.together, groups, experts, following)
