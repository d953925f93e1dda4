"""Tables of `topk`: losses with intervals, and the number that the study published."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from moescope.analyses.topk.options import Setting
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.evaluate.totals import (
    Resampling,
    Totals,
    counts,
    difference_columns,
    mean_columns,
)

ALL_LAYERS = "all"
"""In tables: every layer restricted at once."""


def loss_table(totals: Mapping[Setting, Totals], resampling: Resampling) -> pd.DataFrame:
    """Loss and its paired difference from the model as it is, by setting and domain."""
    rows = []
    for setting, total in totals.items():
        for domain, documents in total.by_domain():
            row = {"layers": _layers(setting), "weights": setting.weights, "k": setting.k}
            row |= {"domain": domain}
            row |= mean_columns(documents, ["loss"], resampling)
            row |= difference_columns(documents, "difference", resampling)
            rows.append(row | counts(documents, resampling))
    return pd.DataFrame(rows)


def published_table(totals: Mapping[Setting, Totals]) -> pd.DataFrame:
    """Mean of per-document perplexity, and the same stretched to 0 to 1 (MoE Lens, weights as is).

    Returns:
        One row per domain and k from 1; `scaled` is 0 at the lowest mean of the domain, 1 at the
        highest. Empty where the weights as they are were left out.
    """
    rows = []
    for setting, total in totals.items():
        if setting.layer is not None or setting.weights != "as_is" or not setting.k:
            continue
        for domain, documents in total.by_domain():
            if domain == RESERVED_DOMAIN or documents.empty:
                continue
            perplexity = (documents["loss"] / documents["tokens"]).map(np.exp)
            row = {"domain": domain, "k": setting.k, "mean_perplexity": perplexity.mean()}
            row |= {"median_perplexity": perplexity.median(), "n_documents": len(documents)}
            rows.append(row)
    if not rows:
        return pd.DataFrame()
    frame = pd.DataFrame(rows)
    means = frame.groupby("domain")["mean_perplexity"]
    low, high = means.transform("min"), means.transform("max")
    frame.insert(3, "scaled", (frame["mean_perplexity"] - low) / (high - low).where(high > low))
    return frame


def with_loss(cost: pd.DataFrame, losses: pd.DataFrame) -> pd.DataFrame:
    """The cost of each k beside its loss over all domains, by treatment of the weights."""
    chosen = losses[(losses["layers"] == ALL_LAYERS) & (losses["domain"] == RESERVED_DOMAIN)]
    beside = chosen.pivot_table(index="k", columns="weights", values="loss").add_prefix("loss_")
    return cost.merge(beside.reset_index(), on="k")


def _layers(setting: Setting) -> str:
    return ALL_LAYERS if setting.layer is None else str(setting.layer)
