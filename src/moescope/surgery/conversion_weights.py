"""The tensors of a converted model: those of the dense one, with its neurons dealt to experts."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from moescope.errors import ModelError

_DENSE = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


@dataclass(frozen=True, eq=False, kw_only=True)
class Deal:
    """Which neurons of the dense feed-forward layer each expert gets, and what the router is."""

    neurons: Int[Tensor, "experts neurons"]
    """Numbers of dense neurons, the same in every layer."""
    scale: int = 1
    """What outputs of experts are multiplied by."""
    router_std: float
    """Standard deviation of the router's weights; 0 weighs all experts alike."""
    noise: float = 0.0
    """Random change of the experts, in standard deviations of each matrix."""
    seed: int = 0
    """Seed of router and noise."""


def converted_tensors(
    dense: PreTrainedModel, deal: Deal, *, shared_expert: bool
) -> dict[str, Tensor]:
    """All tensors of the converted model by name, none shared with the dense one.

    A shared expert has the neurons of the first expert, and adds nothing as its last matrix is
    zero; it can learn to.

    Raises:
        ModelError: The feed-forward layers have something that experts lack.
    """
    tensors = {name: tensor.detach() for name, tensor in dense.state_dict().items()}
    generator = torch.Generator().manual_seed(deal.seed)
    for layer in range(dense.config.num_hidden_layers):
        place = f"model.layers.{layer}.mlp"
        gate, up, down = (tensors.pop(f"{place}.{name}") for name in _DENSE)
        rest = sorted(name for name in tensors if name.startswith(f"{place}."))
        if rest:
            raise ModelError(
                "the feed-forward layers have weights that experts lack", got=", ".join(rest)
            )
        gates, downs = experts_of(gate, up, down, deal)
        tensors[f"{place}.gate.weight"] = _random(
            (len(deal.neurons), gate.shape[1]), deal.router_std, generator
        ).to(gate)
        if deal.noise:
            gates = torch.cat([_noisy(m, deal, generator) for m in gates.chunk(2, dim=1)], dim=1)
            downs = _noisy(downs, deal, generator)
        tensors[f"{place}.experts.gate_up_proj"] = gates
        tensors[f"{place}.experts.down_proj"] = downs
        if shared_expert:
            tensors |= _shared(place, gates[0], downs[0])
    shared = dense.state_dict().keys()
    return {name: t.clone() if name in shared else t for name, t in tensors.items()}


def experts_of(
    gate: Float[Tensor, "all_neurons hidden"],
    up: Float[Tensor, "all_neurons hidden"],
    down: Float[Tensor, "hidden all_neurons"],
    deal: Deal,
) -> tuple[
    Float[Tensor, "experts two_neurons hidden"],
    Float[Tensor, "experts hidden neurons"],
]:
    """Stacked matrices of the experts: gate above up, and down."""
    gates = torch.cat([gate[deal.neurons], up[deal.neurons]], dim=1)
    return gates, (down.T[deal.neurons] * deal.scale).mT.contiguous()


def _shared(
    place: str,
    gate_up: Float[Tensor, "two_neurons hidden"],
    down: Float[Tensor, "hidden neurons"],
) -> dict[str, Tensor]:
    gate, up = gate_up.chunk(2)
    return {
        f"{place}.shared_expert.gate_proj.weight": gate.clone(),
        f"{place}.shared_expert.up_proj.weight": up.clone(),
        f"{place}.shared_expert.down_proj.weight": torch.zeros_like(down),
        f"{place}.shared_expert_gate.weight": torch.zeros_like(gate[:1]),
    }


def _noisy(matrices: Tensor, deal: Deal, generator: torch.Generator) -> Tensor:
    spread = float(matrices[0].float().std())
    return matrices + _random(tuple(matrices.shape), deal.noise * spread, generator).to(matrices)


def _random(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) * std
