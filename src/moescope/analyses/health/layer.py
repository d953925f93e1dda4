"""What the checks of `health` are given, and what they give back."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from moescope.analyses.health.counts import Along
from moescope.analyses.health.options import HealthOptions
from moescope.analyses.routing.counts import LayerCounts
from moescope.analyses.routing.options import RoutingOptions
from moescope.analyses.routing.survey import Survey
from moescope.measures.bootstrap import FEWEST_UNITS

LEVEL = 0.05
"""Of all layers of a check together."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """All that is known of one layer."""

    counts: LayerCounts
    """Use of the experts."""
    along: Along
    """Routing along the text."""
    survey: Survey
    """Documents."""
    domains: list[str]
    """Names of the kinds of text."""
    options: HealthOptions
    """Options of the analysis."""
    layers: int
    """Layers of all stacks, which is how many tests each check makes."""

    @property
    def has_choice(self) -> bool:
        """Whether there is an expert that a token does not use."""
        return self.counts.top_k < self.counts.num_experts

    @property
    def largest_divergence(self) -> float:
        """Bits between two texts whose experts are as far apart as can be."""
        return min(1.0, self.counts.num_experts / self.counts.top_k - 1)

    @property
    def documents(self) -> int:
        """Documents with tokens, of those that are kept apart."""
        return int((self.along.column("tokens") > 0).sum())

    @property
    def well_known(self) -> list[int]:
        """Domains with enough documents."""
        of_kept = self.survey.domain_of[self.survey.kept][self.along.column("tokens") > 0]
        sizes = np.bincount(of_kept, minlength=len(self.domains))
        return np.flatnonzero(sizes >= FEWEST_UNITS).tolist()

    @property
    def routing_options(self) -> RoutingOptions:
        """Those of the analysis whose tables are made here too."""
        options = self.options
        return RoutingOptions(
            permutations=options.permutations, bootstrap=options.bootstrap, seed=options.seed
        )


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a check saw."""

    measure: str
    """What was measured, with its unit."""
    value: float
    """What it is here."""
    reference: float = np.nan
    """What it would be, on average, under the null."""
    reference_p95: float = np.nan
    """95th percentile of it under the null."""
    low: float = np.nan
    """Lower 95% limit of the value."""
    high: float = np.nan
    """Upper one."""
    p_value: float = np.nan
    """How often the null does as much, corrected for all tests of the check."""
    failed: bool = False
    """Whether that is a sign."""
    evidence: str = ""
    """The sign in words."""
    obstacle: str = ""
    """What is missing for a verdict."""


def too_few_shuffles(layer: Layer, tests: int) -> str:
    """An obstacle where no p-value can be low enough for so many tests; empty if it can."""
    if tests / (1 + layer.options.permutations) <= LEVEL:
        return ""
    return f"too few shuffles for {tests} tests: raise --permutations"


def too_few_domains(layer: Layer, why: str) -> str:
    """An obstacle: what cannot be told with one kind of text."""
    return (
        f"{len(layer.well_known)} kinds of text have {FEWEST_UNITS} documents, and with fewer than "
        f"two {why}"
    )


def named(experts: Int[np.ndarray, " experts"]) -> str:
    """Their numbers, at most eight of them."""
    some = ", ".join(map(str, experts[:8].tolist()))
    more = f" and {len(experts) - 8} more" if len(experts) > 8 else ""
    return f"expert{'s' if len(experts) > 1 else ''} {some}{more}"
