"""Adapters between experts of any layers of a run: fitted once, kept in its folder.

    RUN/results/fits/KEY/L1E0-to-L4E3.safetensors       the adapter
    RUN/results/fits/KEY/L1E0-to-L4E3.json              written last: the pair is done

KEY names everything that a fit depends on, but for the experts.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moescope.alignment.controls import linear_map, same_output_space
from moescope.alignment.held_out import HeldOut
from moescope.alignment.options import FitOptions
from moescope.alignment.pairs import fit_pairs
from moescope.alignment.randomness import generator
from moescope.alignment.samples import Samples
from moescope.analyses.align.tokens import Tokens, held_out_documents
from moescope.analyses.material import Material
from moescope.captures.read import Recorded
from moescope.experts.adapter import Adapter
from moescope.experts.weights import ExpertWeights
from moescope.interventions import Expert, substitute
from moescope.runs import read_json, write_json

FITS_VERSION = 1
"""Raised with every change of mathematics, so that no adapter fitted before it is reused."""


class Source(NamedTuple):
    """An expert that is to be replaced."""

    layer: int
    """The model's own layer number."""
    expert: int
    """Its number within the layer."""

    def __str__(self) -> str:
        return f"L{self.layer}E{self.expert}"


class Target(NamedTuple):
    """An expert that is to stand in for it, or a random one in the place of that."""

    layer: int
    """The model's own layer number; it may be the layer of the source."""
    expert: int
    """Its number within the layer."""
    random: int | None = None
    """Which random expert with its down projection; None for itself."""

    def __str__(self) -> str:
        name = f"L{self.layer}E{self.expert}"
        return name if self.random is None else f"{name}-random{self.random}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A source and the target that is to stand in for it, behind its adapter."""

    source: Source
    target: Target
    adapter: Adapter | None
    """None where there are too few tokens or constant outputs."""
    inner_fvu: float
    """FVU on tokens set aside within the training documents: to choose by. NaN without adapter."""
    row: dict[str, Any]
    """The columns of `AlignmentResult`, errors on the held-out documents among them."""


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
        if missing := [target for target in targets if not self._record(source, target).exists()]:
            self._fit(source, missing)
        return {target: self._read(source, target) for target in targets}

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

    def _fit(self, source: Source, targets: Sequence[Target]) -> None:
        train, held_out = self.samples(source)
        inputs = {str(t): self._inputs(t) for t in targets}
        found = fit_pairs(
            train,
            held_out,
            {str(target): self._weights(target) for target in targets},
            source=self.material.model.layer(source.layer).expert_weights(source.expert),
            source_name=str(source),
            target_inputs={name: x for name, x in inputs.items() if len(x)},
            options=self.options,
        )
        for target in targets:
            fit, inner_fvu = found[str(target)], math.nan
            if fit.adapter is not None:
                fit.adapter.save(self._adapter(source, target))
                inner_fvu = self._inner_fvu(source, target, fit.adapter)
            record = {"inner_fvu": inner_fvu, "row": fit.row()}
            write_json(self._record(source, target), record)

    @torch.no_grad()
    def _inner_fvu(self, source: Source, target: Target, adapter: Adapter) -> float:
        """Of what is kept: a fit whose curve came lower may have lost to the constant adapter."""
        trained, inner = self.inner(source)
        expert = self._weights(target).to(dtype=torch.float32, device="cpu")
        return HeldOut(inner, trained.outputs.mean(0)).fvu(expert(adapter(inner.inputs)))

    def _read(self, source: Source, target: Target) -> Fitted:
        record = read_json(self._record(source, target))
        path = self._adapter(source, target)
        row = {name: _number(value) for name, value in record["row"].items()}
        return Fitted(
            source=source,
            target=target,
            adapter=Adapter.load(path) if path.exists() else None,
            inner_fvu=_number(record["inner_fvu"]),
            row=row,
        )

    def _expert(self, of: Source | Target) -> Expert:
        return self.material.model.layer(of.layer), of.expert

    def _weights(self, target: Target) -> ExpertWeights:
        weights = self.material.model.layer(target.layer).expert_weights(target.expert)
        if target.random is None:
            return weights
        itself = str(target._replace(random=None))
        return same_output_space(weights, self.options.seed, itself)[target.random]

    def _inputs(self, target: Target) -> Float[Tensor, "tokens hidden"]:
        if target.layer not in self._inputs_by_layer:
            experts = range(self.material.model.layer(target.layer).num_experts)
            self._inputs_by_layer[target.layer] = self.tokens.target_inputs(target.layer, experts)
        return self._inputs_by_layer[target.layer][target.expert]

    @cached_property
    def _inputs_by_layer(self) -> dict[int, Mapping[int, Tensor]]:
        return {}

    @cached_property
    def _recorded(self) -> dict[int, Mapping[int, Recorded]]:
        return {}

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
        return self.material.run.parts_folder("fits", key)

    def _record(self, source: Source, target: Target) -> Path:
        return self._folder / f"{source}-to-{target}.json"

    def _adapter(self, source: Source, target: Target) -> Path:
        return self._folder / f"{source}-to-{target}.safetensors"


def _number(value: Any) -> Any:
    """JSON has no NaN."""
    return math.nan if value is None else value
