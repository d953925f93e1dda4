"""The cheap part: which experts of other layers deserve a converged fit, for one imitated expert.

Only training documents are looked at, so that the held-out ones stay a fair test.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from moescope.alignment.candidates import Candidate, Workshop
from moescope.alignment.checks import refusal
from moescope.alignment.outcomes import Label, Outcome
from moescope.alignment.randomness import generator
from moescope.alignment.samples import Samples
from moescope.alignment.solver import Fit
from moescope.alignment.trainer import converged_work, train_groups
from moescope.analyses.atlas.options import AtlasOptions, shortlisted
from moescope.analyses.expert_tensors import ExpertTensors
from moescope.analyses.fits import Fits, Source, Target

ROWS = 256
"""Tokens of each expert that outputs are compared on."""


def overlap(one: Float[Tensor, "tokens hidden"], other: Float[Tensor, "others hidden"]) -> float:
    """Cosine of two covariances of outputs; NaN where one of them does not vary.

    `tr(C D) / (|C| |D|)`: 1 where outputs vary in the same directions by the same proportions, 0
    where in orthogonal ones (the RV coefficient of Robert and Escoufier 1976, features for
    samples). It does not depend on which input gave which output: an adapter may change that.
    """
    one, other = one - one.mean(0), other - other.mean(0)
    norms = float((one @ one.mT).norm() * (other @ other.mT).norm())
    return float((one @ other.mT).square().sum()) / norms if norms > 0 else math.nan


@dataclass(frozen=True, kw_only=True, eq=False)
class Screening:
    """Everything but the imitated expert."""

    fits: Fits
    """Inputs and weights of the targets."""
    experts: Mapping[int, Sequence[int]]
    """Experts of each layer that may imitate."""
    outputs: ExpertTensors
    """What each of them makes of `ROWS` inputs in its own layer."""
    options: AtlasOptions
    """How to screen."""

    def candidates(self, source: Source) -> list[Target]:
        """The targets of other layers."""
        others = {layer: found for layer, found in self.experts.items() if layer != source.layer}
        return [Target(layer, expert) for layer, found in others.items() for expert in found]

    def screen(self, source: Source, train: Samples, held_out: Samples) -> pd.DataFrame:
        """A row per target: overlap, error of its short fit, place within its layer.

        Args:
            source: The imitated expert.
            train: What it does on the training documents.
            held_out: The same of the others; only their number counts here.
        """
        few = train.first(self.options.short_tokens, generator(self.options.seed, str(source)))
        candidates = self.candidates(source)
        if refusal(train, held_out) is not None or refusal(few, held_out) is not None:
            return _table(source, candidates, {}, {})
        own, outputs = few.outputs[:ROWS], self.outputs
        overlaps = {t: overlap(own, outputs.of(t.layer, t.expert)) for t in candidates}
        chosen = self._shortlist(overlaps)
        return _table(source, candidates, overlaps, self._short_fits(source, few, chosen))

    def _shortlist(self, overlaps: Mapping[Target, float]) -> list[Target]:
        """Those of the largest overlap in every layer."""
        chosen = []
        for layer in dict.fromkeys(target.layer for target in overlaps):
            here = [target for target in overlaps if target.layer == layer]
            # NaN is no overlap.
            here.sort(key=lambda target: -np.nan_to_num(overlaps[target], nan=-1.0))
            chosen += here[: shortlisted(len(here), self.options)]
        return chosen

    def _short_fits(
        self, source: Source, few: Samples, chosen: Sequence[Target]
    ) -> dict[Target, float]:
        """Least FVU of each short fit on the inner tokens."""
        options = self.options.short_fit()
        inputs = {str(target): self.fits.inputs(target, ROWS) for target in chosen}
        workshop = Workshop.of(
            few,
            {str(target): self.fits.weights(target) for target in chosen},
            {name: x for name, x in inputs.items() if len(x)},
            self.fits.weights(source),
            str(source),
            options,
        )
        outcomes: dict[Label, Outcome] = {}
        work = converged_work(workshop.task(options), only_fit)
        train_groups(workshop.groups(), work, outcomes, chunk_bytes=options.solver.chunk_bytes)
        found = {}
        for target in chosen:
            fit = outcomes["pair", str(target)].fit
            assert fit is not None
            found[target] = min(point.fvu for point in fit.curve)
        return found


def only_fit(label: Label, candidate: Candidate, fit: Fit) -> Outcome:
    """The fit alone: its error on the inner tokens is in its curve."""
    return Outcome(errors=np.zeros(0), fit=fit)


def _table(
    source: Source,
    candidates: Sequence[Target],
    overlaps: Mapping[Target, float],
    short: Mapping[Target, float],
) -> pd.DataFrame:
    """Places count from 1 within a target layer: short fits first, then the rest by overlap."""
    frame = pd.DataFrame(
        {
            "source_layer": source.layer,
            "source_expert": source.expert,
            "target_layer": [target.layer for target in candidates],
            "target_expert": [target.expert for target in candidates],
            "overlap": [overlaps.get(target, math.nan) for target in candidates],
            "short_fvu": [short.get(target, math.nan) for target in candidates],
        }
    )
    by_merit = frame.sort_values(["short_fvu", "overlap"], ascending=[True, False], kind="stable")
    frame["place"] = by_merit.groupby("target_layer").cumcount() + 1
    return frame
