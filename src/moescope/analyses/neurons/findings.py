"""What the tables of `neurons` say in words."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.special import ndtr, ndtri

from moescope.analyses.neurons.options import NeuronsOptions
from moescope.analyses.neurons.selective import CLEAR
from moescope.measures.activations import FEWEST_TOKENS
from moescope.measures.multiple_tests import holm
from moescope.runs import Finding

_KINDS = {
    "neuron": "the single most selective neuron",
    "group": "the group of the most selective neurons",
    "expert": "the expert that holds most of this group",
}


def findings(tables: Mapping[str, pd.DataFrame], options: NeuronsOptions) -> list[Finding]:
    """Activity, dead neurons, selectivity, numbering, ablations."""
    layers = tables["neurons"]
    found = [_active(layers, options), _dead(layers)]
    if "selective" in layers:
        found.append(_selective(layers))
    if len(tables["agreement"]):
        found.append(_agreement(tables["agreement"]))
    if "ablation" in tables:
        kinds = tables["ablation"]["kind"].unique()
        found += [_ablation(tables["ablation"], kind) for kind in kinds]
    if (layers["status"] == "few_documents").any():
        few = int(layers["n_documents"].min())
        found.append(Finding(text=f"No intervals: too few documents ({few})."))
    return found


def _active(layers: pd.DataFrame, options: NeuronsOptions) -> Finding:
    ranked = layers.sort_values("active", kind="stable")
    low, high = ranked.iloc[0], ranked.iloc[-1]
    text = (
        f"Of the activations of routed tokens {_share(low)} (layer {low['layer']}) to "
        f"{_share(high)} (layer {high['layer']}) are above {options.threshold:g} in absolute value "
        f"({_range(layers['n_tokens'])} pairs of token and expert per layer). Published for other "
        "models, on other text: Mixtral 99.6%, DeepSeekMoE 99.7%, Grok 25.3% above 0.001."
    )
    return Finding(text=text, numbers={"least": low["active"], "most": high["active"]})


def _share(row: pd.Series) -> str:
    interval = ""
    if pd.notna(row["active_low"]):
        interval = f" (95% interval {row['active_low']:.2%} to {row['active_high']:.2%})"
    return f"{row['active']:.2%}{interval}"


def _dead(layers: pd.DataFrame) -> Finding:
    dead, judged, every = (int(layers[c].sum()) for c in ("dead", "judged", "neurons"))
    text = (
        f"{dead:,} of {judged:,} neurons were never active at any of the {FEWEST_TOKENS} tokens or "
        "more that their expert has in the sample."
    )
    if every > judged:
        text += f" No verdict about {every - judged:,} neurons of experts with fewer tokens."
    return Finding(text=text, numbers={"dead": dead, "judged": judged, "neurons": every})


def _selective(layers: pd.DataFrame) -> Finding:
    tested = layers[layers["selective"].notna()]
    beyond = int((tested["p_corrected"] <= CLEAR).sum())
    text = (
        f"{_range(tested['selective'])} neurons of a layer ({tested['selective_share'].min():.1%} "
        f"to {tested['selective_share'].max():.1%}) are more active in one domain than elsewhere, "
        f"clear of all shuffles of documents for any neuron of the layer (p <= {CLEAR:g}). The "
        f"largest difference of a neuron is on average {tested['selectivity'].min():.3f} to "
        f"{tested['selectivity'].max():.3f} standard deviations, where shuffles give "
        f"{tested['null_mean'].min():.3f} to {tested['null_mean'].max():.3f}: clear in {beyond} of "
        f"{len(tested)} layers."
    )
    return Finding(
        text=text,
        numbers={"selective": int(tested["selective"].sum()), "layers_beyond": beyond},
    )


def _agreement(agreement: pd.DataFrame) -> Finding:
    gate, activation = (agreement[agreement["measure"] == m] for m in ("gate", "activation"))
    text = (
        f"Gate rows of the same number in two experts have a mean cosine of {_span(gate, 'same')}, "
        f"of different numbers {_span(gate, 'other')}. Activations at the same tokens correlate by "
        f"{_span(activation, 'same')} and {_span(activation, 'other')}, more than in 95% of random "
        f"numberings in {int((activation['same'] > activation['null_p95']).sum())} of "
        f"{len(activation)} layers, where chance alone gives {0.05 * len(activation):.1f}."
    )
    numbers = {"gate_same": gate["same"].median(), "activation_same": activation["same"].median()}
    return Finding(text=text, numbers=numbers)


def _ablation(table: pd.DataFrame, kind: str) -> Finding:
    rows = table[(table["kind"] == kind) & (table["text"] == "own")]
    own = rows[rows["choice"] == "selective"].dropna(subset="difference")
    contrasts = table[(table["kind"] == kind) & (table["text"] == "own - others")]
    contrasts = contrasts[contrasts["choice"] == "selective"]
    if own.empty:
        return Finding(text=f"Without {_KINDS[kind]}: the text holds none of the domains.")
    worst = own.sort_values("difference").iloc[-1]
    parts = [
        f"Without {_KINDS[kind]} of a domain, chosen on half of the documents, the loss on its own "
        f"text in the other half rises most for {worst['domain']}: {_change(worst, 'difference')} "
        f"({worst['n_tokens']:,} predictions, {worst['n_documents']} documents)."
    ]
    if contrasts["difference_low"].notna().any():
        parts.append(f"More than on other text: {_clear(contrasts, 'difference')}.")
    for choice, name in (("random", "a random choice"), ("matched", "a matched one")):
        some = rows[rows["choice"] == choice]
        if some["excess_low"].notna().any():
            parts.append(f"More than without {name}: {_clear(some, 'excess')}.")
    return Finding(text=" ".join(parts), numbers={"rise": worst["difference"]})


def _change(row: pd.Series, name: str) -> str:
    interval = ""
    if pd.notna(row[f"{name}_low"]):
        interval = f" (95% interval {row[f'{name}_low']:+.4f} to {row[f'{name}_high']:+.4f})"
    return f"{row[name]:+.4f} nats per token{interval}"


def _clear(rows: pd.DataFrame, name: str) -> str:
    """In how many domains it lies above zero, clear of chance in all of them together."""
    known = rows[rows[f"{name}_low"].notna()]
    values = known[name].to_numpy(float)
    reach = known[f"{name}_high"].to_numpy(float) - values
    distance = np.divide(np.abs(values), reach, out=np.full_like(values, np.inf), where=reach > 0)
    p_corrected = holm(2 * ndtr(ndtri(0.025) * distance))
    clear = int(((values > 0) & (p_corrected <= CLEAR)).sum())
    return f"clearly in {clear} of {len(known)} domains"


def _range(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _span(rows: pd.DataFrame, name: str) -> str:
    return f"{rows[name].min():.3f} to {rows[name].max():.3f}"
