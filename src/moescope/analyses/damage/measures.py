"""What is known of experts and pairs of experts before anything is done to them.

Everything is of the documents that losses are not measured on.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from torch.nn.functional import cosine_similarity

from moescope.alignment.checks import refusal
from moescope.alignment.controls import linear_map
from moescope.alignment.randomness import generator
from moescope.alignment.samples import Samples
from moescope.analyses.fits import Fits, Source, Target
from moescope.analyses.prune_domain.use import read
from moescope.captures.read import Capture
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.corpora.packing import Batch
from moescope.experts.weights import ExpertWeights
from moescope.measures.matching import Joined, alike, joined
from moescope.models.view import MoEModel
from moescope.progress import track


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Something that may foretell damage."""

    label: str
    """What it is, in a few words."""
    sign: int
    """1 where more of it should mean more damage, -1 where less should."""


OF_EXPERTS = {
    "frequency": Measure(label="frequency", sign=1),
    "mean_weight": Measure(label="mean routing weight", sign=1),
    "output_norm": Measure(label="mean norm of outputs", sign=1),
    "ean": Measure(label="EAN (sum of norms)", sign=1),
    "weighted_norm": Measure(label="router-weighted norm (sum)", sign=1),
    "reap": Measure(label="REAP", sign=1),
    "weight_norm": Measure(label="norm of weights", sign=1),
    "linear_fvu": Measure(label="FVU of the linear map", sign=1),
}
OF_PAIRS = {
    "weights_cosine": Measure(label="cosine of weights", sign=-1),
    "weights_matched": Measure(label="cosine of weights, matched", sign=-1),
    "outputs_cosine": Measure(label="cosine of outputs", sign=-1),
    "outputs_cka": Measure(label="CKA of outputs", sign=-1),
    "router_cosine": Measure(label="cosine of router rows", sign=-1),
    "aligned_fvu": Measure(label="FVU behind an adapter", sign=1),
}
MEASURES = OF_EXPERTS | OF_PAIRS
Values = dict[str, float]
"""Measures by name; NaN where one is not known."""
Two = tuple[Source, Source]
"""Two experts: the second is given the tokens of the first."""


def of_experts(
    fits: Fits, batches: Sequence[Batch], experts: Sequence[Source]
) -> dict[Source, Values]:
    """The measures of `OF_EXPERTS`.

    Args:
        fits: Its held-out documents are left out.
        batches: Rows of text in which only the other documents are kept.
        experts: Which ones.
    """
    model, capture = fits.material.model, fits.tokens.capture
    as_one = [replace(batch, domains=batch.domains.clamp(max=0)) for batch in batches]
    use = read(model, as_one, ["text"], "reap").use[RESERVED_DOMAIN]
    found: dict[Source, Values] = {}
    for layer in model.layers:
        seen = use[layer]
        weights = mean_weights(capture, layer.index, ~fits.tokens.held_out)
        for source in experts:
            if source.layer == layer.index:
                expert = source.expert
                tensors = layer.expert_weights(expert).tensors().values()
                found[source] = {
                    "frequency": float(seen.frequency[expert]),
                    "mean_weight": float(weights[expert]),
                    "output_norm": float(seen.mean_norm[expert]),
                    "ean": float(seen.ean[expert]),
                    "weighted_norm": float(seen.weighted_norm[expert]),
                    "reap": float(seen.reap[expert]),
                    "weight_norm": sum(float(t.double().square().sum()) for t in tensors) ** 0.5,
                }
    for source in track(experts, "damage: linear maps"):
        found[source]["linear_fvu"] = linear_fvu(fits, source)
    return found


def mean_weights(
    capture: Capture, layer: int, documents: Bool[Tensor, " documents"]
) -> Float64[Tensor, " experts"]:
    """Mean routing weight of each expert over the tokens of some documents that used it."""
    number = int(capture.layer_facts(layer)["num_experts"])
    sums, counts = torch.zeros(2, number, dtype=torch.float64).unbind()
    for part, routing in capture.routing_shards(layer):
        used = (routing.experts >= 0) & documents[capture.documents[part]][:, None]
        chosen = routing.experts[used].long()
        sums += chosen.bincount(routing.weights[used].double(), number)
        counts += chosen.bincount(minlength=number)
    mean: Tensor = sums / counts.clamp_min(1)
    return mean


