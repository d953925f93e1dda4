"""Tables of `health` beside the verdicts: layers, experts, and one document's experts."""

import numpy as np
import pandas as pd

from moescope.analyses.contexts import Reader
from moescope.analyses.health.failures import independent_tokens
from moescope.analyses.health.layer import Layer
from moescope.analyses.health.options import HealthOptions
from moescope.analyses.routing.survey import Survey
from moescope.analyses.routing.tables import share_table
from moescope.captures.read import Capture
from moescope.errors import OptionError
from moescope.evaluate.totals import Resampling, difference_reach
from moescope.measures.bootstrap import ratio_interval
from moescope.measures.expert_runs import used_by

QUANTILES = (5, 25, 50, 75, 95)
"""Percentiles of the margins."""
_RULE_OF_THREE = 3


def layer_row(layer: Layer) -> dict[str, object]:
    """Switch rate and margins of a layer, with 95% intervals over documents."""
    along, options = layer.along, layer.options
    slots, switched = along.column("slots"), along.column("slots") - along.column("stayed")
    some = slots > 0
    low, high = ratio_interval(
        switched[some, None], slots[some], resamples=options.bootstrap, seed=options.seed
    )
    share = layer.counts.by_expert() / layer.survey.tokens.sum()
    present = along.margins[np.isfinite(along.margins)]
    quantiles = np.percentile(present, QUANTILES) if len(present) else [np.nan] * len(QUANTILES)
    decisions, margin = along.column("decisions"), along.column("margin")
    total = max(decisions.sum(), 1)
    resampling = Resampling(resamples=options.bootstrap, seed=options.seed)
    reach = difference_reach(margin, decisions, resampling) if present.size else np.nan
    mean = margin.sum() / total if present.size else np.nan
    return {
        **layer.counts.names,
        "num_experts": layer.counts.num_experts,
        "top_k": layer.counts.top_k,
        "switch_rate": switched.sum() / max(slots.sum(), 1),
        "switch_low": low[0],
        "switch_high": high[0],
        "switch_shuffled": 1 - along.column("shuffled").sum() / max(slots.sum(), 1),
        "switch_independent": 1 - np.square(share).sum() / share.sum(),
        "margin": mean,
        "margin_low": mean - reach,
        "margin_high": mean + reach,
        **{f"margin_p{q:02d}": v for q, v in zip(QUANTILES, quantiles, strict=True)},
        "negative_margins": float((present < 0).mean()) if present.size else np.nan,
        "n_tokens": int(along.column("tokens").sum()),
        "n_documents": layer.documents,
        "seed": options.seed,
    }


def expert_table(layer: Layer) -> pd.DataFrame:
    """Share of every expert as `routing` has it; for those never used, three over n at most."""
    table = share_table(layer.counts, layer.survey, [], layer.routing_options)
    unused = table["tokens"] == 0
    most = min(1.0, _RULE_OF_THREE / independent_tokens(layer))
    return table.drop(columns="domain").assign(
        low=table["low"].mask(unused, 0.0), high=table["high"].mask(unused, most)
    )


def shown_document(survey: Survey, options: HealthOptions) -> int:
    """The one that was asked for, or the first that is long enough, or else the longest.

    Raises:
        OptionError: The one that was asked for has no token in the capture.
    """
    if options.document is not None:
        if not 0 <= options.document < len(survey.tokens) or not survey.tokens[options.document]:
            raise OptionError(
                "the capture has no token of this document",
                got=options.document,
                expected=f"0 to {len(survey.tokens) - 1}",
            )
        return options.document
    return int(np.minimum(survey.tokens, options.shown_tokens).argmax())


def along_table(
    capture: Capture, layer: int, document: int, read: Reader, options: HealthOptions
) -> pd.DataFrame:
    """Experts of the first tokens of one document: one row per token and expert."""
    names = {"stack": capture.stack, "layer": layer, "document": document}
    frames: list[pd.DataFrame] = []
    found = 0
    for shard in capture.token_shards():
        here = np.flatnonzero(shard.documents.numpy() == document)[: options.shown_tokens - found]
        used = used_by(
            shard.experts(layer).numpy()[here], int(capture.layer_facts(layer)["num_experts"])
        )
        token, expert = np.nonzero(used)
        texts = np.array([read([i]) for i in shard.token_ids.numpy()[here].tolist()], dtype=object)
        frame = {"position": token + found, "expert": expert, "token": texts[token]}
        frames.append(pd.DataFrame(names | frame))
        found += len(here)
        if len(here) and found == options.shown_tokens:
            break
    return pd.concat(frames, ignore_index=True)
