"""The outputs of all experts of a layer for the recorded tokens, measured as they stream by."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import one_hot

from moescope.captures.places import Place
from moescope.captures.read import Capture
from moescope.captures.shards import read_tensor
from moescope.measures.jackknife import GROUPS
from moescope.measures.outputs import KINDS, angular, pair_means, token_cosines
from moescope.models.offload import resident
from moescope.models.view import MoELayer

MEASURES = ("cosine", "centred_cosine", "angular")
_BYTES_AT_ONCE = 1 << 26  # of the outputs of all experts, in fp32


@dataclass(frozen=True, eq=False, kw_only=True)
class Recorded:
    """What the capture knows of the tokens of whole rows, in one layer."""

    scores: Float[Tensor, "tokens experts"]
    """Router logits."""
    chosen: Bool[Tensor, "tokens experts"]
    """The experts that were used."""
    documents: Int64[Tensor, " tokens"]
    """Document numbers."""
    first: Bool[Tensor, " tokens"]
    """First positions, of rows and of documents."""

    @classmethod
    def of(cls, capture: Capture, layer: int, most: int | None = None) -> "Recorded":
        """Those of a capture, up to so many tokens.

        Raises:
            CaptureError: It holds no whole rows, or no inputs.
        """
        tokens = capture.whole_row_tokens("inputs")
        tokens = tokens if most is None else min(most, tokens)
        scores, chosen = [], []
        for part, routing in capture.routing_shards(layer):
            if part.start >= tokens:
                break
            logits = routing.logits[: tokens - part.start].float()
            used = torch.zeros(len(logits), logits.shape[1] + 1, dtype=torch.bool)
            used.scatter_(1, routing.experts[: tokens - part.start] + 1, value=True)
            scores.append(logits)
            chosen.append(used[:, 1:])  # the column before holds the slots that were not used
        rows, documents = capture.rows[:tokens], capture.documents[:tokens]
        begins = torch.zeros(tokens, dtype=torch.bool)
        begins[1:] = (documents[1:] != documents[:-1]) & (rows[1:] == rows[:-1])
        return cls(
            scores=torch.cat(scores),
            chosen=torch.cat(chosen),
            documents=documents,
            first=begins | (capture.positions[:tokens] == 0),
        )

    @property
    def counted(self) -> Bool[Tensor, " tokens"]:
        """Tokens other than first positions, whose outputs can be so long that a mean is theirs.

        All, where there are no others.
        """
        return self.first if self.first.all() else ~self.first


Outputs = Iterator[tuple[Int64[Tensor, " tokens"], Float[Tensor, "experts tokens hidden"]]]
"""Some tokens, and the outputs of all experts for them, unweighted, in fp32."""


def all_outputs(capture: Capture, layer: MoELayer, most: int) -> Outputs:
    """The outputs of all experts for the first tokens of whole rows, so many as fit in memory."""
    place = Place.of(layer)
    experts = range(layer.num_experts)
    size = max(1, _BYTES_AT_ONCE // (4 * len(experts) * max(len(experts), layer.hidden_size)))
    for entry in capture.manifest["shards"]:
        if entry["kind"] != "rows" or not place.within(entry):
            continue
        tokens, inputs = (
            read_tensor(capture.folder, entry, place.tensor(name)) for name in ("tokens", "inputs")
        )
        within = int((tokens < most).sum())
        for some, x in zip(
            torch.split(tokens[:within], size), torch.split(inputs[:within], size), strict=True
        ):
            yield some, layer.expert_outputs(x, experts).float()


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """What is kept of the outputs of a layer."""

    by_kind: Float[Tensor, "measures kinds tokens"]
    """Of `MEASURES`, the mean over the pairs of each of `measures.outputs.KINDS`."""
    norms: Float[Tensor, "tokens experts"]
    """Of the outputs."""
    pairs: dict[str, Float64[Tensor, "measures experts experts"]]
    """Means over tokens: `all`, and `later` without first positions."""
    estimates: Float64[Tensor, "estimates measures experts experts"]
    """Those of `later`, then the same without each group of documents, of `jackknife.GROUPS`."""


def measured(capture: Capture, layer: MoELayer, recorded: Recorded) -> Measured:
    """All measures of a layer, from outputs of which only some tokens are in memory at a time.

    Means come first, for the centred cosine, so that every output is computed twice.
    """
    with resident(layer.block):
        return _measured(lambda: all_outputs(capture, layer, len(recorded.first)), recorded)


def _measured(read: Callable[[], Outputs], recorded: Recorded) -> Measured:
    means = _means(read(), recorded.counted)
    groups = torch.unique(recorded.documents, return_inverse=True)[1] % GROUPS
    groups = torch.where(recorded.counted, groups, GROUPS)
    by_kind = torch.empty(len(MEASURES), len(KINDS), len(groups))
    norms = torch.empty(recorded.scores.shape)
    sums = _Sums()
    for tokens, outputs in read():
        cosines, lengths = token_cosines(outputs)
        centred, _ = token_cosines(outputs - means.to(outputs)[:, None])
        chosen = recorded.chosen[tokens].to(outputs.device)
        norms[tokens] = lengths.cpu()
        found = torch.stack([cosines, centred, angular(cosines)])
        for number, values in enumerate(found):
            by_kind[number][:, tokens] = pair_means(values, chosen).cpu()
        sums.add(found, groups[tokens].to(outputs.device))
    every, later = sums.mean(), sums.mean(slice(GROUPS))
    left_out = [
        sums.mean([other for other in range(GROUPS) if other != group])
        for group in torch.unique(groups).tolist()
        if group != GROUPS
    ]
    return Measured(
        by_kind=by_kind,
        norms=norms,
        pairs={"all": every, "later": later},
        estimates=torch.stack([later, *left_out]),
    )


class _Sums:
    """Sums over the tokens of each group of measures of pairs; NaN counts as no token."""

    def __init__(self) -> None:
        self._sums: Tensor | float = 0.0
        self._counts: Tensor | float = 0.0

    def add(
        self,
        values: Float[Tensor, "measures tokens experts experts"],
        groups: Int64[Tensor, " tokens"],
    ) -> None:
        member = one_hot(groups, GROUPS + 1).T.to(values)
        sums, counts = (
            torch.stack([member @ measure.flatten(1) for measure in part.to(values)])
            for part in (values.nan_to_num(), values.isfinite())
        )
        shape = (len(values), GROUPS + 1, *values.shape[2:])
        self._sums = self._sums + sums.double().cpu().view(shape)
        self._counts = self._counts + counts.double().cpu().view(shape)

    def mean(
        self, groups: slice | list[int] = slice(None)
    ) -> Float64[Tensor, "measures experts experts"]:
        """Over the tokens of some groups."""
        sums, counts = torch.as_tensor(self._sums), torch.as_tensor(self._counts)
        return sums[:, groups].sum(1) / counts[:, groups].sum(1)


def _means(outputs: Outputs, counted: Bool[Tensor, " tokens"]) -> Float64[Tensor, "experts hidden"]:
    """Mean output of each expert over the tokens that are counted."""
    total: Tensor | float = 0.0
    for tokens, parts in outputs:
        total = total + parts[:, counted[tokens].to(parts.device)].sum(1, dtype=torch.float64)
    return torch.as_tensor(total / counted.sum())