def linear_fvu(fits: Fits, source: Source) -> float:
    """FVU of the linear map in the place of an expert; NaN where it cannot be aligned.

    On tokens set aside within the training documents.
    """
    train, _ = fits.samples(source)
    if refusal(train, train) is not None:
        return math.nan
    name = generator(fits.options.seed, str(source), "linear map")
    share = fits.options.solver.inner_share
    train, aside = train.split(share, name)
    adapter = linear_map(*train.split(share, name))
    missed = (adapter(aside.inputs) - aside.outputs).square().sum()
    return float(missed / (aside.outputs - train.outputs.mean(0)).square().sum())


def of_pairs(fits: Fits, pairs: Iterable[Two], *, fitted: bool) -> dict[Two, Values]:
    """The measures of `OF_PAIRS`.

    Args:
        fits: Adapters and training tokens.
        pairs: Which ones.
        fitted: Whether they are aligned too, where no adapter is there yet.
    """
    others: dict[Source, dict[Source, None]] = {}
    for one, other in pairs:
        others.setdefault(one, {})[other] = None
    model = fits.material.model
    ready = _Ready(model)
    found = {}
    for one in track(sorted(others), "damage: pairs of experts"):
        train, _ = fits.samples(one)
        aligned = inner_fvus(fits, one, [*others[one]]) if fitted else [math.nan] * len(others[one])
        for other, aligned_fvu in zip(others[one], aligned, strict=True):
            found[one, other] = {
                **ready.weights_alike(one, other),
                **_outputs_alike(train, ready.single(other)),
                "router_cosine": _router_cosine(model, one, other),
                "aligned_fvu": aligned_fvu,
            }
    return found


def inner_fvus(fits: Fits, one: Source, others: Sequence[Source]) -> list[float]:
    """FVU that each of some experts leaves of another behind an adapter; NaN where none is fitted.

    On tokens set aside within the training documents.
    """
    targets = [Target(*other) for other in others]
    found = fits.between(one, targets)
    return [found[target].inner_fvu for target in targets]


class _Ready:
    """Experts of a model, ready to be compared: those of two at a time."""

    def __init__(self, model: MoEModel) -> None:
        self.model = model
        self._joined: dict[Source, Joined] = {}
        self._alike: dict[frozenset[Source], dict[str, float]] = {}

    def single(self, expert: Source) -> ExpertWeights:
        """Its weights, in fp32 on the CPU."""
        weights = self.model.layer(expert.layer).expert_weights(expert.expert)
        return weights.to(dtype=torch.float32, device="cpu")

    def weights_alike(self, one: Source, other: Source) -> dict[str, float]:
        """How alike two experts are as matrices; the same either way round."""
        two = frozenset((one, other))
        if two not in self._alike:
            found = alike(*(self._join(expert) for expert in sorted(two)))
            values = {"weights_cosine": found.in_order, "weights_matched": found.matched}
            self._alike[two] = values
        return self._alike[two]

    def _join(self, expert: Source) -> Joined:
        if expert not in self._joined:
            weights = self.single(expert)
            matrices = [weights.up, weights.down.mT]
            matrices += [] if weights.gate is None else [weights.gate]
            self._joined[expert] = joined(matrices)
        return self._joined[expert]


def _outputs_alike(train: Samples, other: ExpertWeights) -> dict[str, float]:
    """How alike another expert's outputs are; NaN where the first cannot be aligned."""
    if refusal(train, train) is not None:
        return {"outputs_cosine": math.nan, "outputs_cka": math.nan}
    outputs = other(train.inputs)
    cosine = cosine_similarity(train.outputs, outputs, dim=1).mean()
    return {"outputs_cosine": float(cosine), "outputs_cka": linear_cka(train.outputs, outputs)}


def linear_cka(one: Float[Tensor, "tokens hidden"], other: Float[Tensor, "tokens hidden"]) -> float:
    """Linear CKA of outputs (Kornblith et al. 2019, arXiv 1905.00414, eq. 4), tokens as samples.

    1 for equal up to a rotation, a shift and one scale; NaN where one of them is constant.
    """
    x, y = (part.double() - part.double().mean(0) for part in (one, other))
    own = torch.linalg.norm(x.mT @ x) * torch.linalg.norm(y.mT @ y)
    return float(torch.linalg.norm(x.mT @ y) ** 2 / own)


def _router_cosine(model: MoEModel, one: Source, other: Source) -> float:
    left, right = (
        model.layer(e.layer).router_weight[e.expert].detach().double().cpu() for e in (one, other)
    )
    return float(cosine_similarity(left, right, dim=0))
