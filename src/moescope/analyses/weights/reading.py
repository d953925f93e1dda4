"""The experts of one layer as `weights` compares them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from moescope.experts.weights import ExpertWeights
from moescope.measures.similarity import Matrices, neuron_means, squared_norms
from moescope.models.on_disk import StoredLayers
from moescope.models.view import MoELayer

MATRICES = ("gate", "up", "down")
ALL = "all"
"""In tables: all matrices of an expert, each counting the same."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Summary:
    """What is kept of a layer once its weights are gone."""

    stack: str
    """decoder or encoder."""
    layer: int
    """The model's own layer number."""
    experts: list[int]
    """Numbers of the experts that are compared: those of the same shape as the first."""
    shape: tuple[int, int]
    """Neurons, hidden size."""
    squares: dict[str, Float64[Tensor, " experts"]]
    """Squared norms by matrix."""
    means: dict[str, Float64[Tensor, "experts hidden"]]
    """Mean of the neurons by matrix."""
    router: Float64[Tensor, "experts hidden"]
    """Router rows of the experts."""

    @property
    def place(self) -> dict[str, object]:
        """Stack and layer, as columns."""
        return {"stack": self.stack, "layer": self.layer}


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerExperts:
    """Experts of one layer, views of its weights, which are in memory."""

    summary: Summary
    """What is kept of them."""
    matrices: dict[str, Matrices]
    """By name, one matrix per expert, a neuron per row: `gate`, if there is one, `up`, `down`."""


@contextmanager
def reading(
    stored: StoredLayers, layer: MoELayer, known: Summary | None = None
) -> Iterator[LayerExperts]:
    """The experts of one layer, in memory within the context.

    Args:
        stored: Where they are read from.
        layer: One of its layers.
        known: The summary from an earlier reading, if there was one.

    Raises:
        ModelError: The weights are damaged, or no plain numbers.
    """
    with stored.reading(layer):
        experts = _experts(layer, known)
        try:
            yield experts
        finally:
            experts.matrices.clear()  # whoever keeps the object keeps no weights


def _experts(layer: MoELayer, known: Summary | None) -> LayerExperts:
    every = {number: layer.expert_weights(number) for number in range(layer.num_experts)}
    first = _shapes(every[0])
    same = {number: expert for number, expert in every.items() if _shapes(expert) == first}
    matrices: dict[str, Matrices] = {
        name: [_by_neuron(expert, name) for expert in same.values()] for name in first
    }
    if known is not None:
        return LayerExperts(summary=known, matrices=matrices)
    numbers = list(same)
    summary = Summary(
        stack=layer.stack,
        layer=layer.index,
        experts=numbers,
        shape=(matrices["up"][0].shape[0], matrices["up"][0].shape[1]),
        squares={name: squared_norms(experts) for name, experts in matrices.items()},
        means={name: neuron_means(experts) for name, experts in matrices.items()},
        router=layer.router_weight[torch.tensor(numbers)].double().cpu(),
    )
    return LayerExperts(summary=summary, matrices=matrices)


def _shapes(expert: ExpertWeights) -> dict[str, tuple[int, ...]]:
    tensors = expert.tensors()
    return {name: tuple(tensors[name].shape) for name in MATRICES if name in tensors}


def _by_neuron(expert: ExpertWeights, name: str) -> Tensor:
    matrix = expert.tensors()[name]
    return matrix.mT if name == "down" else matrix
