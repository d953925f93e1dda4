"""What each expert adds to a logit by itself, with the scale of the final norm fixed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from moescope.analyses.attribute.passes import PromptBatch
from moescope.analyses.attribute.path import direct_rates, final_states
from moescope.decoding.columns import terms_of
from moescope.errors import ModelError
from moescope.interventions.functions import Expert
from moescope.measures.attribution import Norm
from moescope.models.observe import Observation, observe
from moescope.models.readout import Readout
from moescope.models.view import MoELayer, MoEModel

_UNEXPLAINED, _HALF_UNEXPLAINED = 1e-4, 2e-2
"""Largest relative rest of a final norm that is taken for a LayerNorm or RMSNorm."""


class Added(NamedTuple):
    """What the experts of a layer add to logits, at the last position of prompts."""

    experts: Int64[Tensor, "prompts top_k"]
    """The experts that were used; -1 for none."""
    logits: Float[Tensor, "prompts top_k answers"]
    """What each adds."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Contributions:
    """Of the parts of a model to the logits of answers, at the last position of prompts.

    A logit is meant before the soft-cap and above the mean over the vocabulary, since what is added
    to all logits changes nothing. All in fp32 on the CPU. What no expert adds comes from
    embeddings, attention, dense networks and biases, taken together.
    """

    whole: Float[Tensor, "prompts answers"]
    """The logits."""
    routed: dict[MoELayer, Added]
    """What routed experts add, in layers from which anything arrives directly."""
    shared: dict[MoELayer, Float[Tensor, "prompts answers"]]
    """The same of shared experts within a block."""

    def of(self, expert: Expert) -> Float[Tensor, "prompts answers"]:
        """Of one expert; zero for prompts whose last token does not use it."""
        found = torch.zeros_like(self.whole)
        if expert[0] in self.routed:
            experts, logits = self.routed[expert[0]]
            prompts, slots = torch.where(experts == expert[1])
            found[prompts] = logits[prompts, slots]
        return found


def contributions(
    model: MoEModel, batches: Sequence[PromptBatch], answers: Int64[Tensor, " answers"]
) -> Contributions:
    """One pass over prompts (direct logit attribution, Elhage et al. 2021).

    Args:
        model: The model.
        batches: The prompts; results have their order before they were put into batches.
        answers: Tokens whose logits are wanted.

    Raises:
        ModelError: No final norm and unembedding were found, the norm is neither LayerNorm nor
            RMSNorm, or the output of a block does not reach it as a multiple of itself.
    """
    readout = Readout.of(model)
    reading = _Reading.of(model, readout, answers)
    parts = [reading.batch(batch) for batch in batches]
    order = torch.cat([batch.numbers for batch in batches]).argsort()
    return Contributions(
        whole=torch.cat([part.whole for part in parts])[order],
        routed={
            layer: Added(*(torch.cat(tensors)[order] for tensors in zip(*added, strict=True)))
            for layer in parts[0].routed
            if (added := [part.routed[layer] for part in parts])
        },
        shared={
            layer: torch.cat([part.shared[layer] for part in parts])[order]
            for layer in parts[0].shared
        },
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Reading:
    """What a state of the residual stream means for the logits of some tokens."""

    model: MoEModel
    readout: Readout
    rates: dict[MoELayer, float]
    norm: Norm
    directions: Float[Tensor, "answers hidden"]
    constant: Float[Tensor, " answers"]

    @classmethod
    def of(
        cls, model: MoEModel, readout: Readout, answers: Int64[Tensor, " answers"]
    ) -> "_Reading":
        hidden = model.layers[-1].hidden_size
        norm = Norm.of(readout.normed, hidden)
        directions = _directions(readout, hidden, answers)
        biases = readout.unembed(torch.zeros(1, hidden))[0].float().cpu()
        return cls(
            model=model,
            readout=readout,
            rates={layer: rate for layer, rate in direct_rates(model, readout).items() if rate},
            norm=norm,
            directions=directions,
            constant=directions @ norm.bias + biases[answers] - biases.mean(),
        )

    def batch(self, batch: PromptBatch) -> Contributions:
        """Contributions of the prompts of a batch, in its order."""
        seen: list[Observation] = []
        with final_states(self.readout) as states, observe(list(self.rates), seen.append):
            batch.run(self.model)
        last = batch.last(states[0])
        scale = self._one_over_scale(last)
        routed, shared = {}, {}
        for one in seen:
            layer, rate = one.layer, self.rates[one.layer] * scale
            x, experts, weights = (
                batch.last(tensor.reshape(len(last), -1, tensor.shape[-1]))
                for tensor in (one.input, one.routing.experts, one.routing.weights)
            )
            terms = terms_of(layer, x, experts, weights).cpu()
            routed[layer] = Added(experts.cpu(), rate[:, None, None] * self._to_logits(terms))
            beside = layer.shared_output(x) if layer.shared_in_block else None
            if beside is not None:
                shared[layer] = rate[:, None] * self._to_logits(beside.float().cpu())
        whole = scale[:, None] * self._to_logits(last.float().cpu()) + self.constant
        return Contributions(whole=whole, routed=routed, shared=shared)

    def _to_logits(self, states: Float[Tensor, "*parts hidden"]) -> Float[Tensor, "*parts answers"]:
        logits: Tensor = self.norm.fixed(states) @ self.directions.T
        return logits

    def _one_over_scale(self, last: Float[Tensor, "rows hidden"]) -> Float[Tensor, " rows"]:
        half = last.dtype.itemsize < torch.float32.itemsize
        normed = self.readout.normed(last).float().cpu()
        rates, left = self.norm.rates(last.float().cpu(), normed)
        if not left.max() <= (_HALF_UNEXPLAINED if half else _UNEXPLAINED):
            raise ModelError(
                "direct contributions are not defined: the final norm is no LayerNorm or RMSNorm",
                got=f"a {type(self.readout.norm).__name__}",
            )
        return rates


def _directions(
    readout: Readout, hidden: int, answers: Int64[Tensor, " answers"]
) -> Float[Tensor, "answers hidden"]:
    """Rows of the unembedding, with its scale, above their mean over the vocabulary.

    As gradients of logits at zero, where no soft-cap bends them.
    """
    with torch.enable_grad():
        normed = torch.zeros(len(answers) + 1, hidden, requires_grad=True)
        logits = readout.unembed(normed)
        rows = torch.arange(len(answers), device=logits.device)
        wanted = logits[rows, answers.to(logits.device)].sum() + logits[-1].float().mean()
        (gradient,) = torch.autograd.grad(wanted, normed)
    directions: Tensor = gradient[:-1] - gradient[-1]
    return directions
