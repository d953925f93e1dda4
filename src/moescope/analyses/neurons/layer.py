"""Everything about the neurons of one layer; its experts pass one at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy import ndarray as Array
from torch import Tensor

from moescope.analyses.neurons.agreement import agreement_rows
from moescope.analyses.neurons.options import NeuronsOptions
from moescope.analyses.neurons.reading import (
    Units,
    activities,
    alone,
    reach,
    typical_places,
    with_parameters,
)
from moescope.analyses.neurons.selective import Tested, shown
from moescope.captures.places import Place
from moescope.captures.read import Capture, Recorded
from moescope.measures.activations import FEWEST_TOKENS, Activity, quantiles
from moescope.measures.bootstrap import FEWEST_UNITS, ratio_interval
from moescope.models.view import MoELayer

_LEVELS = {"q05": 0.05, "q50": 0.5, "q95": 0.95}


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerFound:
    """What one layer gives to the tables."""

    layer: dict[str, Any]
    """Row of the layer."""
    experts: list[dict[str, Any]]
    """Rows of its experts."""
    candidates: pd.DataFrame
    """Its most selective neurons for each domain."""
    chosen: pd.DataFrame
    """The same by half of the documents: those to be ablated while the other half is read."""
    agreement: list[dict[str, Any]]
    """Rows about neurons of the same number."""
    places: list[dict[str, Any]]
    """Where those that are shown are most active."""
    norms: dict[int, Float[Array, " neurons"]]
    """By expert the mean norm of what each neuron adds."""
    reach: Float[Array, "domains experts"]
    """Share of the tokens of each domain that are routed to each expert."""


def measure_layer(
    capture: Capture, layer: MoELayer, units: Units, options: NeuronsOptions
) -> LayerFound:
    """Read the experts' own samples of a layer once.

    Raises:
        CaptureError: There are none, or no inputs.
    """
    samples = capture.expert_samples(layer.index, with_parameters(layer))
    documents_of = capture.documents.numpy()
    of_token = torch.from_numpy(units.of)[capture.documents]
    place = {"stack": layer.stack, "layer": layer.index}
    parts = [np.ones(len(units.domain_of), dtype=bool), units.chosen_on()]
    parts = parts[: (2 if options.tokens else 1) if units.known().sum() > 1 else 0]
    tests = [Tested(units, some, options, Place.of(layer).number) for some in parts]
    every, rows = _Sums(), []
    norms: dict[int, Array] = {}
    passing = activities(layer, samples, of_token, len(units.domain_of), options.threshold)
    for expert, activity, norms[expert] in passing:
        documents = len(np.unique(documents_of[samples[expert].tokens]))
        row = _activity_columns(_Sums(activity), options) | {"n_documents": documents}
        rows.append({**place, "expert": expert, **row})
        every.add(activity)
        if activity.tokens.sum() > 0:
            for tested in tests:
                tested.add(expert, activity, norms[expert])
    all_tokens = torch.cat([recorded.tokens for recorded in samples.values()])
    found = {**place, "num_experts": len(samples), **_activity_columns(every, options)}
    found["n_documents"] = len(np.unique(documents_of[all_tokens]))
    seen_by = reach(capture, layer.index)
    stand_out = [
        tested.candidates(capture.domains, seen_by).assign(**place)
        for tested in tests
        if tested.experts
    ]
    places = list[dict[str, Any]]()
    if stand_out:
        found |= tests[0].layer_columns()
        places = _place_rows(layer, shown(stand_out[0], options.show), samples, capture.documents)
    return LayerFound(
        layer=found,
        experts=rows,
        candidates=stand_out[0] if stand_out else pd.DataFrame(),
        chosen=stand_out[1] if len(stand_out) > 1 else pd.DataFrame(),
        agreement=agreement_rows(layer, samples, options.seed),
        places=places,
        norms=norms,
        reach=seen_by,
    )


def _place_rows(
    layer: MoELayer,
    listed: pd.DataFrame,
    samples: Mapping[int, Recorded],
    documents: Int[Tensor, " tokens"],
) -> list[dict[str, Any]]:
    """Where the listed neurons are most active."""
    rows = []
    for expert in listed["expert"].unique().tolist():
        chosen = listed[listed["expert"] == expert]["neuron"].tolist()
        weights = alone(layer.expert_weights(expert), chosen)
        every = typical_places(weights, samples[expert], documents)
        for neuron, places in zip(chosen, every, strict=True):
            names = {"stack": layer.stack, "layer": layer.index, "expert": expert}
            rows += [
                {**names, "neuron": neuron, "rank": rank, "position": token, "activation": value}
                for rank, (token, value) in enumerate(places, start=1)
            ]
    return rows


class _Sums:
    """Sums over the experts of a layer, or over one."""

    def __init__(self, *activities: Activity) -> None:
        self.active: Any = 0
        self.emitting: Any = 0
        self.possible: Any = 0
        self.tokens: Any = 0
        self.histogram: Any = 0
        self.neurons = self.judged = self.dead = 0
        for activity in activities:
            self.add(activity)

    def add(self, activity: Activity) -> None:
        """Add those of an expert."""
        neurons, tokens = len(activity.firing), activity.tokens.cpu().numpy()
        self.active = self.active + activity.active.cpu().numpy()
        self.emitting = self.emitting + activity.emitting.cpu().numpy()
        self.possible = self.possible + tokens * neurons
        self.tokens = self.tokens + tokens
        self.histogram = self.histogram + activity.histogram.cpu()
        self.neurons += neurons
        if tokens.sum() >= FEWEST_TOKENS:
            self.judged += neurons
            self.dead += int((activity.firing == 0).sum())


def _activity_columns(sums: _Sums, options: NeuronsOptions) -> dict[str, Any]:
    tokens, units = int(sums.tokens.sum()), int((sums.tokens > 0).sum())
    share, low, high = _share(sums.active, sums.possible, options)
    status = "ok" if units >= FEWEST_UNITS else "few_documents"
    if not sums.judged:
        status = "few_tokens" if tokens else "no_tokens"
    return {
        "active": share,
        "active_low": low,
        "active_high": high,
        "emitting": sums.emitting.sum() / sums.possible.sum() if tokens else np.nan,
        **dict(zip(_LEVELS, quantiles(sums.histogram, list(_LEVELS.values())), strict=True)),
        "neurons": sums.neurons,
        "judged": sums.judged,
        "dead": sums.dead,
        "n_tokens": tokens,
        "status": status,
        "seed": options.seed,
    }


def _share(
    active: Float[Array, " units"], possible: Float[Array, " units"], options: NeuronsOptions
) -> tuple[float, float, float]:
    """With 95% limits over documents, made from the rarer of the two: active, or not."""
    present = possible > 0
    if not present.any():
        return np.nan, np.nan, np.nan
    share = active.sum() / possible.sum()
    turned = share > 0.5
    counted = (possible - active if turned else active)[present, None]
    (low,), (high,) = ratio_interval(
        counted, possible[present], resamples=options.bootstrap, seed=options.seed
    )
    return (share, 1 - high, 1 - low) if turned else (share, low, high)
