"""Experts merged within their layers, as HC-SMoE does: clusters by mean output, mean weights."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from moescope.analyses.clusters.tree import labels_of, tree_of
from moescope.analyses.fits import Fits, Source
from moescope.analyses.likeness import expert_parameters, tokens_by_expert
from moescope.experts.weights import ExpertWeights
from moescope.models.view import MoEModel


def affordable(model: MoEModel, experts: Sequence[Source], parameters: int) -> dict[int, int]:
    """How many experts each layer may keep: as many in all as so many parameters pay for.

    Equally many, as far as a layer has them; the first layers one more where that does not come out
    even. Empty where that is not one for each.
    """
    of_layer = Counter(expert.layer for expert in experts)
    turns = sorted((turn, layer) for layer, number in of_layer.items() for turn in range(number))
    cost = {expert.layer: expert_parameters(model, [expert]) for expert in experts}
    paid = accumulate(cost[layer] for _, layer in turns)
    kept = Counter(
        layer for (_, layer), total in zip(turns, paid, strict=True) if total <= parameters
    )
    return dict(kept) if len(kept) == len(of_layer) else {}


def merged_experts(
    fits: Fits, experts: Sequence[Source], kept: Mapping[int, int]
) -> dict[Source, ExpertWeights]:
    """What computes the tokens of every expert that shares a cluster with others of its layer.

    HC-SMoE (Chen et al. 2024): experts of a layer are as far apart as their mean outputs over all
    tokens of the layer, wherever these were routed; average linkage; the weights of a cluster are
    the mean of its experts' weights by the number of tokens routed to each. Tokens are the recorded
    ones of the training documents.

    Args:
        fits: Model, capture and training documents.
        experts: Those that take part.
        kept: Number of clusters of each layer.
    """
    tokens = tokens_by_expert(fits.tokens, experts, held_out=False)
    found = dict[Source, ExpertWeights]()
    for layer, size in kept.items():
        own = [expert for expert in experts if expert.layer == layer]
        if size == len(own):
            continue
        means = mean_outputs(fits, own).numpy()
        labels = labels_of(tree_of(squareform(pdist(means))), size)
        for cluster in np.unique(labels):
            members = [e for e, label in zip(own, labels, strict=True) if label == cluster]
            if len(members) > 1:
                weights = _mean_weights(fits, members, [tokens[e] for e in members])
                found |= dict.fromkeys(members, weights)
    return found


def mean_outputs(fits: Fits, experts: Sequence[Source]) -> Float[Tensor, "experts hidden"]:
    """Of experts of one layer, over the recorded tokens of the training documents, in fp32."""
    capture, layer = fits.tokens.capture, fits.material.model.layer(experts[0].layer)
    recorded = capture.inputs(layer.index)
    own = ~fits.tokens.held_out[capture.documents[recorded.tokens]]
    x = recorded.values[own].float()
    return torch.stack([fits.weights(expert)(x).mean(0) for expert in experts])


def _mean_weights(fits: Fits, members: Sequence[Source], tokens: Sequence[int]) -> ExpertWeights:
    layer = fits.material.model.layer(members[0].layer)
    each = [layer.expert_weights(member.expert) for member in members]
    shares = np.array(tokens) / sum(tokens)
    mean = {
        name: sum(
            share * weights.tensors()[name].float()
            for share, weights in zip(shares.tolist(), each, strict=True)
        )
        for name in each[0].tensors()
    }
    return replace(each[0], **{name: t.to(each[0].tensors()[name]) for name, t in mean.items()})
