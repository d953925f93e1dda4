"""Sums over the tokens of each document, and the means and intervals that they give."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.errors import CorpusError, ModelError
from moescope.evaluate.predictions import Targets
from moescope.measures.bootstrap import FEWEST_UNITS, ROUNDING, ratio_interval, resampled_counts


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How intervals over documents are drawn."""

    resamples: int
    """Number of resamples of the documents."""
    seed: int
    """Seed of the resamples."""


class Totals:
    """Gathers sums per document; of tokens nothing is kept.

    Args:
        domains: Names of the domains of the corpus.
    """

    def __init__(self, domains: Sequence[str]) -> None:
        self._domains = domains
        # Plain numbers: small arrays kept between the large ones of forward passes would hold on
        # to freed memory, gigabytes of it in a long sweep.
        self._sums: dict[Hashable, dict[Hashable, float]] = {}

    def add(self, targets: Targets, values: Mapping[str, Float[Tensor, " counted"]]) -> None:
        """Add one batch: named values of each target.

        Raises:
            ModelError: Some are not finite.
        """
        for what, each in values.items():
            if not each.isfinite().all():  # sums would leave NaN out
                raise ModelError(
                    f"the {what} of the model is not a number at some tokens",
                    got=f"{int((~each.isfinite()).sum())} of {len(each)} infinite or NaN",
                    remedy="Check its weights with `moescope inspect`, or try another dtype",
                )
        columns = {name: column.double().cpu().numpy() for name, column in values.items()}
        frame = pd.DataFrame({"tokens": 1, **columns})
        documents = [targets.domains.numpy(), targets.documents.numpy()]
        for document, row in frame.groupby(documents).sum().to_dict("index").items():
            sums = self._sums.setdefault(document, dict.fromkeys(row, 0))
            for name, value in row.items():
                sums[name] += value

    def by_domain(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """Sums of each document: of all domains together, then of each domain.

        Columns are tokens and the names that were added.

        Raises:
            CorpusError: No prediction counted.
        """
        documents = pd.DataFrame.from_dict(self._sums, orient="index").sort_index()
        if documents.empty:
            raise CorpusError(
                "the corpus has no prediction that counts: all are at padding, at the first "
                "position of a row or at the end of a document"
            )
        yield RESERVED_DOMAIN, documents
        for number, domain in enumerate(self._domains):
            yield domain, documents[documents.index.get_level_values(0) == number]


def counts(documents: pd.DataFrame, resampling: Resampling) -> dict[str, object]:
    """Columns that say how much a row of a table rests on."""
    return {
        "n_tokens": int(documents.tokens.sum()),
        "n_documents": len(documents),
        "status": "ok" if len(documents) >= FEWEST_UNITS else "few_documents",
        "seed": resampling.seed,
    }


def mean_columns(
    documents: pd.DataFrame, names: Sequence[str], resampling: Resampling
) -> dict[str, float]:
    """Means per token of sums that are not negative, each with its 95% limits over documents."""
    sums, tokens = documents[list(names)].to_numpy(), documents.tokens.to_numpy(dtype=float)
    low, high = ratio_interval(sums, tokens, resamples=resampling.resamples, seed=resampling.seed)
    columns = dict[str, float]()
    for i, name in enumerate(names):
        mean = sums[:, i].sum() / tokens.sum() if len(tokens) else np.nan
        columns |= {name: float(mean), f"{name}_low": float(low[i]), f"{name}_high": float(high[i])}
    return columns


def difference_columns(
    documents: pd.DataFrame, name: str, resampling: Resampling
) -> dict[str, float]:
    """Mean per token of a sum of either sign, with its 95% limits over documents."""
    sums, tokens = documents[name].to_numpy(), documents.tokens.to_numpy(dtype=float)
    mean = sums.sum() / tokens.sum() if len(tokens) else np.nan
    reach = difference_reach(sums, tokens, resampling)
    return {name: float(mean), f"{name}_low": mean - reach, f"{name}_high": mean + reach}


def difference_reach(
    sums: Float[np.ndarray, " documents"],
    tokens: Float[np.ndarray, " documents"],
    resampling: Resampling,
) -> float:
    """Half the width of the 95% interval of a difference per token; NaN under 30 documents.

    The symmetric studentised interval (Hall 1988, sections 3 and 4), as `ratio_interval` has it,
    but without the log, which a difference does not have: q times the linearised standard error,
    q the 95% quantile of `|difference* - difference| / error*` over resampled documents.
    """
    units = len(sums)
    if units < FEWEST_UNITS:
        return np.nan
    residuals = sums - sums.sum() / tokens.sum() * tokens
    generator = np.random.default_rng(resampling.seed)
    drawn = resampled_counts(units, resampling.resamples, generator)
    total = drawn @ tokens
    moved = drawn @ residuals / total
    own = drawn @ residuals**2
    squares = own - 2 * moved * (drawn @ (residuals * tokens)) + moved**2 * (drawn @ tokens**2)
    # A draw whose documents are all alike has no spread but that of rounding, and nothing to say.
    usable = squares > ROUNDING * own
    if not usable.any():
        return 0.0
    errors = np.sqrt(squares.clip(min=0)) / total
    error = np.sqrt(np.square(residuals).sum()) / tokens.sum()
    return float(np.quantile(np.abs(moved[usable]) / errors[usable], 0.95) * error)
