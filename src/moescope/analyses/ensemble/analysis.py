"""One expert against all K that a token uses: how much of the output is its own (MoE Lens)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64

from moescope.analyses.curves import Curve
from moescope.analyses.ensemble.findings import findings
from moescope.analyses.ensemble.measures import MEASURES, measured
from moescope.analyses.ensemble.parts import Chosen, Parts, parts_of
from moescope.analyses.material import Material
from moescope.analyses.registry import analysis
from moescope.captures.read import Capture
from moescope.evaluate.predictions import evaluating
from moescope.evaluate.totals import Resampling, difference_reach
from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.models.view import MoELayer
from moescope.progress import track
from moescope.runs import Result


@dataclass(frozen=True, kw_only=True)
class EnsembleOptions:
    """Options of `ensemble`."""

    bootstrap: int = 1_000
    """Resamples of documents behind each 95% interval."""
    seed: int = 0
    """Seed of the resamples, and of the choice of a random expert among a token's own."""


@analysis(
    question="How like the output with all K experts is that with the best expert alone?",
    source="MoE Lens (single expert against the ensemble); forms, controls and intervals ours",
    needs={"inputs", "residual", "live model"},
    options=EnsembleOptions,
    curves=(
        Curve(
            measure="cosine of the best expert with all",
            table="ensemble",
            value="median",
            limits=("median_low", "median_high"),
            where={"form": "routed", "compared": "top", "measure": "cosine"},
        ),
    ),
)
def ensemble(material: Material, options: EnsembleOptions) -> Result:
    """Cosines, norm ratio and relative error by layer, in four forms, beside four controls."""
    model = material.model
    frames = []
    with evaluating(model):
        for stack, index in track(material.capture.places, "ensemble: layers"):
            capture = Capture(material.run, stack=stack)
            frames.append(layer_table(capture, model.layer(index, stack), options))
    table = pd.concat(frames, ignore_index=True)
    return Result(
        name="ensemble",
        tables={"ensemble": table},
        findings=findings(table),
        provenance={"seed": options.seed},
    )


def layer_table(capture: Capture, layer: MoELayer, options: EnsembleOptions) -> pd.DataFrame:
    """One row per form, compared output and measure.

    Raises:
        CaptureError: Inputs or residual were not recorded, or no whole rows.
    """
    chosen = Chosen.of(
        capture, layer.index, capture.whole_row_tokens("inputs", "residual"), options.seed
    )
    tokens: list[torch.Tensor] = []

    def read() -> Iterator[Parts]:
        tokens.clear()
        for some, parts in parts_of(capture, layer, chosen):
            tokens.append(some)
            yield parts

    found = measured(read)
    documents = capture.documents[torch.cat(tokens)].numpy()
    resampling = Resampling(resamples=options.bootstrap, seed=options.seed)
    summary = partial(_summary, documents=documents, resampling=resampling)
    rows = [
        {"stack": layer.stack, "layer": layer.index, "top_k": chosen.experts.shape[1]}
        | {"form": form, "compared": compared, "measure": measure}
        | summary(values[number].double().numpy())
        for (form, compared), values in found.items()
        for number, measure in enumerate(MEASURES)
    ]
    return pd.DataFrame(rows)


def _summary(
    values: Float[np.ndarray, " tokens"],
    *,
    documents: Int64[np.ndarray, " tokens"],
    resampling: Resampling,
) -> dict[str, object]:
    """Median and mean over tokens, with 95% intervals over documents.

    The interval of the median is that of the share of tokens below it, turned into quantiles
    (Woodruff 1952).
    """
    present = np.isfinite(values)
    values, owners = values[present], np.unique(documents[present], return_inverse=True)[1]
    if not len(values):
        return {"n_tokens": 0, "n_documents": 0, "status": "undefined", "seed": resampling.seed}
    tokens = np.bincount(owners).astype(float)
    median, mean = float(np.median(values)), float(values.mean())
    below = np.bincount(owners, values <= median)
    reach = difference_reach(below, tokens, resampling)
    low, high = np.nan, np.nan
    if np.isfinite(reach):
        low, high = np.quantile(values, np.clip([0.5 - reach, 0.5 + reach], 0, 1))
    around = difference_reach(np.bincount(owners, values), tokens, resampling)
    return {
        "median": median,
        "median_low": float(low),
        "median_high": float(high),
        "mean": mean,
        "mean_low": mean - around,
        "mean_high": mean + around,
        "n_tokens": len(values),
        "n_documents": len(tokens),
        "status": "ok" if len(tokens) >= FEWEST_UNITS else "few_documents",
        "seed": resampling.seed,
    }
