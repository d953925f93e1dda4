"""What the tables of `routing` say in words."""

from typing import Any

import numpy as np
import pandas as pd

from moescope.analyses.routing_options import RoutingOptions
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
        *_coactivation(tables["coactivation"]),
        *_transitions(tables["transitions"]),
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


def _coactivation(table: pd.DataFrame) -> list[Finding]:
    if table.empty:
        return []
    once = table[table["expert"] < table["other"]]
    top = once.iloc[int(once["low"].fillna(0).argmax())]
    said = f"Experts {top['expert']} and {top['other']} of {_place(top)} share a token"
    return _pairs(once, top, said)


def _transitions(table: pd.DataFrame) -> list[Finding]:
    if table.empty:
        return []
    top = table.iloc[int(table["low"].fillna(0).argmax())]
    said = (
        f"Tokens of expert {top['expert']} of {_place(top)} go on to expert {top['next_expert']} "
        f"of layer {top['next_layer']}"
    )
    return _pairs(table, top, said)


def _pairs(table: pd.DataFrame, top: "pd.Series[Any]", said: str) -> list[Finding]:
    """The pair most surely above chance, and how many are apart from it; none without intervals."""
    if not np.isfinite(float(top["low"])):
        return []
    apart = int(((table["low"] > 1) | (table["high"] < 1)).sum())
    text = (
        f"{said} {top['lift']:.2f} times as often as chance would have it"
        f"{_limits(top, 'low', 'high', '.2f')}, in {top['tokens']:,} tokens: the pair most surely "
        f"above chance. Of {len(table)} pairs {apart} have a 95% interval without 1; if all were "
        "independent, about one in twenty would."
    )
    numbers = {"lift": float(top["lift"]), "apart": apart, "pairs": len(table)}
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
