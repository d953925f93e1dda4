"""What `health` counts in one layer, shard by shard: its size does not depend on the tokens."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray as Array

from moescope.analyses.health.options import HealthOptions
from moescope.analyses.routing.survey import Survey
from moescope.captures.read import Capture
from moescope.captures.stream import TokenShard
from moescope.measures.decisions import margins, mutual_information_bits
from moescope.measures.expert_runs import Passages, Stays, stays, used_by
from moescope.measures.jackknife import GROUPS
from moescope.measures.routing import count_experts, router_entropy_bits

WORDS = 4_096
"""Entries of the vocabulary that are told apart: the most frequent, and all others as one."""
_KEPT_MARGINS = 100_000

SUMS = ("tokens", "slots", "stayed", "shuffled", "entropy", "decisions", "margin")
"""Columns of `Along.sums`: tokens; experts of tokens that have a next one; of these, those that the
next one has too, as found and as shuffled; entropy in bits; tokens with a margin, and its sum."""


@dataclass(frozen=True, kw_only=True)
class ByLoss:
    """Routing of the tokens that are predicted best and worst, by document."""

    best: Int[Array, "documents experts"]
    """Tokens predicted best that have each expert."""
    worst: Int[Array, "documents experts"]
    """As many that are predicted worst."""
    sums: Float[Array, "documents kinds measures"]
    """Tokens, sum of entropies, and sum of margins, of the best and of the worst."""


@dataclass(frozen=True, kw_only=True)
class Along:
    """Routing of one layer along the text."""

    sums: Float[Array, "documents columns"]
    """One column for each of `SUMS`, for the documents that are kept apart."""
    runs: Int[Array, "groups 2 experts"]
    """Tokens of each expert, and how often it stayed for the next one."""
    shuffled: Float[Array, " experts"]
    """How often it would have stayed in shuffled passages."""
    margins: Float[Array, " some"]
    """Margins of tokens spread evenly over the text."""
    information: Float[Array, " turns"]
    """What a token says about its experts, in bits; then the same after each shift."""
    by_loss: ByLoss | None
    """None where no loss was recorded."""

    def column(self, name: str) -> Float[Array, " documents"]:
        """One of the sums."""
        return np.asarray(self.sums[:, SUMS.index(name)])


def words_of(survey: Survey) -> Int[Array, " vocabulary"]:
    """The number among `WORDS` of every entry of the vocabulary."""
    order = np.argsort(-survey.vocabulary, kind="stable")
    numbers = np.full(len(order), WORDS - 1)
    numbers[order[: WORDS - 1]] = np.arange(min(WORDS - 1, len(order)))
    return numbers


def count_along(
    capture: Capture,
    layer: int,
    survey: Survey,
    marks: Int[Array, " tokens"] | None,
    options: HealthOptions,
) -> Along:
    """Read one layer's routing.

    Args:
        capture: Of the stack.
        layer: The model's own layer number.
        survey: Documents and vocabulary of the capture.
        marks: As `health_loss.marks`, of all tokens.
        options: Shifts and seed.
    """
    experts = int(capture.layer_facts(layer)["num_experts"])
    counting = _Counting(experts, survey, options, every=-(-capture.num_tokens // _KEPT_MARGINS))
    for shard in capture.token_shards():
        counting.add(shard, layer, None if marks is None else marks[shard.tokens])
    by_loss = ByLoss(
        best=counting.by_loss[0, :-1], worst=counting.by_loss[1, :-1], sums=counting.decided[:-1]
    )
    return Along(
        sums=counting.sums[:-1],
        runs=counting.runs,
        shuffled=counting.shuffled,
        margins=np.concatenate(counting.margins),
        information=mutual_information_bits(counting.together),
        by_loss=None if marks is None else by_loss,
    )


class _Counting:
    """The counts of a layer while they grow. Documents that are not kept share the last row."""

    def __init__(self, experts: int, survey: Survey, options: HealthOptions, every: int) -> None:
        self._survey, self._experts, self._every = survey, experts, every
        self._words = words_of(survey)
        self._random = np.random.default_rng(options.seed)
        rows = len(survey.kept) + 1
        self.sums = np.zeros((rows, len(SUMS)))
        self.runs = np.zeros((GROUPS, 2, experts), dtype=np.int64)
        self.shuffled = np.zeros(experts)
        self.margins: list[Array] = []
        words = min(WORDS, len(self._words))
        self.together = np.zeros((1 + options.shifts, words, experts), dtype=np.int32)
        self.by_loss = np.zeros((2, rows, experts), dtype=np.int64)
        self.decided = np.zeros((rows, 2, 3))

    def add(self, shard: TokenShard, layer: int, marks: Int[Array, " tokens"] | None) -> None:
        """Count one shard."""
        documents = shard.documents.numpy()
        passages = Passages.of(documents, shard.rows.numpy())
        experts, logits = shard.experts(layer).numpy(), shard.logits(layer).numpy()
        rows = self._survey.place_of[documents]
        decided = np.stack(
            [np.ones(len(rows)), router_entropy_bits(logits), margins(logits, experts)]
        )
        self.margins.append(decided[2, -shard.tokens.start % self._every :: self._every])
        self._add_runs(stays(used_by(experts, self._experts), passages), passages, documents)
        self._add_decisions(rows, decided)
        self._add_information(self._words[shard.token_ids.numpy()], experts, passages)
        if marks is not None:
            for kind, mark in enumerate((-1, 1)):
                here = marks == mark
                count_experts(self.by_loss[kind], rows[here], experts[here])
                here &= np.isfinite(decided[2])
                np.add.at(self.decided[:, kind], rows[here], decided[:, here].T)

    def _add_runs(self, found: Stays, passages: Passages, documents: Array) -> None:
        owner = documents[passages.starts]
        parts = np.stack([found.tokens, found.stayed], 1)
        np.add.at(self.runs, self._survey.group_of[owner], parts)
        self.shuffled += found.shuffled.sum(0)
        slots = found.tokens.sum(1) * (1 - 1 / passages.lengths)
        sums = np.stack([slots, found.stayed.sum(1), found.shuffled.sum(1)], 1)
        np.add.at(self.sums[:, 1:4], self._survey.place_of[owner], sums)

    def _add_decisions(self, rows: Array, decided: Array) -> None:
        tokens, entropy, margin = decided
        present = np.isfinite(margin)
        sums = np.stack([entropy, present, np.where(present, margin, 0)], 1)
        np.add.at(self.sums[:, 0], rows, tokens)
        np.add.at(self.sums[:, 4:], rows, sums)

    def _add_information(self, words: Array, experts: Array, passages: Passages) -> None:
        count_experts(self.together[0], words, experts)
        for counts in self.together[1:]:
            count_experts(counts, words, experts[passages.shifted(self._random)])
