"""Known failures of routing, each held against its null: unbalanced, dead, blind, undecided."""

from dataclasses import replace

import numpy as np
import pandas as pd

from moescope.analyses.health.layer import (
    LEVEL,
    Layer,
    Seen,
    named,
    too_few_domains,
    too_few_shuffles,
)
from moescope.analyses.routing.tables import divergence_rows
from moescope.measures.bootstrap import ratio_interval
from moescope.measures.decisions import common_excess_test, design_effect
from moescope.measures.jackknife import limits, whole_and_left_out
from moescope.measures.routing import busiest_share, entropy_bits

ROUNDING = 2**-8
"""What bf16 rounds a number by: an entropy as near as that to its maximum is not told from it."""
NEXT_TO_NOTHING = 0.02
"""Part of the most that there can be: a router is called blind where no more than that could have
been missed, for a test that finds nothing may have seen too little."""


def unbalanced(layer: Layer) -> Seen:
    """Experts that take more, or less, than K/E in every domain: the router, not the text."""
    counts = layer.counts
    estimates = 2 ** entropy_bits(whole_and_left_out(counts.by_group()))
    low, high = limits(estimates)
    seen = Seen(
        measure="experts that would give this entropy if used alike",
        value=float(estimates[0]),
        reference=float(counts.num_experts),
        low=float(low),
        high=float(np.minimum(high, counts.num_experts)),
    )
    if len(layer.well_known) < 2:
        return replace(seen, obstacle=too_few_domains(layer, "one made for it looks overloaded"))
    domain_of = layer.survey.domain_of[layer.survey.kept]
    inside = np.isin(domain_of, layer.well_known)
    p_values, signs = common_excess_test(
        counts.documents[inside],
        domain_of[inside],
        permutations=layer.options.permutations,
        seed=layer.options.seed,
    )
    p_values = np.minimum(p_values * layer.layers, 1)
    above, below = (np.flatnonzero((p_values <= LEVEL) & (signs == side)) for side in (1, -1))
    said = [
        f"{named(who)} {word}" for who, word in ((above, "above"), (below, "below")) if len(who)
    ]
    return replace(
        seen,
        p_value=float(p_values.min()),
        failed=bool(said),
        obstacle=too_few_shuffles(layer, layer.layers),
        evidence=f"in each of {len(layer.well_known)} domains {' and '.join(said)} K/E; as uneven "
        f"as {estimates[0]:.1f} of {counts.num_experts} experts used alike",
    )


def independent_tokens(layer: Layer) -> float:
    """Tokens that say as much about shares as all of them, which come in documents."""
    kept = layer.survey.tokens[layer.survey.kept]
    return float(layer.survey.tokens.sum() / design_effect(layer.counts.documents, kept))


def dead(layer: Layer) -> Seen:
    """Experts that no token used, where one of an even share would have been seen."""
    counts, tokens = layer.counts, int(layer.survey.tokens.sum())
    unused = np.flatnonzero(counts.by_expert() == 0)
    worth, even = independent_tokens(layer), counts.top_k / counts.num_experts
    missed = min(1.0, counts.num_experts * layer.layers * (1 - even) ** worth)
    return Seen(
        measure="experts never used",
        value=float(len(unused)),
        reference=0.0,
        p_value=missed if len(unused) else 1.0,
        failed=bool(len(unused)),
        evidence=f"{named(unused)} never used in {tokens:,} tokens, worth {worth:,.0f} "
        f"independent ones: a share of {3 / worth:.2%} at most each, where K/E is {even:.1%}",
        obstacle="too few tokens: even an expert of share K/E could have been missed"
        if missed > LEVEL
        else "",
    )


def blind_to_token(layer: Layer) -> Seen:
    """Experts chosen whatever the token is: collapsed on a few of them, or at random."""
    found, shifted = layer.along.information[0], layer.along.information[1:]
    # Rounding alone may lift one of two informations that are both nothing.
    p_value = float((1 + (shifted >= found - 1e-9).sum()) / (1 + len(shifted)))
    counts = layer.counts
    busiest = busiest_share(counts.by_expert(), counts.top_k)
    mean = float(shifted.mean())
    missed = max(0.0, float(found) - mean) + mean - float(np.quantile(shifted, 0.05))
    return Seen(
        measure="what a token says about its expert (bits)",
        value=float(found),
        reference=mean,
        reference_p95=float(np.quantile(shifted, 0.95)),
        p_value=p_value,
        failed=p_value > LEVEL,
        obstacle=_not_shown(p_value, missed, np.log2(counts.num_experts / counts.top_k)),
        evidence="which token it is says no more about its experts than about those of another "
        f"token of the passage; the {counts.top_k} busiest take {busiest:.1%} of the routing",
    )


def _not_shown(p_value: float, missed: float, most: float) -> str:
    """An obstacle where chance explains what was seen, but would explain what matters as well.

    Args:
        p_value: That of no effect.
        missed: Upper 95% limit of the effect, in bits.
        most: Bits that it can have.
    """
    if p_value <= LEVEL or missed <= NEXT_TO_NOTHING * most:
        return ""
    return (
        f"not shown (p = {p_value:.2g}), but up to {missed:.2g} of {most:.2g} bits may have been "
        "missed: more text would tell"
    )


def undecided(layer: Layer) -> Seen:
    """Router probabilities that are all alike: experts are not told apart."""
    most = np.log2(layer.counts.num_experts)
    entropy, tokens = layer.along.column("entropy"), layer.along.column("tokens")
    options = layer.options
    low, high = ratio_interval(
        entropy[:, None] / most, tokens, resamples=options.bootstrap, seed=options.seed
    )
    value = entropy.sum() / most / tokens.sum()
    lower, upper = float(low[0]), float(high[0])
    return Seen(
        measure="entropy of the router for one token, part of its maximum",
        value=float(value),
        reference=1.0,
        low=lower,
        high=upper,
        failed=lower >= 1 - ROUNDING,
        obstacle="the interval holds both more and less than rounding from the maximum: more text "
        "would tell"
        if lower < 1 - ROUNDING <= upper
        else "",
        evidence=f"the entropy of the router, {value:.2%} of its maximum, is within rounding of "
        "it: all experts are alike to the router",
    )


def blind_to_domain(layer: Layer) -> Seen:
    """Routing that is the same for every kind of text."""
    measure = "divergence of the two domains that lie clearest apart (bits)"
    if len(layer.well_known) < 2:
        return Seen(
            measure=measure, value=np.nan, obstacle=too_few_domains(layer, "nothing to compare")
        )
    names = [layer.domains[i] for i in layer.well_known]
    pairs = pd.DataFrame(
        divergence_rows(layer.counts, layer.survey, layer.domains, layer.routing_options)
    )
    pairs = pairs[pairs["domain_a"].isin(names) & pairs["domain_b"].isin(names)]
    top = pairs.sort_values(["p_value", "excess"], ascending=[True, False]).iloc[0]
    p_value = min(1.0, float(top["p_value"]) * len(pairs))
    # As far as chance may lift a divergence it may lower it too.
    missed = float((pairs["excess"].clip(0) + pairs["null_p95"] - pairs["null_mean"]).max())
    few = too_few_shuffles(layer, len(pairs))
    return Seen(
        measure=measure,
        value=float(top["js_bits"]),
        reference=float(top["null_mean"]),
        reference_p95=float(top["null_p95"]),
        p_value=p_value,
        failed=p_value > LEVEL,
        obstacle=few or _not_shown(p_value, missed, layer.largest_divergence),
        evidence=f"no two of {len(names)} domains are routed apart more than shuffled documents",
    )
