"""Adapters between experts of any layers of a run: fitted once, kept in its folder.

    RUN/results/fits/KEY/L1E0-to-L4E3.*              a fit: see `moescope.analyses.fit_records`
    RUN/results/fits/KEY/TARGETS/L1E0-to-L4E3.*      a fit with controls, drawn from these targets
    RUN/results/fits/KEY/inputs-L4.safetensors       what the experts of a layer see there

KEY names everything that a fit depends on, but for the experts.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from moescope.alignment.candidates import Workshop
from moescope.alignment.controls import linear_map, same_output_space
from moescope.alignment.held_out import HeldOut
from moescope.alignment.options import FitOptions
from moescope.alignment.outcomes import Label, Outcome
from moescope.alignment.pairs import fit_pairs
from moescope.alignment.randomness import generator
from moescope.alignment.samples import Samples
from moescope.analyses.align.tokens import Tokens, held_out_documents
from moescope.analyses.expert_tensors import ExpertTensors
from moescope.analyses.fit_records import FitFolder, Fitted, Source, Target
from moescope.analyses.material import Material
from moescope.captures.read import Recorded
from moescope.experts.adapter import Adapter
from moescope.experts.weights import ExpertWeights
from moescope.interventions import Expert, substitute

FITS_VERSION = 1
"""Raised with every change of mathematics, so that no adapter fitted before it is reused."""
CONTROLS_VERSION = 1
"""Raised with every change of what is kept of controls; fits without them go on."""
__all__ = ["FITS_VERSION", "Fits", "Fitted", "Source", "Target"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fits:
    """The adapters of one run, capture and set of options; tokens are split by document."""

    material: Material
    """Model and capture, with inputs of the experts' own samples."""
    tokens: Tokens
    """Which tokens train, and which are held out."""
    options: FitOptions
    """How to fit."""

    @classmethod
    def of(
        cls,
        material: Material,
        options: FitOptions,
        *,
        held_out_share: float = 0.2,
        max_tokens: int = 5_000,
    ) -> "Fits":
        """Those whose held-out documents are a share of every domain's; seeds are the options'."""
        capture = material.capture
        tokens = Tokens(
            capture=capture,
            held_out=held_out_documents(capture, held_out_share, options.seed),
            most=max_tokens,
            seed=options.seed,
        )
        return cls(material=material, tokens=tokens, options=options)

    def between(self, source: Source, targets: Sequence[Target]) -> dict[Target, Fitted]:
        """Adapters that let each target stand in for the source; fits only what is missing.

        Raises:
            CaptureError: The capture lacks inputs, or one of the layers.
            OptionError: There is no such expert.
        """
        if missing := self.missing(source, targets):
            self._fit(source, missing)
        kept = self._kept(targets)
        return {target: kept.read(source, target) for target in targets}

    def missing(self, source: Source, targets: Sequence[Target]) -> list[Target]:
        """Those that `between` has to fit: with controls all or none, as `_kept` says."""
        kept = self._kept(targets)
        missing = [target for target in targets if not kept.holds(source, target)]
        return list(targets) if missing and self.options.controls else missing

    def samples(self, source: Source) -> tuple[Samples, Samples]:
        """What the source does, in fp32: on the training documents, and on the held-out ones."""
        layer = self.material.model.layer(source.layer)
        layer.check_experts([source.expert])
        if source.layer not in self._recorded:
            self._recorded.clear()  # one layer at a time
            capture, experts = self.tokens.capture, range(layer.num_experts)
            self._recorded[source.layer] = capture.expert_samples(source.layer, experts)
        recorded = self._recorded[source.layer][source.expert]
        return self.tokens.samples(layer, source.expert, recorded, None)

    def inner(self, source: Source) -> tuple[Samples, Samples]:
        """Its training tokens: those that weights are trained on, and those set aside to choose."""
        train, _ = self.samples(source)
        name = generator(self.options.seed, str(source), "inner tokens")
        return train.split(self.options.solver.inner_share, name)

    def linear(self, source: Source) -> Adapter:
        """The best linear map in the place of the source: no expert stands behind it."""
        return linear_map(*self.inner(source))

    def mean(self, source: Source) -> Float[Tensor, " hidden"]:
        """Mean output of the source over its training tokens."""
        return self.samples(source)[0].outputs.mean(0)

    def substituting(self, fitted: Fitted) -> AbstractContextManager[None]:
        """Have the target compute the tokens of the source, behind the adapter."""
        assert fitted.adapter is not None
        target: Expert | ExpertWeights = self._expert(fitted.target)
        if fitted.target.random is not None:
            target = self._weights(fitted.target)
        return substitute(self._expert(fitted.source), target, fitted.adapter)

    def inputs(self, target: Target, rows: int | None = None) -> Float[Tensor, "rows hidden"]:
        """Random inputs that a target has in its own layer, of training documents, in fp32."""
        self.material.model.layer(target.layer).check_experts([target.expert])
        return self._inputs.of(target.layer, target.expert, rows)

    def weights(self, of: Source | Target) -> ExpertWeights:
        """Those of an expert, or of a random one in its place, in fp32 on the CPU."""
        target = Target(*of)
        return self._weights(target).to(dtype=torch.float32, device="cpu")

    def _fit(self, source: Source, targets: Sequence[Target]) -> None:
        train, held_out = self.samples(source)
        names = {str(target): target for target in targets}
        inputs = {name: self.inputs(target) for name, target in names.items()}
        inputs = {name: x for name, x in inputs.items() if len(x)}
        weights = {name: self._weights(target) for name, target in names.items()}
        own = self._weights(Target(*source))
        outcomes: dict[Label, Outcome] = {}
        found = fit_pairs(
            train,
            held_out,
            weights,
            source=own,
            source_name=str(source),
            target_inputs=inputs,
            options=self.options,
            outcomes=outcomes,
        )
        held = HeldOut(held_out, train.outputs.mean(0))
        workshop = Workshop.of(train, weights, inputs, own, str(source), self.options)
        kept, inner_fvu = self._kept(targets), self._inner_error(source)
        for name, target in names.items():
            fit, random = found[name], {}
            if outcomes and self.options.controls:
                labels = workshop.controls(name)
                for kind in (labels.same_output_space, labels.all_random):
                    errors = [held.share(outcomes[label].errors) for label in kind]
                    random[str(kind[0][0])] = errors
            fitted = Fitted(
                source=source,
                target=target,
                adapter=fit.adapter,
                inner_fvu=inner_fvu(target, fit.adapter),
                row=fit.row(),
                random=random,
            )
            kept.write(fitted)

    def _inner_error(self, source: Source) -> Callable[[Target, Adapter | None], float]:
        """Of what is kept: a fit whose curve came lower may have lost to the constant adapter."""
        trained, inner = self.inner(source)
        held = HeldOut(inner, trained.outputs.mean(0))

        @torch.no_grad()
        def inner_fvu(target: Target, adapter: Adapter | None) -> float:
            if adapter is None:
                return math.nan
            return held.fvu(self.weights(target)(adapter(inner.inputs)))

        return inner_fvu

    def _expert(self, of: Source | Target) -> Expert:
        return self.material.model.layer(of.layer), of.expert

    def _weights(self, target: Target) -> ExpertWeights:
        weights = self.material.model.layer(target.layer).expert_weights(target.expert)
        if target.random is None:
            return weights
        itself = str(target._replace(random=None))
        return same_output_space(weights, self.options.seed, itself)[target.random]

    @cached_property
    def _recorded(self) -> dict[int, Mapping[int, Recorded]]:
        return {}

    def _kept(self, targets: Sequence[Target]) -> FitFolder:
        """The fits of these targets.

        Random experts are drawn from all targets of a call, so that with controls the numbers of a
        pair depend on its company: those of every company lie apart.
        """
        if not self.options.controls:
            return FitFolder(folder=self._folder)
        company = " ".join(sorted(map(str, targets)))
        digest = hashlib.sha256(company.encode()).hexdigest()[:12]
        return FitFolder(folder=self._folder / digest)

    @cached_property
    def _folder(self) -> Path:
        key = {
            "version": FITS_VERSION,
            "capture": self.tokens.capture.digest,
            "held_out": self.tokens.held_out.tolist(),
            "most": self.tokens.most,
            "tokens_seed": self.tokens.seed,
            "options": asdict(self.options),
        }
        if self.options.controls:
            key["controls"] = CONTROLS_VERSION
        return self.material.run.parts_folder("fits", key)

    @cached_property
    def _inputs(self) -> ExpertTensors:
        def of_layer(number: int) -> Mapping[int, Tensor]:
            experts = range(self.material.model.layer(number).num_experts)
            return self.tokens.target_inputs(number, experts)

        return ExpertTensors(folder=self._folder, name="inputs", compute=of_layer)
