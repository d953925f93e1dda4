"""Adapters trained on one domain each, and what they miss on every domain; kept by source.

RUN/results/ood/KEY/L1E0-half0-real-maths.safetensors     adapters
RUN/results/ood/KEY/L1E0-half0.parquet                    written last: the source is done
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from moescope.alignment.controls import linear_map, same_output_space
from moescope.alignment.held_out import HeldOut
from moescope.alignment.options import FitOptions
from moescope.alignment.pairs import fit_pairs
from moescope.alignment.randomness import generator
from moescope.alignment.result import AlignmentResult
from moescope.alignment.samples import Samples
from moescope.analyses.align.tokens import Tokens
from moescope.analyses.fits import Source
from moescope.analyses.ood.split import Work
from moescope.captures.read import Capture
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.errors import AlignmentError, OptionError
from moescope.experts.adapter import Adapter
from moescope.experts.weights import ExpertWeights
from moescope.models.view import MoELayer
from moescope.runs import read_table, write_atomically

Kind = Literal["real", "random", "linear"]
"""What stands behind an adapter: the target, a random expert in its place, or nothing."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Targets:
    """Experts of the target layer, and where their inputs lie."""

    capture: Capture
    """Of their inputs."""
    layer: MoELayer
    """The target layer."""
    experts: Sequence[int]
    """Those to choose from."""
    half: Int64[Tensor, " documents"]
    """To which half each document belongs."""
    random: int
    """Random experts in the place of the chosen one."""
    options: FitOptions
    """How to fit."""

    def weights(self, expert: int) -> ExpertWeights:
        """One of them."""
        return self.layer.expert_weights(expert)

    def randoms(self, expert: int) -> list[ExpertWeights]:
        """Random ones with its down projection."""
        name = f"L{self.layer.index}E{expert}"
        return same_output_space(self.weights(expert), self.options.seed, name)[: self.random]

    def inputs(self, domain: str, trained: int) -> Mapping[int, Float[Tensor, "tokens hidden"]]:
        """Their inputs in their own layer, in the training documents of a domain."""
        own = self.half == trained
        if domain != RESERVED_DOMAIN:
            number = self.capture.domains.index(domain)
            own &= self.capture.document_domains == number
        tokens = Tokens(
            capture=self.capture,
            held_out=~own,
            most=self.capture.num_tokens,
            seed=self.options.seed,
        )
        return tokens.target_inputs(self.layer.index, self.experts)


@dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """Adapters of one source expert, each trained on one domain."""

    folder: Path
    """Where they are kept."""
    source: Source
    """The expert that they imitate."""
    tested: int
    """The half that they were not trained on."""

    @property
    def errors(self) -> Path:
        """Squared errors of all of them by document."""
        return self.folder / f"{self.source}-half{self.tested}.parquet"

    def adapter(self, kind: Kind, domain: str) -> Path:
        """One of them; of several random experts the first."""
        return self.folder / f"{self.source}-half{self.tested}-{kind}-{domain}.safetensors"

    def read(self) -> pd.DataFrame:
        """What `train` measured."""
        return read_table(self.errors)

    def train(self, work: Work, targets: Targets) -> None:
        """Fit on every domain and on all, test on every domain, and keep it."""
        if self.errors.exists():
            return
        chosen, first = self._choose(work, targets)
        rows = []
        for domain in (RESERVED_DOMAIN, *work.domains):
            train = work.train(domain)
            inputs = targets.inputs(domain, 1 - self.tested)
            experts: dict[str, ExpertWeights] = {
                f"random{j}": weights for j, weights in enumerate(targets.randoms(chosen))
            }
            if domain != RESERVED_DOMAIN:
                experts["real"] = targets.weights(chosen)
            fits = self._fit(work, train, experts, inputs[chosen], targets.options)
            adapters = {name: (fits[name], expert) for name, expert in experts.items()}
            if domain == RESERVED_DOMAIN:
                adapters["real"] = (first, targets.weights(chosen))
            share = targets.options.solver.inner_share
            name = generator(targets.options.seed, str(self.source), domain, "linear map")
            linear = linear_map(*train.split(share, name))
            linear.save(self.adapter("linear", domain))
            adapters["real"][0].save(self.adapter("real", domain))
            for name_of, (adapter, expert) in adapters.items():
                rows += _errors(work, adapter, expert, {"adapter": name_of, "trained_on": domain})
            rows += _errors(work, linear, None, {"adapter": "linear", "trained_on": domain})
        found = pd.DataFrame(rows).assign(target=chosen, n_train=work.number)
        write_atomically(self.errors, found.to_parquet)

    def _choose(self, work: Work, targets: Targets) -> tuple[int, Adapter]:
        """The target that fits best on inner tokens of all domains, and its adapter."""
        train = work.train(RESERVED_DOMAIN)
        inputs = targets.inputs(RESERVED_DOMAIN, 1 - self.tested)
        others = [e for e in targets.experts if (targets.layer.index, e) != self.source]
        if not others:
            raise OptionError(
                f"expert {self.source} has nobody to stand in for it but itself",
                remedy="Name other experts: `target_experts`",
            )
        found = fit_pairs(
            train,
            work.tests(),
            {str(e): targets.weights(e) for e in others},
            source_name=str(self.source),
            target_inputs={str(e): inputs[e] for e in others if len(inputs[e])},
            options=targets.options,
        )
        inner = {e: min((p.fvu for p in found[str(e)].curve), default=math.inf) for e in others}
        best = min(inner, key=lambda e: inner[e])
        return best, _adapter(found[str(best)], self.source)

    def _fit(
        self,
        work: Work,
        train: Samples,
        experts: Mapping[str, ExpertWeights],
        inputs: Float[Tensor, "tokens hidden"],
        options: FitOptions,
    ) -> dict[str, Adapter]:
        found = fit_pairs(
            train,
            work.tests(),
            experts,
            source_name=str(self.source),
            target_inputs=dict.fromkeys(experts, inputs) if len(inputs) else {},
            options=options,
        )
        return {name: _adapter(fit, self.source) for name, fit in found.items()}


def _adapter(fit: AlignmentResult, source: Source) -> Adapter:
    if fit.adapter is None:
        raise AlignmentError(
            f"expert {source} cannot be imitated",
            got=fit.status,
            remedy="Name other experts: `source_experts`",
        )
    return fit.adapter


@torch.no_grad()
def _errors(
    work: Work, adapter: Adapter, expert: ExpertWeights | None, columns: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """By document of every domain: squared error, and squared distance from the domain's mean."""
    rows = []
    for domain in work.domains:
        test = work.test(domain)
        assert test.documents is not None
        held = HeldOut(test, work.mean(domain))
        given = adapter(test.inputs)
        if expert is not None:
            given = expert.to(dtype=torch.float32, device="cpu")(given)
        documents, counts = torch.unique(test.documents, return_counts=True)
        sums = zip(documents.tolist(), counts.tolist(), held.errors(given), held.total, strict=True)
        rows += [
            {**columns, "tested_on": domain, "document": document, "tokens": tokens}
            | {"error": float(error), "total": float(total)}
            for document, tokens, error, total in sums
        ]
    return rows
