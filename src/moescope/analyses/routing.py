"""Who gets the tokens: expert use by layer and domain, and how far domains are told apart."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from numpy import ndarray as Array

from moescope.analyses.material import Material
from moescope.analyses.registry import analysis
from moescope.captures.read import Capture
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.measures import routing as measures
from moescope.measures.bootstrap import FEWEST_UNITS, ratio_interval
from moescope.progress import track
from moescope.runs import Finding, Result

SIGNIFICANT = 0.05
"""Of p-values after Bonferroni's correction over all layers and pairs of domains."""


@dataclass(frozen=True, kw_only=True)
class RoutingOptions:
    """Options of `routing`."""

    permutations: int = 1_000
    """Shuffles of the documents' domain labels in the null of the divergence."""
    bootstrap: int = 1_000
    """Resamples of documents behind each 95% interval."""
    seed: int = 0
    """Seed of shuffles and resamples."""


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """Routing of one layer, counted."""

    layer: int
    """The model's own layer number."""
    top_k: int
    """Experts per token."""
    counts: Array
    """[documents, experts] tokens that have the expert in their top-k."""
    router_entropy_bits: float
    """Mean entropy of the softmax over a token's router logits, in bits."""


@analysis(
    question="Which experts get the tokens, and are domains routed differently?",
    source="MoE Lens (routing specialisation); counts, matching and null ours",
    needs={"routing"},
    options=RoutingOptions,
)
def routing(material: Material, options: RoutingOptions) -> Result:
    """Expert use by layer and domain, entropy, and divergence between domains."""
    capture = material.capture
    domain_of_document = capture.document_domains.numpy()
    layers = [count_layer(capture, n) for n in track(capture.layers, "counting routing")]
    tokens = np.bincount(capture.documents.numpy(), minlength=len(domain_of_document))
    divergence = divergence_table(layers, domain_of_document, capture.domains, options)
    return Result(
        name="routing",
        tables={
            "routing": share_table(layers, tokens, domain_of_document, capture.domains, options),
            "layers": layer_table(layers, int(tokens.sum())),
            "divergence": divergence,
        },
        findings=findings(layers, divergence, options),
        provenance={"seed": options.seed},
    )


def count_layer(capture: Capture, layer: int) -> LayerRouting:
    """Count one layer's routing, shard by shard."""
    documents = capture.documents.numpy()
    counts: Array | int = 0
    entropy, top_k = 0.0, 0
    for part, shard in capture.routing_shards(layer):
        num_experts, top_k = shard.logits.shape[1], shard.experts.shape[1]
        used = shard.experts >= 0
        owners = np.repeat(documents[part], used.sum(1).numpy())
        counts = counts + measures.counts_by_document(
            shard.experts[used][:, None].numpy(), owners, len(capture.document_names), num_experts
        )
        entropy += measures.router_entropy_bits(shard.logits.double().numpy()).sum()
    return LayerRouting(
        layer=layer,
        top_k=top_k,
        counts=np.asarray(counts),
        router_entropy_bits=entropy / capture.num_tokens,
    )


def share_table(
    layers: list[LayerRouting],
    tokens: Array,
    domain_of_document: Array,
    domains: list[str],
    options: RoutingOptions,
) -> pd.DataFrame:
    """Share of tokens that have each expert in their top-k, with 95% intervals over documents."""
    frames = []
    for part in layers:
        for number, domain in enumerate([RESERVED_DOMAIN, *domains], start=-1):
            chosen = (tokens > 0) & ((number < 0) | (domain_of_document == number))
            counts, total = part.counts[chosen], tokens[chosen]
            low, high = ratio_interval(
                counts.astype(float),
                total.astype(float),
                resamples=options.bootstrap,
                seed=options.seed,
            )
            frame = {
                "layer": part.layer,
                "domain": domain,
                "expert": range(counts.shape[1]),
                "tokens": counts.sum(0),
                "share": counts.sum(0) / total.sum(),
                "uniform": part.top_k / counts.shape[1],
                "low": low,
                "high": high,
                "n_tokens": total.sum(),
                "n_documents": len(total),
            }
            frames.append(pd.DataFrame(frame))
    return pd.concat(frames, ignore_index=True)


