"""Whether neurons of the same number in several experts belong together, as in converted models."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moescope.analyses.neurons.reading import activations, alone
from moescope.captures.read import Recorded
from moescope.measures.activations import SameIndex, same_index
from moescope.measures.dyadic import pair_mean, within
from moescope.models.view import MoELayer

_TOKENS = 512
_PAIRINGS = 199
_VALUES = 1 << 26  # of the neurons of all experts that are compared


def agreement_rows(
    layer: MoELayer, samples: Mapping[int, Recorded], seed: int
) -> list[dict[str, Any]]:
    """Cosine of gate rows, and correlation of activations at the same tokens.

    Tokens are as many of each expert's own, at random, and all experts compute all of them. Of
    large layers the neurons are a random part, the same numbers in every expert.

    Returns:
        One row per measure, `gate` and `activation`: mean over pairs of experts of the same number
        (`same`, with its 95% limits over experts), of different numbers (`other`), and for
        activations of experts renumbered at random; none with a single expert.
    """
    experts, random = list(samples), np.random.default_rng(seed)
    if len(experts) < 2:
        return []
    most = max(2, _VALUES // (len(experts) * layer.hidden_size))
    chosen = np.sort(random.permutation(layer.intermediate_size)[:most]).tolist()
    x = _common(samples, random)
    gates, found = [], []
    for expert in experts:
        weights = alone(layer.expert_weights(expert), chosen)
        gates.append(weights.up if weights.gate is None else weights.gate)
        values, _ = activations(weights, x.to(weights.up.device))
        found.append((values - values.mean(0)).mT.contiguous())
    facts = {"stack": layer.stack, "layer": layer.index, "num_experts": len(experts)}
    facts |= {"neurons": len(chosen), "n_tokens": len(x), "seed": seed}
    return [
        {**facts, "measure": "gate", **_columns(same_index(gates, draws=0, seed=seed))},
        {
            **facts,
            "measure": "activation",
            **_columns(same_index(found, draws=_PAIRINGS, seed=seed)),
        },
    ]


def _common(
    samples: Mapping[int, Recorded], random: np.random.Generator
) -> Float[Tensor, "tokens hidden"]:
    """As many tokens of every expert."""
    each = max(1, _TOKENS // len(samples))
    parts: Sequence[Tensor] = [
        recorded.values[torch.from_numpy(random.permutation(len(recorded.tokens))[:each])]
        for recorded in samples.values()
    ]
    return torch.cat(list(parts)).float()


def _columns(found: SameIndex) -> dict[str, Any]:
    same, other = (pair_mean(within(values), same=True) for values in (found.same, found.other))
    columns = {"same": same.mean, "same_low": same.low, "same_high": same.high}
    columns |= {"other": other.mean, "n_pairs": same.n_pairs}
    if len(found.paired):
        reached = (found.paired >= same.mean - 1e-12).sum()
        columns |= {
            "null_p95": float(np.quantile(found.paired, 0.95)),
            "p_value": (1 + int(reached)) / (1 + len(found.paired)),
        }
    return columns
