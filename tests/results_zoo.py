"""Results as the analyses write them, made of chance alone: for tests that need no model."""

import numpy as np
import pandas as pd

from moescope.runs import Finding, Result

DOMAINS = ("encyclopedia", "maths", "code", "french")
PROVENANCE = {
    "analysis": "align",
    "options": {"source": 1, "target": 2, "protocol": "converged", "source_experts": None},
    "model": "tiny",
    "model_revision": None,
    "model_fingerprint": "5f0c" * 16,
    "capture": "9ab1" * 16,
    "tokens": 24_000,
    "documents": 160,
    "libraries": {"moescope": "0.1.0", "torch": "2.13.0"},
    "seed": 0,
}


def routing_result(
    *,
    layers: int = 6,
    experts: int = 8,
    top_k: int = 2,
    domains: tuple[str, ...] = DOMAINS,
    seed: int = 0,
) -> Result:
    """Routing that specialises with depth; `tables` as the analysis `routing` writes them."""
    random = np.random.default_rng(seed)
    shares = _shares(random, layers, experts, top_k, len(domains))
    return Result(
        name="routing",
        tables={
            "routing": _routing_table(random, shares, top_k, domains),
            "layers": _layers_table(shares.mean(1), top_k),
            "divergence": _divergence_table(random, shares / top_k, domains),
        },
        findings=[
            Finding(
                text="In layer 5 the busiest expert takes 41% of the tokens, where an even "
                "router would give it 25%.",
                numbers={"busiest_share": 0.41, "uniform": 0.25},
            ),
            Finding(
                text="Domains are routed differently in 6 of 6 layers, more than any of 200 "
                "shuffles of the documents (p < 0.005).",
                numbers={"layers": 6, "p": 0.005},
            ),
        ],
        provenance=PROVENANCE,
    )


def _shares(random, layers, experts, top_k, domains):
    depth = np.linspace(0.2, 1.0, layers)[:, None, None]
    common = random.normal(size=(layers, 1, experts)) * 0.3
    scores = np.exp(common + depth * random.normal(size=(layers, domains, experts)) * 0.7)
    return top_k * scores / scores.sum(-1, keepdims=True)  # [layers, domains, experts]


