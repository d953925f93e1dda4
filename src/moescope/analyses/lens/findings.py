"""What the tables of `lens` say in words."""

from pathlib import Path

import pandas as pd

from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.models.view import MoEModel
from moescope.runs import Finding


def findings(table: pd.DataFrame, model: MoEModel, translators: Path | None) -> list[Finding]:
    """From means by layer, column and domain."""
    overall = table[table["domain"] == RESERVED_DOMAIN]
    found = []
    if translators is not None:
        found.append(
            Finding(
                text="States of the residual stream passed through the translators in "
                f"{translators} before they were decoded (tuned lens). These may have been trained "
                "on documents of this text, and were trained on layer outputs alone: columns "
                "within a layer are outside what they were trained for."
            )
        )
    found += [*_outputs(overall[overall["kind"] == "output"]), *_one_expert(overall)]
    if (undefined := overall[overall["status"] == "undefined"]["layer"].unique()).size:
        found.append(
            Finding(
                text="No columns with single experts in layers "
                f"{', '.join(map(str, undefined))}: these layers do more with the output of their "
                "sparse block than add, scale or norm it, or no token used the expert."
            )
        )
    encoder = sum(layer.stack == "encoder" for layer in model.layers)
    if encoder:
        found.append(
            Finding(
                text=f"The {encoder} sparse layers of the encoder are left out: no unembedding "
                "follows them."
            )
        )
    outputs = overall[overall["kind"] == "output"]
    if (outputs["status"] == "few_documents").any():
        few = int(outputs["n_documents"].max())
        found.append(Finding(text=f"No intervals: too few documents ({few})."))
    return found


def _outputs(rows: pd.DataFrame) -> list[Finding]:
    """From the first to the last sparse layer."""
    first, last = rows.iloc[0], rows.iloc[-1]
    text = (
        f"After layer {first['layer']} the prediction is {_of(first, 'kl', 'nats')} from the "
        f"final one and names the same token at {_of(first, 'agreement')} of {first['n_tokens']:,} "
        f"positions; after layer {last['layer']}, the last sparse one, at "
        f"{_of(last, 'agreement')}."
    )
    numbers = {
        "first_kl": first["kl"],
        "first_agreement": first["agreement"],
        "last_agreement": last["agreement"],
    }
    return [Finding(text=text, numbers=numbers)]


def _one_expert(overall: pd.DataFrame) -> list[Finding]:
    """The stream with its best expert against that with all, and without any."""
    kinds = {"none": "residual", "one": "top", "all": "output"}
    chosen = overall[(overall["rank"] <= 1) & (overall["status"] != "undefined")]
    by_kind = chosen.pivot_table(index="layer", columns="kind", values="kl")
    if not set(kinds.values()) <= set(by_kind.columns):
        return []
    layers = by_kind.dropna()[list(kinds.values())]
    medians = layers.median()
    none, one, every = (float(medians[kind]) for kind in kinds.values())
    shared = "the shared expert and " if (overall["kind"] == "shared").any() else ""
    text = (
        f"Median over {len(layers)} layers of the KL to the final prediction: {none:.3f} nats "
        f"before the block, {one:.3f} with {shared}the expert of the largest weight, {every:.3f} "
        "after the layer."
    )
    return [Finding(text=text, numbers={"residual": none, "one": one, "all": every})]


def _of(row: pd.Series, measure: str, unit: str = "") -> str:
    share = measure == "agreement"
    number = "{:.1%}" if share else "{:.3f}"
    text = number.format(row[measure]) + (f" {unit}" if unit else "")
    if pd.isna(row[f"{measure}_low"]):
        return text
    low, high = (number.format(row[f"{measure}_{end}"]) for end in ("low", "high"))
    return f"{text} (95% interval {low} to {high})"
