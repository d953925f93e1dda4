"""The states that a lens decodes: the residual stream with parts of what a sparse block adds."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from moescope.decoding.endings import Ending, first_tensor
from moescope.models.observe import Observation, observe
from moescope.models.readout import Readout
from moescope.models.view import MoELayer

Kind = Literal["residual", "shared", "top", "output", "added", "alone"]


class Column(NamedTuple):
    """Which part of a layer is decoded.

    r is the residual stream before the block, S the shared expert.
    """

    kind: Kind
    """`residual`, r; `shared`, r + S; `top`, r + S + the `rank` experts of the largest weights;
    `output`, what the layer returns; `added`, r + one expert; `alone`, one expert."""
    rank: int = 0
    """Number of experts, or place of the one expert by weight, from 1."""

    @property
    def has_stream(self) -> bool:
        """Whether it is a state of the residual stream, not an expert by itself."""
        return self.kind != "alone"

    def label(self, layer: MoELayer) -> str:
        """As figures have it."""
        stream = "r + S" if layer.has_shared_expert else "r"
        return {
            "output": "layer output",
            "residual": "r",
            "shared": "r + S",
            "top": f"{stream} + top {self.rank}",
            "added": f"r + expert {self.rank}",
            "alone": f"expert {self.rank}",
        }[self.kind]


def columns_of(layer: MoELayer) -> list[Column]:
    """All columns of a layer, in the order of figures; without `shared` where nothing is shared."""
    ranks = range(1, layer.top_k + 1)
    return [
        Column("residual"),
        *([Column("shared")] if layer.has_shared_expert else []),
        *(Column("top", rank) for rank in ranks),
        Column("output"),
        *(Column("added", rank) for rank in ranks),
        *(Column("alone", rank) for rank in ranks),
    ]


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerStates:
    """What passed through one layer, at the positions that count."""

    ending: Ending
    """The layer and what it adds to the stream."""
    residual: Float[Tensor, "tokens hidden"]
    """The stream before the block and its norm."""
    input: Float[Tensor, "tokens hidden"]
    """What the block was given."""
    output: Float[Tensor, "tokens hidden"]
    """The stream after the layer."""
    experts: Int64[Tensor, "tokens top_k"]
    """Experts used, those of the largest weights first; -1 where a slot was not used."""
    weights: Float[Tensor, "tokens top_k"]
    """Their weights."""

    def __getitem__(self, tokens: slice) -> "LayerStates":
        return LayerStates(
            ending=self.ending,
            residual=self.residual[tokens],
            input=self.input[tokens],
            output=self.output[tokens],
            experts=self.experts[tokens],
            weights=self.weights[tokens],
        )

    def used(self, column: Column) -> Bool[Tensor, " tokens"]:
        """Where the column exists: a token may have used fewer experts than others."""
        if column.kind in ("added", "alone"):
            return self.experts[:, column.rank - 1] >= 0
        return torch.ones_like(self.experts[:, 0], dtype=torch.bool)

    def columns(self) -> Iterator[tuple[Column, Float[Tensor, "tokens hidden"]]]:
        """Every column with its states, in fp32.

        Where the layer does not simply add the output of its block, those that need it are left
        out.
        """
        yield Column("output"), self.output.float()
        yield Column("residual"), self.residual.float()
        adds, layer = self.ending.adds, self.ending.layer
        if adds is None:
            return
        residual = self.residual.float()
        terms = terms_of(layer, self.input, self.experts, self.weights)
        total = torch.zeros_like(residual)
        shared = layer.shared_output(self.input)
        if shared is not None:
            total = shared.float()
            yield Column("shared"), residual + adds(total)
        for number, term in enumerate(terms.unbind(1), start=1):
            total = total + term
            alone = adds(term)
            yield Column("top", number), residual + adds(total)
            yield Column("added", number), residual + alone
            yield Column("alone", number), alone


def terms_of(
    layer: MoELayer,
    x: Float[Tensor, "tokens hidden"],
    experts: Int64[Tensor, "tokens top_k"],
    weights: Float[Tensor, "tokens top_k"],
) -> Float[Tensor, "tokens top_k hidden"]:
    """What each of its experts adds to the output of the block for a token, in fp32.

    An expert is computed for the tokens that used it, and no others; unused slots add nothing.
    """
    chosen, mass = experts.to(x.device), weights.to(x)
    terms = x.new_zeros(*experts.shape, x.shape[1], dtype=torch.float32)
    for expert in torch.unique(chosen[chosen >= 0]).tolist():
        tokens, slots = torch.where(chosen == expert)
        function = partial(_output, layer, expert)
        terms[tokens, slots] = layer.weigh(function, x[tokens], mass[tokens, slots]).to(terms)
    return terms


def _output(layer: MoELayer, expert: int, x: Tensor) -> Tensor:
    return layer.expert_outputs(x, [expert])[0].to(x)


@torch.no_grad()
def watch(
    readout: Readout,
    endings: Sequence[Ending],
    input_ids: Int[Tensor, "rows length"],
    attention_mask: Int[Tensor, "rows length"],
    positions: Int64[Tensor, " counted"],
) -> tuple[Float[Tensor, "counted hidden"], list[LayerStates]]:
    """One forward pass without the head.

    Args:
        readout: Of the model.
        endings: The layers to watch.
        input_ids: Token ids.
        attention_mask: 1 at tokens that count.
        positions: Which states to keep: position `p` of row `r` is `r * length + p`.

    Returns:
        The last state of the stream, and the states of each layer, in the order of `endings`.
    """
    observed: dict[MoELayer, Observation] = {}
    states: list[LayerStates] = []
    last: list[Tensor] = []

    def layer_ends(ending: Ending, _: nn.Module, __: object, output: object) -> None:
        observation = observed.pop(ending.layer)
        states.append(_states(ending, observation, first_tensor(output), positions))

    def norm_starts(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        last.append(_rows(arguments[0], positions))

    def note(observation: Observation) -> None:
        observed[observation.layer] = observation

    with (
        observe([ending.layer for ending in endings], note, residual=True),
        ExitStack() as stack,
    ):
        for ending in endings:
            hook = partial(layer_ends, ending)
            stack.callback(ending.module.register_forward_hook(hook).remove)
        stack.callback(readout.norm.register_forward_pre_hook(norm_starts).remove)
        readout.model.forward(input_ids, attention_mask)
    return last[-1], states


def _states(
    ending: Ending, seen: Observation, stream: Tensor, positions: Int64[Tensor, " counted"]
) -> LayerStates:
    """At the positions, experts in the order of their weights."""
    assert seen.residual is not None
    experts, weights = (_rows(t, positions) for t in (seen.routing.experts, seen.routing.weights))
    order = weights.masked_fill(experts < 0, -torch.inf).argsort(
        dim=1, descending=True, stable=True
    )
    return LayerStates(
        ending=ending,
        residual=_rows(seen.residual, positions),
        input=_rows(seen.input, positions),
        output=_rows(stream, positions),
        experts=experts.gather(1, order),
        weights=weights.gather(1, order),
    )


def _rows(tensor: Tensor, positions: Tensor) -> Tensor:
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    return rows[positions.to(rows.device)]
