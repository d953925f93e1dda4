"""Tables of `ood`."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import pandas as pd

from moescope.analyses.ood.fits import Trained
from moescope.analyses.ood.losses import ABLATED
from moescope.analyses.ood.matrices import Matrix
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.evaluate.totals import Resampling
from moescope.measures.bootstrap import ratio_interval


def errors_of(trained: Sequence[Trained]) -> pd.DataFrame:
    """Squared errors by document of all sources; those of random experts are their mean."""
    frames = [one.read().assign(source=str(one.source), half=one.tested) for one in trained]
    found = pd.concat(frames, ignore_index=True)
    found["adapter"] = found["adapter"].str.rstrip("0123456789")
    keys = ["source", "half", "target", "n_train", "adapter", "trained_on", "tested_on", "document"]
    return found.groupby(keys, as_index=False, sort=False)[["tokens", "error", "total"]].mean()


def tables(
    errors: pd.DataFrame,
    losses: pd.DataFrame | None,
    domains: Sequence[str],
    resampling: Resampling,
) -> dict[str, pd.DataFrame]:
    """Domain by domain: errors and rises of the loss, differences, and single pairs of experts."""
    basis = {
        "n_sources": errors["source"].nunique(),
        "least_train": int(errors["n_train"].min()),
        "most_train": int(errors["n_train"].max()),
        "seed": resampling.seed,
    }
    matrices = dict(_matrices(errors, losses, domains))
    rows, differences, controls = [], [], []
    for (quantity, adapter), matrix in matrices.items():
        place = {"quantity": quantity, "adapter": adapter}
        rows += [place | row | basis for row in matrix.values()]
        differences += [place | row | basis for row in matrix.differences()]
        if adapter != "real":
            place = {"quantity": quantity, "control": adapter}
            controls += [place | row | basis for row in matrices[quantity, "real"].less(matrix)]
    table = pd.DataFrame(rows)
    if losses is not None:
        table = pd.concat([table, _ablated(losses, domains, basis)], ignore_index=True)
    return {
        "ood": table,
        "differences": pd.DataFrame(differences),
        "controls": pd.DataFrame(controls),
        "pairs": _pairs(errors, domains, resampling),
    }


def _matrices(
    errors: pd.DataFrame, losses: pd.DataFrame | None, domains: Sequence[str]
) -> Iterator[tuple[tuple[str, str], Matrix]]:
    """By quantity and adapter."""
    for adapter, rows in errors.groupby("adapter", sort=False):
        yield ("fvu", str(adapter)), Matrix.of(rows, domains, "error", "total")
    if losses is not None:
        fitted = losses[losses["adapter"] != ABLATED]
        for adapter, rows in fitted.groupby("adapter", sort=False):
            yield ("loss", str(adapter)), Matrix.of(rows, domains, "rise", "tokens")


def _ablated(
    losses: pd.DataFrame, domains: Sequence[str], basis: Mapping[str, Any]
) -> pd.DataFrame:
    """Rise of the loss without the source expert: one row per domain."""
    rows = losses[losses["adapter"] == ABLATED]
    every = [rows.assign(trained_on=domain) for domain in (*domains, RESERVED_DOMAIN)]
    found = pd.DataFrame(Matrix.of(pd.concat(every), domains, "rise", "tokens").values())
    found = found[found["trained_on"] == RESERVED_DOMAIN].assign(trained_on="none")
    return found.assign(quantity="loss", adapter=ABLATED, **basis)


def _pairs(errors: pd.DataFrame, domains: Sequence[str], resampling: Resampling) -> pd.DataFrame:
    """FVU of every source expert alone; halves of the documents may have chosen two targets."""
    rows = []
    for (source, adapter), own in errors.groupby(["source", "adapter"], sort=False):
        for trained, tested in product((*domains, RESERVED_DOMAIN), domains):
            here = own[(own["trained_on"] == trained) & (own["tested_on"] == tested)]
            sums, total = here[["error"]].to_numpy(), here["total"].to_numpy()
            low, high = ratio_interval(
                sums, total, resamples=resampling.resamples, seed=resampling.seed
            )
            rows.append(
                {"source": source, "targets": ", ".join(map(str, sorted(own["target"].unique())))}
                | {"adapter": adapter, "trained_on": trained, "tested_on": tested}
                | {"fvu": float(sums.sum() / total.sum())}
                | {"fvu_low": float(low[0]), "fvu_high": float(high[0])}
                | {"n_train": int(here["n_train"].iloc[0]), "n_tokens": int(here["tokens"].sum())}
                | {"n_documents": len(here), "seed": resampling.seed}
            )
    return pd.DataFrame(rows)