def _routing_table(random, shares, top_k, domains):
    rows = []
    for layer, by_domain in enumerate(shares):
        for domain, row in [("all", by_domain.mean(0)), *zip(domains, by_domain, strict=True)]:
            for expert, share in enumerate(row):
                width = 0.02 + 0.03 * random.random()
                tokens = int(share * 6000)
                low, high = max(0.0, share - width), share + width
                rows.append((layer, domain, expert, tokens, share, top_k / len(row), low, high))
    columns = ["layer", "domain", "expert", "tokens", "share", "uniform", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _layers_table(shares, top_k):
    probability = shares / top_k
    entropy = -(probability * np.log2(probability)).sum(1)
    ordered = -np.sort(-probability, axis=1)
    return pd.DataFrame(
        {
            "layer": range(len(shares)),
            "num_experts": shares.shape[1],
            "top_k": top_k,
            "n_tokens": 24_000,
            "entropy_bits": entropy,
            "max_entropy_bits": np.log2(shares.shape[1]),
            "router_entropy_bits": entropy - np.linspace(0.3, 1.1, len(shares)),
            "busiest_share": shares.max(1),
            "experts_for_half": (ordered.cumsum(1) < 0.5).sum(1) + 1,
            "least_share": shares.min(1),
        }
    )


def _divergence_table(random, probability, domains):
    rows = []
    for layer, by_domain in enumerate(probability):
        for a, first in enumerate(domains):
            for b in range(a + 1, len(domains)):
                middle = (by_domain[a] + by_domain[b]) / 2
                js = sum((p * np.log2(p / middle)).sum() for p in by_domain[[a, b]]) / 2
                null = 0.004 + 0.002 * random.random()
                p_value = 0.005 if js > 2 * null else 0.3
                found = (js, null, 2 * null, js - null, p_value, 5000, 30)
                rows.append((layer, first, domains[b], *found))
    columns = ["layer", "domain_a", "domain_b", "js_bits", "null_mean", "null_p95", "excess"]
    frame = pd.DataFrame(rows, columns=[*columns, "p_value", "n_tokens", "n_documents"])
    return frame.assign(p_corrected=(frame["p_value"] * len(frame)).clip(upper=1))


def align_result(
    *,
    experts: int = 4,
    layer_pairs: tuple[tuple[int, int], ...] = ((1, 2),),
    curves: bool = False,
    seed: int = 0,
) -> Result:
    """Alignment with one good pair (0 -> 2), one undefined pair and one source of few tokens.

    With `curves`, learning and capacity curves of the pairs that have numbers too.
    """
    random = np.random.default_rng(seed)
    pairs = pd.concat([_pairs(random, experts, *pair) for pair in layer_pairs], ignore_index=True)
    return Result(
        name="align",
        tables={
            "align": pairs,
            "curves": _curves(pairs),
            "layers": _by_layers(pairs),
            "distributions": _distributions(random, layer_pairs),
            "pca": _pca(random, layer_pairs),
            **(
                {"learning": _learning(pairs), "capacity": _capacity(random, pairs)}
                if curves
                else {}
            ),
        },
        findings=[
            Finding(
                text="One of 10 pairs is imitated beyond the controls: expert 0 of layer 1 by "
                "expert 2 of layer 2 (score 0.62, 95% interval 0.51 to 0.71).",
                numbers={"score": 0.62},
            ),
            Finding(
                text="In 9 of 10 pairs a linear map without any expert, or a random expert, does "
                "as well: no evidence of a shared function.",
                numbers={"pairs": 9},
            ),
        ],
        provenance=PROVENANCE,
    )


def _pairs(random, experts, source_layer, target_layer):
    rows = []
    for source in range(experts):
        variance = 10.0 ** random.uniform(-2.2, 0.8)
        linear, ceiling = random.uniform(0.25, 0.6), random.uniform(0.05, 0.15)
        for target in range(experts):
            row = dict.fromkeys(_PAIR_COLUMNS, np.nan)
            row |= {
                "source_layer": source_layer,
                "source_expert": source,
                "target_layer": target_layer,
                "target_expert": target,
                "n_train": 2000 if source != experts - 1 else 9,
                "n_val": 500 if source != experts - 1 else 3,
                "steps": 0,
                "converged": False,
                "status": "too_few_tokens",
                "seed": 0,
                "protocol": "converged",
                "form": "layer_norm",
                "rank": -1,
                "adapter_parameters": 16_768,
                "expert_parameters": 36_864,
                "parameters_share": 16_768 / 36_864,
                "n_documents": 120 if source != experts - 1 else 2,
            }
            if source != experts - 1:
                fvu = (
                    0.3 * linear
                    if (source, target) == (0, 2)
                    else random.uniform(0.9, 1.6) * linear
                )
                row |= _measured(random, fvu, linear, ceiling, variance)
            if (source, target) == (1, 1):
                row |= {"status": "undefined", "score": np.nan}
                row |= {"score_low": np.nan, "score_high": np.nan}
            rows.append(row)
    return pd.DataFrame(rows)


def _measured(random, fvu, linear, ceiling, variance):
    target = linear * random.uniform(0.9, 1.3)
    null = min(linear, target, 1.0)
    score = (null - fvu) / (null - ceiling)
    return {
        "mse_mean": fvu * variance,
        "mse_sum": fvu * variance * 128,
        "kl_before": 40.0,
        "kl_after": 12.0,
        "mmd_before": 0.3,
        "mmd_after": 0.08,
        "published_mse": variance * random.uniform(0.9, 1.1),
        "fvu": fvu,
        "fvu_low": fvu * 0.9,
        "fvu_high": fvu * 1.12,
        "cosine": np.sqrt(max(0.0, 1 - fvu)),
        "token_error": fvu * 0.9,
        "fvu_constant": 1.003,
        "fvu_identity": 1.4 + random.random(),
        "fvu_linear": linear,
        "fvu_random": target,
        "fvu_random_sd": 0.02,
        "fvu_floor": random.uniform(0.01, 0.04),
        "fvu_self": ceiling,
        "score": score,
        "score_low": score - 0.1,
        "score_high": score + 0.09,
        "steps": 300,
        "converged": True,
        "status": "ok",
    }


_PAIR_COLUMNS = [
    "source_layer",
    "source_expert",
    "target_layer",
    "target_expert",
    "n_train",
    "n_val",
    "mse_mean",
    "mse_sum",
    "fvu",
    "fvu_low",
    "fvu_high",
    "cosine",
    "token_error",
    "fvu_constant",
    "fvu_identity",
    "fvu_linear",
    "fvu_random",
    "fvu_random_sd",
    "fvu_floor",
    "fvu_self",
    "score",
    "score_low",
    "score_high",
    "steps",
    "converged",
    "status",
    "seed",
    "published_mse",
    "kl_before",
    "kl_after",
    "mmd_before",
    "mmd_after",
    "protocol",
    "form",
    "rank",
    "adapter_parameters",
    "expert_parameters",
    "parameters_share",
    "n_documents",
]


_KEY = ["source_layer", "source_expert", "target_layer", "target_expert"]


def _curves(pairs):
    rows = []
    for row in pairs[pairs.status != "too_few_tokens"].itertuples():
        for kind, end in (("pair", row.fvu), ("self", row.fvu_self)):
            for step in range(0, 301, 20):
                fvu = end + (1.1 - end) * np.exp(-step / 60)
                found = (kind, step, step * 0.01, fvu)
                rows.append((*(getattr(row, name) for name in _KEY), *found))
    return pd.DataFrame(rows, columns=[*_KEY, "kind", "step", "seconds", "fvu"])


def _learning(pairs):
    measured = pairs[pairs.fvu.notna()]
    frames = []
    for part in (0.125, 0.25, 0.5, 1.0):
        frame = measured.assign(n_train=(part * measured.n_train).astype(int))
        for name in ("fvu", "fvu_linear", "fvu_random", "fvu_self"):
            frame[name] = frame[name] + 0.2 * (1 / part - 1) / 7
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _capacity(random, pairs):
    rows = []
    for pair in pairs[pairs.fvu.notna()].to_dict("records"):
        advantage = 0.2 if (pair["source_expert"], pair["target_expert"]) == (0, 2) else -0.02
        summaries = {"advantage": advantage, "parameters_saved": 6.5 if advantage > 0 else np.nan}
        for rank, size in {0: 384, 1: 640, 4: 1_408, 16: 4_480, 64: 16_768, 128: 33_152}.items():
            base = 0.4 + 0.5 * np.exp(-rank / 10)
            for kind, seed in [("real", None), *(("random", seed) for seed in range(5))]:
                fvu = base - advantage if kind == "real" else base + 0.02 * random.normal()
                row = {name: pair[name] for name in _KEY}
                row |= {"kind": kind, "seed": seed, "rank": rank, "adapter_parameters": size}
                row |= {"train_fvu": fvu - 0.05, "fvu": fvu, "parameters_share": size / 36_864}
                rows.append(row | summaries)
    return pd.DataFrame(rows)


def _by_layers(pairs):
    rows = []
    for (source, target), frame in pairs.groupby(["source_layer", "target_layer"]):
        row = {"source_layer": source, "target_layer": target, "pairs": len(frame)}
        row |= {name: frame[name].median() for name in ("fvu", "fvu_linear", "parameters_share")}
        rows.append(row)
    return pd.DataFrame(rows)


def _panels(layer_pairs):
    """Layer, name and scale of each panel."""
    sources = {source for source, _ in layer_pairs}
    for layer in sorted({layer for pair in layer_pairs for layer in pair}):
        yield layer, f"input of layer {layer}", 1.0 + 0.1 * layer
        if layer in sources:
            yield layer, f"expert outputs of layer {layer}", 0.2


def _distributions(random, layer_pairs):
    frames = []
    for layer, panel, scale in _panels(layer_pairs):
        values = random.standard_t(5, size=20_000) * scale
        density, edges = np.histogram(values, bins=60, range=(-4 * scale, 4 * scale), density=True)
        frame = {"layer": layer, "panel": panel, "bin_left": edges[:-1], "bin_right": edges[1:]}
        frame |= {"density": density, "mean": values.mean(), "std": values.std()}
        frames.append(pd.DataFrame(frame))
    return pd.concat(frames, ignore_index=True)


def _pca(random, layer_pairs):
    frames = []
    for layer, panel, scale in _panels(layer_pairs):
        points = random.normal(size=(300, 2)) * scale * np.array([3.0, 1.5])
        frame = {"layer": layer, "panel": panel, "pc1": points[:, 0], "pc2": points[:, 1]}
        frames.append(pd.DataFrame(frame | {"explained1": 0.31, "explained2": 0.12}))
    return pd.concat(frames, ignore_index=True)


def curve(values, measure="m", analysis="a"):
    """A measure of layers as `layer_curves` gives it, without limits."""
    return pd.DataFrame(
        {
            "analysis": analysis,
            "measure": measure,
            "stack": "decoder",
            "layer": range(len(values)),
            "value": np.asarray(values, dtype=float),
            "low": np.nan,
            "high": np.nan,
            "n_tokens": 10,
            "n_documents": 1,
            "last": [False] * (len(values) - 1) + [True],
        }
    )
