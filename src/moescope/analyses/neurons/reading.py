"""What the neurons of a layer's experts do with the tokens that were routed to them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array
from torch import Tensor
from torch.nn.functional import linear

from moescope.captures.read import Capture, Recorded
from moescope.experts.activations import neurons
from moescope.experts.weights import ExpertWeights
from moescope.measures.activations import Activity
from moescope.measures.jackknife import GROUPS
from moescope.measures.routing import count_experts
from moescope.models.view import MoELayer

PLACES = 3
"""Places, in as many documents, that are shown for a neuron."""
_MOST_UNITS = 256
_VALUES_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False, kw_only=True)
class Units:
    """Documents as the units of intervals and shuffles.

    Of domains with over 256 documents several together are one unit, so that what is kept for
    every neuron does not grow with the corpus.
    """

    of: Int[Array, " documents"]
    """Unit of every document; -1 for one without kept tokens."""
    domain_of: Int[Array, " units"]
    """Index into the domains of every unit."""

    @classmethod
    def of_capture(cls, capture: Capture) -> "Units":
        """Deal the documents of each domain into its units."""
        domains = capture.document_domains.numpy()
        of = np.full(len(domains), -1)
        domain_of: list[int] = []
        for domain in range(len(capture.domains)):
            own = np.flatnonzero(domains == domain)
            of[own] = np.arange(len(own)) % _MOST_UNITS + len(domain_of)
            domain_of += [domain] * min(len(own), _MOST_UNITS)
        return cls(of=of, domain_of=np.array(domain_of, dtype=np.int64))

    def chosen_on(self) -> Bool[Array, " units"]:
        """Every other unit of each domain: what is ablated is chosen on these alone."""
        first = np.searchsorted(self.domain_of, self.domain_of)
        return np.asarray((np.arange(len(self.domain_of)) - first) % 2 == 0)

    def left_out(self) -> Float[Array, "estimates units"]:
        """All units, and then all but one of the groups of the jackknife."""
        groups = np.arange(len(self.domain_of)) % GROUPS
        present = np.unique(groups)
        return np.concatenate([np.ones((1, len(groups))), groups != present[:, None]])

    def known(self) -> Bool[Array, " domains"]:
        """Which domains have documents."""
        return np.bincount(self.domain_of) > 0


def with_parameters(layer: MoELayer) -> list[int]:
    """The experts of a layer that have neurons: in some families others only pass inputs on."""
    wide = layer.intermediate_size
    every = range(layer.num_experts)
    return [e for e in every if layer.expert_weights(e).intermediate_size == wide]


def reach(capture: Capture, layer: int) -> Float[Array, "domains experts"]:
    """Share of the tokens of each domain that are routed to each expert; NaN without tokens."""
    shape = len(capture.domains), capture.layer_facts(layer)["num_experts"]
    counts, tokens = np.zeros(shape, dtype=np.int64), np.zeros((len(capture.domains), 1))
    for shard in capture.token_shards():
        domains = shard.domain_of.numpy()
        tokens[:, 0] += np.bincount(domains, minlength=len(tokens))
        count_experts(counts, domains, shard.experts(layer).numpy())
    shares = np.full(counts.shape, np.nan)
    np.divide(counts, tokens, out=shares, where=tokens > 0)
    return shares


def activations(
    weights: ExpertWeights, x: Float[Tensor, "tokens hidden"]
) -> tuple[Float[Tensor, "tokens neurons"], Float[Tensor, "tokens neurons"]]:
    """Activations act(gate x), or act(up x) without gate, and what the neurons emit.

    That is the activation times up, where there is a gate.
    """
    emit = partial(
        neurons,
        activation_name=weights.activation,
        limit=weights.limit,
        up_offset=weights.up_offset,
    )
    up = linear(x, weights.up, weights.up_bias)
    if weights.gate is None:
        found = emit(up, None)
        return found, found
    gate = linear(x, weights.gate, weights.gate_bias)
    return emit(gate, None), emit(gate, up)


def activities(
    layer: MoELayer,
    samples: Mapping[int, Recorded],
    units_of: Int[Tensor, " tokens"],
    units: int,
    threshold: float,
) -> Iterator[tuple[int, Activity, Float[Array, " neurons"]]]:
    """Expert by expert: its number, its sums, and the mean norm of what each neuron adds.

    That is its mean absolute value times the norm of its column of `down`, without the weight of
    the router; NaN without tokens.

    Args:
        layer: The layer.
        samples: Inputs of the tokens of each expert.
        units_of: Unit of every token of the capture.
        units: Their number.
        threshold: Above which a neuron is active.
    """
    for expert, recorded in samples.items():
        weights = layer.expert_weights(expert).to(dtype=torch.float32)
        device, wide = weights.up.device, weights.intermediate_size
        activity = Activity(units, wide, threshold, device)
        size = max(1, _VALUES_AT_ONCE // wide)
        for rows in torch.split(torch.arange(len(recorded.tokens)), size):
            x = recorded.values[rows].float().to(device)
            activity.add(units_of[recorded.tokens[rows]].to(device), *activations(weights, x))
        norms = activity.emitted / activity.tokens.sum() * weights.down.norm(dim=0).double()
        yield expert, activity, np.asarray(norms.cpu())


def typical_places(
    weights: ExpertWeights, recorded: Recorded, documents: Int[Tensor, " tokens"]
) -> Iterator[list[tuple[int, float]]]:
    """For each neuron tokens of the capture and activations: the largest, in several documents.

    Args:
        weights: The neurons, as an expert without the others.
        recorded: Inputs of the tokens of the expert.
        documents: Document of every token of the capture.
    """
    found, _ = activations(weights, recorded.values.float().to(weights.up.device))
    for values in found.cpu().T:
        places: dict[int, tuple[int, float]] = {}
        for row in values.abs().argsort(descending=True, stable=True).tolist():
            token = int(recorded.tokens[row])
            places.setdefault(int(documents[token]), (token, float(values[row])))
            if len(places) == PLACES:
                break
        yield list(places.values())


def alone(weights: ExpertWeights, chosen: Sequence[int]) -> ExpertWeights:
    """An expert of some of the neurons, in fp32."""
    rows = list(chosen)
    return replace(
        weights,
        gate=None if weights.gate is None else weights.gate[rows],
        up=weights.up[rows],
        down=weights.down[:, rows],
        gate_bias=None if weights.gate_bias is None else weights.gate_bias[rows],
        up_bias=None if weights.up_bias is None else weights.up_bias[rows],
    ).to(dtype=torch.float32)