def layer_table(layers: list[LayerRouting], n_tokens: int) -> pd.DataFrame:
    """One row per layer: evenness of expert use and decidedness of the router."""
    rows = []
    for part in layers:
        used = part.counts.sum(0)
        rows.append(
            {
                "layer": part.layer,
                "num_experts": len(used),
                "top_k": part.top_k,
                "n_tokens": n_tokens,
                "unused_slots": n_tokens * part.top_k - int(used.sum()),
                "entropy_bits": float(measures.entropy_bits(used)),
                "max_entropy_bits": float(np.log2(len(used))),
                "router_entropy_bits": part.router_entropy_bits,
                "busiest_share": used.max() / n_tokens,
                "least_share": used.min() / n_tokens,
                "experts_for_half": measures.experts_for_share(used),
            }
        )
    return pd.DataFrame(rows)


def divergence_table(
    layers: list[LayerRouting],
    domain_of_document: Array,
    domains: list[str],
    options: RoutingOptions,
) -> pd.DataFrame:
    """Jensen-Shannon divergence of every pair of domains beside its shuffled-document null."""
    rows = []
    pairs = [(part, a, b) for part in layers for a, b in combinations(range(len(domains)), 2)]
    for part, first, second in track(pairs, "shuffling domains"):
        documents = np.flatnonzero(
            ((domain_of_document == first) | (domain_of_document == second))
            & (part.counts.sum(1) > 0)
        )
        labels = (domain_of_document[documents] == second).astype(int)
        counts = part.counts[documents]
        observed, null = measures.divergence_test(
            counts, labels, permutations=options.permutations, seed=options.seed
        )
        p_value = float((1 + (null >= observed).sum()) / (1 + len(null)))
        smaller = min(counts[labels == side].sum() for side in (0, 1)) // part.top_k
        rows.append(
            {
                "layer": part.layer,
                "domain_a": domains[first],
                "domain_b": domains[second],
                "js_bits": observed,
                "null_mean": null.mean(),
                "null_p95": np.quantile(null, 0.95),
                "excess": observed - null.mean(),
                "p_value": p_value,
                "p_corrected": min(1.0, p_value * len(pairs)),
                "n_tokens": smaller,
                "n_documents": len(documents),
                "seed": options.seed,
            }
        )
    return pd.DataFrame(rows)


def findings(
    layers: list[LayerRouting], divergence: pd.DataFrame, options: RoutingOptions
) -> list[Finding]:
    """What the tables say in words."""
    return [*_use_findings(layers), *_divergence_findings(divergence, options)]


def _use_findings(layers: list[LayerRouting]) -> list[Finding]:
    evenness = {
        part.layer: float(measures.entropy_bits(used) / np.log2(len(used)))
        for part in layers
        for used in [part.counts.sum(0)]
        if len(used) > 1
    }
    if not evenness:
        return [Finding(text="One expert per layer takes all tokens: there is no choice.")]
    unused = sum(int((part.counts.sum(0) == 0).sum()) for part in layers)
    least = min(evenness, key=lambda layer: evenness[layer])
    total = sum(part.counts.shape[1] for part in layers)
    text = (
        f"Expert use is least even in layer {least}: its entropy is {evenness[least]:.1%} of the "
        f"maximum ({np.mean(list(evenness.values())):.1%} on average over {len(layers)} layers). "
        f"{unused} of {total} experts were never used on this text."
    )
    numbers = {"layer": least, "relative_entropy": evenness[least], "unused_experts": unused}
    return [Finding(text=text, numbers=numbers)]


def _divergence_findings(divergence: pd.DataFrame, options: RoutingOptions) -> list[Finding]:
    if divergence.empty:
        return [Finding(text="One domain only: divergence between domains is not measured here.")]
    fewest = int(divergence.n_documents.min())
    clear = int((divergence.p_corrected <= SIGNIFICANT).sum())
    top = divergence.iloc[int(divergence.excess.argmax())]
    text = (
        f"Domains are routed apart in {clear} of {len(divergence)} comparisons (layer x pair of "
        f"domains; p <= {SIGNIFICANT} after correction, {options.permutations} shuffles of "
        f"documents). Largest: {top.domain_a} against {top.domain_b} in layer {top.layer}, "
        f"{top.js_bits:.3f} bits where shuffled documents give {top.null_mean:.3f} (95th "
        f"percentile {top.null_p95:.3f}; {top.n_tokens} tokens a side)."
    )
    numbers = {"clear": clear, "comparisons": len(divergence), "js_bits": float(top.js_bits)}
    found = [Finding(text=text, numbers=numbers)]
    if len(divergence) / (1 + options.permutations) > SIGNIFICANT:
        found.append(
            Finding(text="Too few shuffles for this many comparisons: raise --permutations.")
        )
    if fewest < FEWEST_UNITS:
        found.append(Finding(text=f"Some comparisons rest on {fewest} documents only."))
    return found
