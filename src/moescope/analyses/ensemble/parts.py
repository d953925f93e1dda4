"""What adds up to the output of a sparse block, for the recorded tokens of a capture."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from moescope.captures.places import Place
from moescope.captures.read import Capture
from moescope.captures.shards import read_tensor
from moescope.decoding.columns import terms_of
from moescope.models.view import MoELayer

_BYTES_AT_ONCE = 1 << 26  # of the outputs of all chosen experts, in fp32


@dataclass(frozen=True, eq=False, kw_only=True)
class Chosen:
    """Which experts the tokens used, and which of them are held against all."""

    experts: Int64[Tensor, "tokens top_k"]
    """The experts used; -1 where a slot was not used."""
    weights: Float[Tensor, "tokens top_k"]
    """Their weights."""
    slots: dict[str, Int64[Tensor, " tokens"]]
    """Slot of the expert of the largest weight (`top`), of the smallest (`lowest`), and of one at
    random (`random`), among those used."""

    @classmethod
    def of(cls, capture: Capture, layer: int, tokens: int, seed: int) -> "Chosen":
        """Those of the first tokens of a capture."""
        experts, weights = [], []
        for part, shard in capture.routing_shards(layer):
            if part.start >= tokens:
                break
            experts.append(shard.experts[: tokens - part.start])
            weights.append(shard.weights[: tokens - part.start].float())
        found, mass = torch.cat(experts), torch.cat(weights)
        unused = found < 0
        numbers = torch.rand(found.shape, generator=torch.Generator().manual_seed(seed))
        slots = {
            "top": mass.masked_fill(unused, -torch.inf).argmax(1),
            "random": numbers.masked_fill(unused, -1).argmax(1),
            "lowest": mass.masked_fill(unused, torch.inf).argmin(1),
        }
        return cls(experts=found, weights=mass, slots=slots)


Parts = dict[str, Float[Tensor, "tokens hidden"]]
"""By name, in fp32: `residual`, the stream before the block and its norm; `input`, after the norm;
`shared`, output of the shared expert, if there is one; `all`, the weighted sum of the experts that
were used; `top`, `random` and `lowest`, one of its terms."""


def parts_of(capture: Capture, layer: MoELayer, chosen: Chosen) -> Iterator[tuple[Tensor, Parts]]:
    """Tokens, and their parts, so many at a time as fit in memory.

    Only tokens of whole rows come: the others in a capture are chosen by their experts. Tokens
    that no expert had capacity for are left out.
    """
    size = max(1, _BYTES_AT_ONCE // (4 * chosen.experts.shape[1] * layer.hidden_size))
    for tokens, inputs, residual in _recorded(capture, layer):
        used = (chosen.experts[tokens] >= 0).any(1)
        for some in torch.split(used.nonzero()[:, 0], size):
            yield tokens[some], _parts(layer, chosen, tokens[some], inputs[some], residual[some])


def _recorded(capture: Capture, layer: MoELayer) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, inputs and residual of the whole rows, shard by shard."""
    place = Place.of(layer)
    shards = [e for e in capture.manifest["shards"] if e["kind"] == "rows" and place.within(e)]
    for entry in shards:
        tokens, inputs, residual = (
            read_tensor(capture.folder, entry, place.tensor(name))
            for name in ("tokens", "inputs", "residual")
        )
        yield tokens, inputs, residual


def _parts(
    layer: MoELayer, chosen: Chosen, tokens: Tensor, inputs: Tensor, residual: Tensor
) -> Parts:
    x = _beside(layer, inputs)
    terms = terms_of(layer, x, chosen.experts[tokens], chosen.weights[tokens]).cpu()
    rows = torch.arange(len(tokens))
    parts = {name: terms[rows, slot[tokens]] for name, slot in chosen.slots.items()}
    parts |= {"all": terms.sum(1), "input": inputs.float(), "residual": residual.float()}
    shared = layer.shared_output(x)
    return parts if shared is None else parts | {"shared": shared.float().cpu()}


def _beside(layer: MoELayer, tensor: Tensor) -> Tensor:
    """A tensor on the device and in the dtype of the router, unless that is offloaded."""
    weight = layer.router_weight
    return tensor.to(weight.dtype) if weight.is_meta else tensor.to(weight)
