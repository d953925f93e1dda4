"""What the tables of `reroute` say in words."""

from collections.abc import Mapping, Sequence

import pandas as pd

from moescope.analyses.fits import Source
from moescope.analyses.loss_tables import nats, rise_of, rises_of
from moescope.analyses.reroute.ways import ANY_LAYER
from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.runs import Finding


def findings(
    tables: Mapping[str, pd.DataFrame], threshold: float, left_out: Sequence[Source]
) -> list[Finding]:
    """From the tables of the result, the threshold that is compared, and who takes no part."""
    rows = tables["reroute"][tables["reroute"]["domain"] == "all"]
    against, routes = tables["against"], tables["routes"]
    found = [
        _budget(rows[rows["resident"] == number], against[against["resident"] == number], threshold)
        for number in rows["resident"].unique()
    ]
    found += [_verdict(against), *_routes(routes)]
    if left_out:
        names = ", ".join(map(str, left_out))
        text = f"{len(left_out)} experts have too few tokens for adapters and stay: {names}."
        found.append(Finding(text=text))
    return found


def _budget(rows: pd.DataFrame, against: pd.DataFrame, threshold: float) -> Finding:
    own = rows[(rows["way"] == ANY_LAYER) & (rows["threshold"] == threshold)].iloc[0]
    text = (
        f"With {int(own['resident'])} of {int(own['n_experts'])} experts resident and the tokens "
        f"of the others sent to the most similar of them in any layer ({own['rerouted']:.0%} of "
        f"the slots of all {int(own['n_experts'])} rerouted, {own['skipped']:.0%} skipped), the "
        "loss on held-out documents changes by "
        f"{rise_of(own)} nats per token (n = {int(own['n_documents'])} documents, "
        f"{int(own['n_tokens']):,} tokens)"
    )
    stricter = rows[(rows["way"] == ANY_LAYER) & (rows["threshold"] != threshold)]
    others = [
        f"at threshold {row['threshold']:g} {nats(row['difference'])} "
        f"({row['skipped']:.0%} skipped)"
        for _, row in stricter.iterrows()
    ]
    others += [f"{way} {rises_of(rows[rows['way'] == way])}" for way in against["versus"].unique()]
    text += f"; {', '.join(others)}. Resident experts and adapters are "
    text += f"{own['of_parameters']:.0%} of the parameters of these experts."
    numbers = {
        "resident": int(own["resident"]),
        "rise": own["difference"],
        "rerouted": own["rerouted"],
        "skipped": own["skipped"],
        "of_parameters": own["of_parameters"],
    }
    return Finding(text=text, numbers=numbers)


def _verdict(against: pd.DataFrame) -> Finding:
    """In how many budgets rerouting is better and worse than each other way."""
    if against["difference_low"].isna().all():
        text = (
            "Whether rerouting to any layer is better than another way cannot be said: under "
            f"{FEWEST_UNITS} held-out documents."
        )
        return Finding(text=text)
    parts, numbers = [], dict[str, int]()
    for way, rows in against.groupby("versus", sort=False):
        lower, higher = ((rows["verdict"] == verdict).sum() for verdict in ("lower", "higher"))
        parts.append(f"{way}: better in {lower}, worse in {higher} of {len(rows)} budgets")
        numbers |= {f"better_than_{way}": int(lower), f"worse_than_{way}": int(higher)}
    text = (
        f"Rerouting to any layer, against {'; '.join(parts)} (paired by document, and as one "
        "more draw where these are random; p < 0.05 after Holm's correction for all "
        f"{len(against)} comparisons)."
    )
    return Finding(text=text, numbers=numbers)


def _routes(routes: pd.DataFrame) -> list[Finding]:
    if routes.empty:
        return []
    rows = routes.drop_duplicates(["layer", "expert", "to_layer", "to_expert"])
    better = (rows["fvu"] < rows["linear_fvu"]).sum()
    same = (rows["layer"] == rows["to_layer"]).mean()
    text = (
        f"Of {len(rows)} routes, {int(better)} end at an expert that imitates better than a linear "
        f"map without any expert (held-out documents; median FVU {rows['fvu'].median():.2f} "
        f"against {rows['linear_fvu'].median():.2f}); {same:.0%} stay within their layer."
    )
    numbers = {
        "routes": len(rows),
        "better_than_linear": int(better),
        "same_layer": float(same),
    }
    return [Finding(text=text, numbers=numbers)]
