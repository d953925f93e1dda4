"""What the tables of `clusters` say in words."""

from collections.abc import Mapping, Sequence

import pandas as pd

from moescope.analyses.clusters.sharing import DEPTH, MERGED, RANDOM, WITHIN
from moescope.analyses.clusters.stability import OTHER_DOCUMENTS, OTHER_SEED
from moescope.analyses.clusters.stability import RANDOM as RANDOM_EXPERTS
from moescope.analyses.fits import Source
from moescope.analyses.loss_tables import rise_of, rises_of
from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.runs import Finding


def findings(tables: Mapping[str, pd.DataFrame], left_out: Sequence[Source]) -> list[Finding]:
    """From the tables of the result, and the experts without enough tokens."""
    shared, against = tables["shared"], tables["against"]
    found = [_nearest(tables["members"]), *_stability(tables["stability"])]
    found.append(_silhouette(tables["clusters"]))
    for kept in against["kept"].unique():
        cut = tables["clusters"][tables["clusters"]["clusters"] == kept]
        found.append(_size(shared, against[against["kept"] == kept], cut))
    if left_out:
        names = ", ".join(map(str, left_out))
        text = f"{len(left_out)} experts have too few tokens for adapters and stay: {names}."
        found.append(Finding(text=text))
    return found


def _nearest(members: pd.DataFrame) -> Finding:
    better = members["nearest_fvu"] < members["linear_fvu"]
    text = (
        f"Of {len(members)} experts, {int(better.sum())} are imitated by their most similar expert "
        "of any layer, behind its adapter, better than by a linear map without any expert. "
        f"Median FVU on held-out documents: {members['nearest_fvu'].median():.2f} for the expert, "
        f"{members['linear_fvu'].median():.2f} for the linear map (1: as bad as a constant)."
    )
    numbers = {
        "experts": len(members),
        "better_than_linear": int(better.sum()),
        "nearest_fvu_median": members["nearest_fvu"].median(),
        "linear_fvu_median": members["linear_fvu"].median(),
    }
    return Finding(text=text, numbers=numbers)


def _silhouette(table: pd.DataFrame) -> Finding:
    best = table[table["best"]].iloc[0]
    text = (
        f"The largest silhouette, {best['silhouette']:.2f}, is that of {int(best['clusters'])} "
        f"clusters of {int(best['n_experts'])} experts. With the errors of each expert dealt out "
        f"to the others at random, {int(best['permutations'])} times, so that how easy each is to "
        "imitate and how well each imitates stay what they are, the 95% quantile is "
        f"{best['null_high']:.2f} there (p = {best['p_value']:.2g} for the largest over all "
        "numbers of clusters). "
    )
    if best["p_value"] < 0.05:
        text += "Some experts are thus more alike than that explains."
    else:
        text += "Clusters beyond what that explains are not shown."
    numbers = {
        "clusters": int(best["clusters"]),
        "silhouette": best["silhouette"],
        "p_value": best["p_value"],
    }
    return Finding(text=text, numbers=numbers)


def _stability(table: pd.DataFrame) -> list[Finding]:
    """Whether clusters are the same elsewhere, and more so than those of random experts."""
    if table.empty:
        return [Finding(text="Whether the clusters are stable was not measured.")]
    chosen = table[table["chosen"]]
    compared = {str(row["comparison"]): row for _, row in chosen.iterrows()}
    if OTHER_DOCUMENTS not in compared:
        return [Finding(text="Too few experts have tokens enough in both halves of the documents.")]
    own = compared[OTHER_DOCUMENTS]
    random = chosen[chosen["comparison"] == RANDOM_EXPERTS]["ari"]
    text = (
        f"{int(own['n_experts'])} experts clustered on two disjoint halves of the training "
        f"documents: adjusted Rand index {own['ari']:.2f} at {int(own['clusters'])} clusters "
        f"(95% quantile with the errors of each expert dealt out to the others "
        f"{own['null_high']:.2f}, p = {own['p_value']:.2g})"
    )
    if len(random):
        least, most = f"{random.min():.2f}", f"{random.max():.2f}"
        text += "; with random experts in the place of all targets on the second half "
        text += least if len(random) == 1 else f"{least} to {most} ({len(random)} draws)"
    if OTHER_SEED in compared:
        seed = compared[OTHER_SEED]
        text += (
            f"; with another seed of the fits {seed['ari']:.2f}, {int(seed['clusters'])} clusters"
        )
    doubts = []
    if own["p_value"] >= 0.05:
        doubts.append(f"errors dealt out agree as well in {own['p_value']:.0%} of cases")
    if (random >= own["ari"]).any():
        doubts.append("clusters of random experts agree as well")
    verdict = "The clusters are stable, and more so than those of random experts in any draw."
    if doubts:
        verdict = f"Stable clusters are not shown: {' and '.join(doubts)}."
    numbers = {
        "ari": own["ari"],
        "clusters": int(own["clusters"]),
        "p_value": own["p_value"],
        "random_most": random.max(),
        "stable": int(not doubts),
    }
    return [Finding(text=f"{text}. {verdict}", numbers=numbers)]


def _size(shared: pd.DataFrame, against: pd.DataFrame, cut: pd.DataFrame) -> Finding:
    """What one size costs, and against what."""
    kept = int(against["kept"].iloc[0])
    rows = shared[(shared["domain"] == "all") & (shared["kept"] == kept)]
    own = rows[rows["variant"] == DEPTH].iloc[0]
    text = (
        f"With {kept} experts kept over all layers and adapters for the others "
        f"({own['of_parameters']:.0%} of the parameters of the experts), the loss on held-out "
        f"documents changes by {rise_of(own)} nats per token (n = {int(own['n_documents'])} "
        f"documents, {int(own['n_tokens']):,} tokens)"
    )
    others = [
        f"{variant} {rises_of(each)}, {each['of_parameters'].mean():.0%}"
        for variant, each in rows.groupby("variant", sort=False)
        if variant != DEPTH
    ]
    text += f"; {'; '.join(others)}."
    verdicts = {
        "lower": "loses less than",
        "higher": "loses more than",
        "open": "is not shown to differ from",
    }
    said = [
        f"{words} {', '.join(against[against['verdict'] == verdict]['versus'])}"
        for verdict, words in verdicts.items()
        if (against["verdict"] == verdict).any()
    ]
    if said:
        text += (
            " Paired by document (and as one more draw, where these are random; p < 0.05 after "
            "Holm's correction for all sizes and variants), sharing over all layers "
            f"{'; '.join(said)}."
        )
    else:
        text += f" No intervals: under {FEWEST_UNITS} documents."
    if len(cut):
        row = cut.iloc[0]
        text += (
            f" Median held-out FVU of the {int(row['could_go'])} stand-ins: "
            f"{row['fvu_median']:.2f}, of linear maps {row['linear_median']:.2f}."
        )
    numbers = {"kept": kept, "rise": own["difference"], "of_parameters": own["of_parameters"]}
    numbers |= {
        f"versus_{name}": row["difference"]
        for name, variant in (("within", WITHIN), ("merged", MERGED), ("random", RANDOM))
        for _, row in against[against["versus"] == variant].iterrows()
    }
    return Finding(text=text, numbers=numbers)
