"""What `outputs` keeps of a layer, as tables."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int64

from moescope.analyses.outputs.one_pass import MEASURES, Measured, Recorded
from moescope.evaluate.totals import Resampling, counts, difference_columns
from moescope.measures.bootstrap import ratio_interval
from moescope.measures.jackknife import limits
from moescope.measures.outputs import (
    KINDS,
    longest_chosen,
    longest_share,
    partial_rank_correlations,
    rank_correlations,
    rank_counts,
)
from moescope.models.view import MoELayer

CONTRAST = "chosen_minus_not"
"""Of a token: the mean over pairs of chosen experts less that over pairs of the others."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Scope:
    """Some of the tokens of a layer."""

    name: str
    """`all`; `first`, the first positions of rows and documents; `later`, the others."""
    tokens: Bool[np.ndarray, " tokens"]
    """Which."""
    owners: Int64[np.ndarray, " some"]
    """Their documents, from 0 without gaps."""


def scopes(recorded: Recorded) -> Iterator[Scope]:
    """All tokens, first positions alone, and all others."""
    first = recorded.first.numpy()
    for name, tokens in (("all", np.ones_like(first)), ("first", first), ("later", ~first)):
        owners = np.unique(recorded.documents.numpy()[tokens], return_inverse=True)[1]
        yield Scope(name=name, tokens=tokens, owners=owners)


def layer_tables(
    layer: MoELayer, recorded: Recorded, measured: Measured, resampling: Resampling
) -> dict[str, pd.DataFrame]:
    """`outputs`, `pairs`, `norms`, `experts` and `ranks` of one layer."""
    similarity: list[dict[str, object]] = []
    norms: list[dict[str, object]] = []
    experts = []
    for scope in scopes(recorded):
        similarity += _similarity(measured, scope, resampling)
        norms += _norms(recorded, measured, scope, resampling)
        experts.append(_experts(recorded, measured, scope, resampling))
    tables = {
        "outputs": pd.DataFrame(similarity),
        "pairs": _pairs(measured),
        "norms": pd.DataFrame(norms),
        "experts": pd.concat(experts, ignore_index=True),
        "ranks": _ranks(recorded, measured, resampling.seed),
    }
    for table in tables.values():
        table.insert(0, "stack", layer.stack)
        table.insert(1, "layer", layer.index)
    return tables


def mean_over_tokens(
    values: Float[np.ndarray, " tokens"],
    owners: Int64[np.ndarray, " tokens"],
    resampling: Resampling,
) -> dict[str, object]:
    """Mean of one value per token, with its 95% interval over documents; NaN is no token."""
    there = np.isfinite(values)
    frame = pd.DataFrame({"tokens": 1, "value": values[there].astype(float)})
    documents = frame.groupby(owners[there]).sum()
    return difference_columns(documents, "value", resampling) | _basis(documents, resampling)


def partial_over_tokens(
    scores: Float[np.ndarray, "tokens experts"],
    norms: Float[np.ndarray, "tokens experts"],
    owners: Int64[np.ndarray, " tokens"],
    resampling: Resampling,
) -> dict[str, object]:
    """Partial correlation of ranks over all tokens, with its 95% interval over documents."""
    estimates = partial_rank_correlations(scores, norms, owners)
    low, high = (float(limit) for limit in limits(estimates))
    basis = _basis(pd.DataFrame({"tokens": np.bincount(owners)}), resampling)
    if not np.isfinite(estimates[0]):
        basis["status"] = "undefined"
    return {"value": float(estimates[0]), "value_low": low, "value_high": high} | basis


def _basis(documents: pd.DataFrame, resampling: Resampling) -> dict[str, object]:
    """Columns that say what a row rests on; `undefined` where no token counts."""
    basis = counts(documents, resampling)
    return basis if len(documents) else basis | {"status": "undefined"}


def _similarity(
    measured: Measured, scope: Scope, resampling: Resampling
) -> Iterator[dict[str, object]]:
    for measure, kinds in zip(MEASURES, measured.by_kind.numpy(), strict=True):
        by_kind = dict(zip(KINDS, kinds, strict=True))
        by_kind[CONTRAST] = by_kind["both_chosen"] - by_kind["none_chosen"]
        for kind, values in by_kind.items():
            row = {"tokens": scope.name, "pairs": kind, "measure": measure}
            yield row | mean_over_tokens(values[scope.tokens], scope.owners, resampling)


def _norms(
    recorded: Recorded, measured: Measured, scope: Scope, resampling: Resampling
) -> Iterator[dict[str, object]]:
    """Whether the router prefers long outputs."""
    scores = recorded.scores.numpy()[scope.tokens]
    norms = measured.norms.numpy()[scope.tokens]
    chosen = recorded.chosen.numpy()[scope.tokens]
    used = chosen[chosen.any(1)]
    chance = float(used.mean()) if len(used) else np.nan
    by_token = {
        "spearman": (0.0, rank_correlations(scores, norms)),
        "hit_rate": (chance, longest_chosen(norms, chosen)),
    }
    for measure, (expected, values) in by_token.items():
        row = {"tokens": scope.name, "measure": measure, "chance": expected}
        yield row | mean_over_tokens(values, scope.owners, resampling)
    row = {"tokens": scope.name, "measure": "partial", "chance": 0.0}
    yield row | partial_over_tokens(scores, norms, scope.owners, resampling)


def _experts(
    recorded: Recorded, measured: Measured, scope: Scope, resampling: Resampling
) -> pd.DataFrame:
    """Mean norm of each expert, and how often it is the longest and is used."""
    norms = measured.norms.numpy()[scope.tokens].astype(float)
    tokens = np.bincount(scope.owners).astype(float)
    sums = np.zeros((len(tokens), norms.shape[1]))
    np.add.at(sums, scope.owners, norms)
    low, high = ratio_interval(sums, tokens, resamples=resampling.resamples, seed=resampling.seed)
    return pd.DataFrame(
        {
            "tokens": scope.name,
            "expert": np.arange(norms.shape[1]),
            "mean_norm": norms.mean(0) if len(norms) else np.nan,
            "mean_norm_low": low,
            "mean_norm_high": high,
            "longest": longest_share(norms).mean(0) if len(norms) else np.nan,
            "chosen": recorded.chosen.numpy()[scope.tokens].mean(0) if len(norms) else np.nan,
        }
        | _basis(pd.DataFrame({"tokens": tokens}), resampling)
    )


def _pairs(measured: Measured) -> pd.DataFrame:
    """Every pair of experts."""
    first, second = np.triu_indices(measured.norms.shape[1], k=1)
    columns: dict[str, object] = {"expert": first, "other_expert": second}
    for name, matrices in measured.pairs.items():
        prefix = "" if name == "all" else f"{name}_"
        for measure, matrix in zip(MEASURES, matrices.numpy(), strict=True):
            columns[prefix + measure] = matrix[first, second]
    return pd.DataFrame(columns)


def _ranks(recorded: Recorded, measured: Measured, seed: int) -> pd.DataFrame:
    """Counts of ranks of score and norm, from the smallest, and shares of each score's rank."""
    found = rank_counts(recorded.scores.numpy(), measured.norms.numpy(), seed=seed)
    number = len(found)
    score_ranks, norm_ranks = np.divmod(np.arange(number**2), number)
    return pd.DataFrame(
        {
            "score_rank": score_ranks + 1,
            "norm_rank": norm_ranks + 1,
            "count": found.ravel(),
            "share": (found / found.sum(1, keepdims=True)).ravel(),
        }
    )
