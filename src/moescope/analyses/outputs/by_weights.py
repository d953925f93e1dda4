"""Whether experts with similar weights give similar outputs."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from moescope.analyses.outputs.one_pass import MEASURES, Measured, Recorded
from moescope.analyses.outputs.options import OutputsOptions
from moescope.analyses.weights.pairs import cells_within
from moescope.analyses.weights.reading import ALL, LayerExperts, reading
from moescope.errors import ModelError
from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.measures.dyadic import FEWEST_EXPERTS
from moescope.measures.matching import pairs_alike
from moescope.measures.multiple_tests import holm
from moescope.measures.pair_correlation import (
    PairCorrelation,
    mean_correlation,
    pair_correlation,
)
from moescope.measures.similarity import inner_products
from moescope.models.on_disk import StoredLayers
from moescope.models.view import MoELayer

OF_OUTPUTS = ("cosine", "centred_cosine")
"""Of `MEASURES`; the angle puts pairs in nearly the order of the cosine."""
_FEWEST = 3
"""Experts below which there are no pairs to put in order."""


class Alike(NamedTuple):
    """How alike some experts of a layer are as matrices, by one measure."""

    experts: list[int]
    """Their numbers."""
    values: Float[np.ndarray, "experts experts"]
    """By pair; nothing is said of the diagonal."""


def weights_alike(
    stored: StoredLayers, layer: MoELayer, options: OutputsOptions
) -> dict[str, Alike]:
    """The measures of `weights` for the experts of a layer, of all three matrices together.

    `cosine` and `average` of all experts of one shape; `matched` and `cka` of some of them.
    Nothing where weights are no plain numbers.
    """
    try:
        with reading(stored, layer) as experts:
            return _alike(experts, options)
    except ModelError:
        return {}


def _alike(experts: LayerExperts, options: OutputsOptions) -> dict[str, Alike]:
    summary = experts.summary
    products = {name: inner_products(some, some) for name, some in experts.matrices.items()}
    cells = cells_within(summary, products)
    found = {
        measure: Alike(summary.experts, cells[f"{measure}_{ALL}"])
        for measure in ("cosine", "average")
    }
    random = np.random.default_rng([options.seed, summary.layer])
    some = np.sort(random.permutation(len(summary.experts))[: options.matched])
    pairs = [(int(a), int(b)) for n, a in enumerate(some) for b in some[n + 1 :]]
    if not pairs:
        return found
    matched = pairs_alike(experts.matrices, experts.matrices, pairs)
    numbers = [summary.experts[i] for i in some]
    for measure in ("matched", "cka"):
        values = np.full((len(some), len(some)), np.nan)
        values[np.triu_indices(len(some), 1)] = [getattr(one, measure) for one in matched]
        found[measure] = Alike(numbers, np.fmax(values, values.T))
    return found


class Association(NamedTuple):
    """One measure of weights against one of outputs in one layer."""

    layer: MoELayer
    """Where."""
    weights: str
    """Measure of weights."""
    outputs: str
    """Measure of outputs."""
    tokens: int
    """Tokens behind the outputs."""
    documents: int
    """Documents behind the outputs."""
    found: PairCorrelation
    """Correlation and test."""


def associations(
    layer: MoELayer,
    alike: dict[str, Alike],
    recorded: Recorded,
    measured: Measured,
    options: OutputsOptions,
) -> list[Association]:
    """Every measure of weights against every one of outputs, first positions left out."""
    place = [options.seed, layer.index, int(layer.stack == "encoder")]
    counted = recorded.counted
    basis = int(counted.sum()), len(torch.unique(recorded.documents[counted]))
    return [
        Association(
            layer,
            weights,
            outputs,
            *basis,
            pair_correlation(
                values,
                measured.estimates[:, MEASURES.index(outputs)].numpy()[
                    :, np.array(experts)[:, None], np.array(experts)
                ],
                permutations=options.permutations,
                seed=place,
            ),
        )
        for weights, (experts, values) in alike.items()
        if len(experts) >= _FEWEST
        for outputs in OF_OUTPUTS
    ]


def weight_columns(pairs: pd.DataFrame, alike: dict[str, Alike]) -> dict[str, Any]:
    """Columns of the table of a layer's pairs: how alike they are as matrices."""
    columns = {}
    for measure, (experts, values) in alike.items():
        every = np.full((pairs["other_expert"].max() + 1,) * 2, np.nan)
        every[np.ix_(experts, experts)] = values
        columns[f"weights_{measure}"] = every[pairs["expert"], pairs["other_expert"]]
    return columns


def by_layer(every: list[Association]) -> pd.DataFrame:
    """One row per layer and two measures, with p-values corrected over all of them."""
    rows = [
        {"stack": one.layer.stack, "layer": one.layer.index}
        | _row([one])
        | {"n_tokens": one.tokens, "n_documents": one.documents}
        for one in every
    ]
    return _corrected(rows)


def together(every: list[Association]) -> pd.DataFrame:
    """The mean over the layers of a stack, tested by permuting the experts of all at once."""
    groups: dict[tuple[str, str, str], list[Association]] = {}
    for one in every:
        if np.isfinite(one.found.rho):
            groups.setdefault((one.layer.stack, one.weights, one.outputs), []).append(one)
    rows = [
        {"stack": stack} | _row(some) | {"n_layers": len(some)}
        for (stack, _, _), some in groups.items()
    ]
    return _corrected(rows)


def _row(some: list[Association]) -> dict[str, Any]:
    found = [one.found for one in some]
    mean = mean_correlation(found)
    return (
        {"weights": some[0].weights, "outputs": some[0].outputs}
        | mean._asdict()
        | {
            "n_experts": max(len(one.without_experts) for one in found),
            "n_pairs": sum(one.n_pairs for one in found),
            "permutations": len(found[0].null),
            "status": _status(mean.value, mean.value_low, found[0]),
        }
    )


def _status(value: float, low: float, found: PairCorrelation) -> str:
    if np.isnan(value):
        return "undefined"
    if np.isfinite(low):
        return "ok"
    if len(found.without_experts) < FEWEST_EXPERTS:
        return "few_experts"
    return "few_documents" if len(found.without_documents) < FEWEST_UNITS else "at_limit"


def _corrected(rows: list[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    if len(table):
        table["p_corrected"] = holm(table["p_value"].to_numpy(float))
    return table
