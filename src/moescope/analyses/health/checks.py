"""The verdicts of `health`: each known failure held against its null, layer by layer.

A verdict is "no sign", "sign: ..." with what was seen, or "cannot tell: ..." with what is missing.
Chance brings a sign to a model without the failure in one of twenty runs at most, for all layers
of a check together. Where the failure itself is chance (a router blind to the token or to the
domain), it is one of twenty layers *with* the failure at most that is passed over, and finding
nothing is a sign only where little could have been missed.
"""

from collections.abc import Callable

import numpy as np

from moescope.analyses.health.failures import (
    blind_to_domain,
    blind_to_token,
    dead,
    unbalanced,
    undecided,
)
from moescope.analyses.health.layer import Layer, Seen
from moescope.analyses.health.text import alike_neighbours, worst_tokens
from moescope.measures.bootstrap import FEWEST_UNITS

NO_SIGN, SIGN, CANNOT_TELL = "no sign", "sign", "cannot tell"

CHECKS: dict[str, Callable[[Layer], Seen]] = {
    "unbalanced use": unbalanced,
    "dead experts": dead,
    "blind to the token": blind_to_token,
    "undecided router": undecided,
    "blind to the domain": blind_to_domain,
    "neighbours alike": alike_neighbours,
    "worst tokens apart": worst_tokens,
}
"""Every check by name."""


def check_rows(layer: Layer) -> list[dict[str, object]]:
    """One row per check: measure, null and verdict. Without losses, one check less."""
    obstacle = _obstacle(layer)
    rows = []
    for name, check in CHECKS.items():
        if check is worst_tokens and layer.along.by_loss is None:
            continue
        seen = check(layer) if layer.has_choice else Seen(measure="none", value=np.nan)
        verdict = _verdict(seen, obstacle or seen.obstacle)
        rows.append(
            {
                **layer.counts.names,
                "check": name,
                "measure": seen.measure,
                "value": seen.value,
                "reference": seen.reference,
                "reference_p95": seen.reference_p95,
                "low": seen.low,
                "high": seen.high,
                "p_corrected": seen.p_value,
                "state": verdict.partition(":")[0],
                "verdict": verdict,
                "n_tokens": int(layer.along.column("tokens").sum()),
                "n_documents": layer.documents,
                "seed": layer.options.seed,
            }
        )
    return rows


def _obstacle(layer: Layer) -> str:
    """Why no check of this layer has a verdict; empty if they have."""
    if not layer.has_choice:
        return "every token uses every expert"
    if layer.documents < FEWEST_UNITS:
        return f"too few documents: {layer.documents}, not {FEWEST_UNITS}"
    return ""


def _verdict(seen: Seen, obstacle: str) -> str:
    if obstacle:
        return f"{CANNOT_TELL}: {obstacle}"
    return f"{SIGN}: {seen.evidence}" if seen.failed else NO_SIGN
