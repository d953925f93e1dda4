"""Tables of how much each expert is used: shares, concentration, divergence between domains."""

from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray as Array

from moescope.analyses.routing.counts import LayerCounts
from moescope.analyses.routing.options import RoutingOptions
from moescope.analyses.routing.survey import Survey
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.measures import routing as measures
from moescope.measures.bootstrap import ratio_interval
from moescope.measures.jackknife import limits, whole_and_left_out


def share_table(
    counts: LayerCounts, survey: Survey, domains: list[str], options: RoutingOptions
) -> pd.DataFrame:
    """Share of tokens that have each expert in their top-k, with 95% intervals over documents."""
    frames = []
    for number, domain in enumerate([RESERVED_DOMAIN, *domains], start=-1):
        inside, tokens = survey.within(number), counts.by_expert(number)
        total = survey.tokens[inside].sum()
        share = tokens / max(total, 1)
        low, high = _limits(counts, survey, number, share, options)
        frame = {
            **counts.names,
            "domain": domain,
            "expert": range(counts.num_experts),
            "tokens": tokens,
            "share": share,
            "uniform": counts.top_k / counts.num_experts,
            "low": low,
            "high": high,
            "n_tokens": total,
            "n_documents": inside.sum(),
        }
        frames.append(pd.DataFrame(frame))
    return pd.concat(frames, ignore_index=True)


def _limits(
    counts: LayerCounts,
    survey: Survey,
    domain: int,
    share: Float[Array, " experts"],
    options: RoutingOptions,
) -> tuple[Float[Array, " experts"], Float[Array, " experts"]]:
    """Those of the documents that are kept apart, relative to their own share."""
    inside = survey.within(domain)[survey.kept]
    rows, tokens = counts.documents[inside].astype(float), survey.tokens[survey.kept][inside]
    low, high = ratio_interval(
        rows, tokens.astype(float), resamples=options.bootstrap, seed=options.seed
    )
    own = rows.sum(0) / max(tokens.sum(), 1)
    moved = np.divide(share, own, out=np.ones_like(share), where=own > 0)
    return low * moved, np.minimum(high * moved, 1)


def layer_row(counts: LayerCounts, survey: Survey) -> dict[str, object]:
    """Evenness of expert use and decidedness of the router."""
    used, tokens = counts.by_expert(), int(survey.tokens.sum())
    return {
        **counts.names,
        "num_experts": counts.num_experts,
        "top_k": counts.top_k,
        "n_tokens": tokens,
        "unused_slots": tokens * counts.top_k - int(used.sum()),
        "entropy_bits": float(measures.entropy_bits(used)),
        "max_entropy_bits": float(np.log2(counts.num_experts)),
        "router_entropy_bits": counts.router_entropy_bits,
        "busiest_share": used.max() / tokens,
        "least_share": used.min() / tokens,
        "experts_for_half": measures.experts_for_share(used),
    }


def concentration_table(counts: LayerCounts, survey: Survey, domains: list[str]) -> pd.DataFrame:
    """How few experts take the routing of each domain; 95% limits by the jackknife."""
    rows = []
    for number, domain in enumerate([RESERVED_DOMAIN, *domains], start=-1):
        inside = survey.within(number)
        used = whole_and_left_out(counts.by_group(number))
        entropy, busiest = measures.entropy_bits(used), measures.busiest_share(used, counts.top_k)
        uniform = counts.top_k / counts.num_experts
        entropy_low, entropy_high = np.clip(limits(entropy), 0, np.log2(counts.num_experts))
        busiest_low, busiest_high = np.clip(limits(busiest), uniform, 1)
        rows.append(
            {
                **counts.names,
                "domain": domain,
                "num_experts": counts.num_experts,
                "top_k": counts.top_k,
                "experts_for_half": measures.experts_for_share(used[0]),
                "busiest_k_share": busiest[0],
                "busiest_k_low": busiest_low,
                "busiest_k_high": busiest_high,
                "uniform": uniform,
                "entropy_bits": entropy[0],
                "entropy_low": entropy_low,
                "entropy_high": entropy_high,
                "n_tokens": survey.tokens[inside].sum(),
                "n_documents": inside.sum(),
            }
        )
    return pd.DataFrame(rows)


def divergence_rows(
    counts: LayerCounts, survey: Survey, domains: list[str], options: RoutingOptions
) -> list[dict[str, object]]:
    """Jensen-Shannon divergence of every pair of domains beside its shuffled-document null."""
    domain_of, routed = survey.domain_of[survey.kept], counts.documents.any(1)
    rows = []
    for first, second in combinations(range(len(domains)), 2):
        inside = ((domain_of == first) | (domain_of == second)) & routed
        labels, documents = (domain_of[inside] == second).astype(int), counts.documents[inside]
        if len(np.unique(labels)) < 2:  # a domain without tokens
            continue
        observed, null, matched = measures.divergence_test(
            documents, labels, permutations=options.permutations, seed=options.seed
        )
        rows.append(
            {
                **counts.names,
                "domain_a": domains[first],
                "domain_b": domains[second],
                "js_bits": observed,
                "null_mean": null.mean(),
                "null_p95": np.quantile(null, 0.95),
                "excess": observed - null.mean(),
                "p_value": (1 + (null >= observed).sum()) / (1 + len(null)),
                "n_tokens": matched // counts.top_k,
                "n_documents": len(documents),
                "seed": options.seed,
            }
        )
    return rows


def corrected(rows: list[dict[str, object]]) -> pd.DataFrame:
    """The table of divergences, with p-values for as many comparisons as there are (Bonferroni)."""
    table = pd.DataFrame(rows)
    if not table.empty:
        after = list(table).index("p_value") + 1
        table.insert(after, "p_corrected", (table["p_value"] * len(table)).clip(upper=1))
    return table
