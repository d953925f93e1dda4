"""What the tables of `routing` say in words."""

from typing import Any

import numpy as np
import pandas as pd

from moescope.analyses.routing.options import RoutingOptions
from moescope.analyses.routing.pairs import MOST_PARTNERS
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.runs import Finding

SIGNIFICANT = 0.05
"""Of p-values after Bonferroni's correction over all that are in the same table."""


def findings(tables: dict[str, pd.DataFrame], options: RoutingOptions) -> list[Finding]:
    """One sentence or two about each table that has rows."""
    return [
        _use(tables["routing"], tables["layers"]),
        *_divergence(tables["divergence"], options),
        *_concentration(tables["concentration"]),
        *_coactivation(tables["coactivation"], tables["layers"]),
        *_transitions(tables["transitions"], tables["layers"]),
        *([] if tables["divergence"].empty else _logits(tables["logits"])),
    ]


def _place(row: "pd.Series[Any]") -> str:
    return f"layer {row['layer']}" + (" of the encoder" if row["stack"] == "encoder" else "")


def _use(shares: pd.DataFrame, layers: pd.DataFrame) -> Finding:
    chosen = layers[layers["num_experts"] > 1]
    if chosen.empty:
        return Finding(text="One expert per layer takes all tokens: there is no choice.")
    evenness = chosen["entropy_bits"] / chosen["max_entropy_bits"]
    least = chosen.iloc[int(evenness.argmin())]
    every = shares[shares["domain"] == RESERVED_DOMAIN]
    unused = int((every["tokens"] == 0).sum())
    text = (
        f"Expert use is least even in {_place(least)}: its entropy is {evenness.min():.1%} of the "
        f"maximum ({evenness.mean():.1%} on average over {len(chosen)} layers). "
        f"{unused} of {len(every)} experts were never used on this text."
    )
    numbers = {
        "layer": int(least["layer"]),
        "relative_entropy": float(evenness.min()),
        "unused_experts": unused,
    }
    return Finding(text=text, numbers=numbers)


def _divergence(divergence: pd.DataFrame, options: RoutingOptions) -> list[Finding]:
    if divergence.empty:
        return [Finding(text="One domain only: divergence between domains is not measured here.")]
    fewest = int(divergence["n_documents"].min())
    clear = int((divergence["p_corrected"] <= SIGNIFICANT).sum())
    top = divergence.iloc[int(divergence["excess"].argmax())]
    text = (
        f"Domains are routed apart in {clear} of {len(divergence)} comparisons (layer x pair of "
        f"domains; p <= {SIGNIFICANT} after correction, {options.permutations} shuffles of "
        f"documents). Largest: {top['domain_a']} against {top['domain_b']} in {_place(top)}, "
        f"{top['js_bits']:.3f} bits where shuffled documents give {top['null_mean']:.3f} (95th "
        f"percentile {top['null_p95']:.3f}; {top['n_tokens']} tokens a side)."
    )
    numbers = {"clear": clear, "comparisons": len(divergence), "js_bits": float(top["js_bits"])}
    found = [Finding(text=text, numbers=numbers)]
    if len(divergence) / (1 + options.permutations) > SIGNIFICANT:
        found.append(
            Finding(text="Too few shuffles for this many comparisons: raise --permutations.")
        )
    if fewest < FEWEST_UNITS:
        found.append(Finding(text=f"Some comparisons rest on {fewest} documents only."))
    return found


def _concentration(table: pd.DataFrame) -> list[Finding]:
    chosen = table[(table["domain"] != RESERVED_DOMAIN) & (table["n_tokens"] > 0)]
    chosen = chosen[chosen["num_experts"] > chosen["top_k"]]
    if chosen.empty:
        return []
    excess = chosen["busiest_k_share"] - chosen["uniform"]
    top = chosen.iloc[int(excess.argmax())]
    text = (
        f"Routing is most concentrated for {top['domain']} in {_place(top)}: the {top['top_k']} "
        f"busiest of {top['num_experts']} experts take {top['busiest_k_share']:.1%} of it"
        f"{_limits(top, 'busiest_k_low', 'busiest_k_high', '.1%')}, where an even load would give "
        f"{top['uniform']:.1%}; {top['experts_for_half']} take half ({top['n_tokens']:,} tokens of "
        f"{top['n_documents']} documents)."
    )
    numbers = {
        "busiest_k_share": float(top["busiest_k_share"]),
        "experts_for_half": int(top["experts_for_half"]),
    }
    return [Finding(text=text, numbers=numbers)]


def _coactivation(table: pd.DataFrame, layers: pd.DataFrame) -> list[Finding]:
    if table.empty:
        return []
    one, other = table["expert"], table["other"]
    ordered = table.assign(expert=np.minimum(one, other), other=np.maximum(one, other))
    pairs = ordered.drop_duplicates(["stack", "layer", "expert", "other"])
    said = "Experts {expert} and {other} of {place} share a token"
    return _pairs(pairs, said, whole=int(layers["num_experts"].max()) - 1 <= MOST_PARTNERS)


def _transitions(table: pd.DataFrame, layers: pd.DataFrame) -> list[Finding]:
    if table.empty:
        return []
    said = (
        "Tokens of expert {expert} of {place} go on to expert {next_expert} of layer {next_layer}"
    )
    return _pairs(table, said, whole=int(layers["num_experts"].max()) <= MOST_PARTNERS)


def _pairs(table: pd.DataFrame, said: str, *, whole: bool) -> list[Finding]:
    """The pair of the largest lower limit, and how many are apart from chance, if limits exist.

    Args:
        table: Pairs of experts, each once.
        said: What the two of a pair do, with gaps for columns.
        whole: Whether these are all pairs; else those furthest from chance.
    """
    measured = table[table["low"].notna()]
    if measured.empty:
        return []
    top = measured.iloc[int(measured["low"].argmax())]
    apart = int(((measured["low"] > 1) | (measured["high"] < 1)).sum())
    text = (
        f"{said.format(place=_place(top), **top)} {top['lift']:.2f} times as often as chance would "
        f"have it{_limits(top, 'low', 'high', '.2f')}, in {top['tokens']:,} tokens; that is the "
        "pair of the largest lower limit, the best of many."
    )
    if whole:
        text += (
            f" Of {len(measured)} pairs {apart} have a 95% interval without 1; if all were "
            "independent, about one in twenty would."
        )
    numbers = {"lift": float(top["lift"]), "apart": apart, "pairs": len(measured)}
    return [Finding(text=text, numbers=numbers)]


def _logits(table: pd.DataFrame) -> list[Finding]:
    top = table.iloc[int(table["between_domains"].argmax())]
    clear = int((table["p_corrected"] <= SIGNIFICANT).sum())
    text = (
        f"Router logits lie apart by domain in {clear} of {len(table)} layers (p <= {SIGNIFICANT} "
        f"after correction); most in {_place(top)}, where {top['between_domains']:.1%} of their "
        f"variance lies between domains and {top['null_mean']:.1%} between shuffled ones "
        f"({top['n_tokens']} tokens of {top['n_documents']} documents)."
    )
    numbers = {"between_domains": float(top["between_domains"]), "clear": clear}
    return [Finding(text=text, numbers=numbers)]


def _limits(row: "pd.Series[Any]", low: str, high: str, number: str) -> str:
    """The 95% interval in brackets, if there is one."""
    if not np.isfinite(float(row[low])):
        return ""
    return f" ({row[low]:{number}} to {row[high]:{number}})"
