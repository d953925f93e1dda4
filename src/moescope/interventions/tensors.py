"""Interventions that write into the parameters of experts, and write them back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product

import torch
from jaxtyping import Int64
from torch import Tensor

from moescope.errors import ModelError, OptionError
from moescope.interventions.functions import Expert
from moescope.models.alike import require_alike
from moescope.models.patching import noted


@contextmanager
def swap_experts(a: Expert, b: Expert) -> Iterator[None]:
    """Exchange the parameters of two experts of one layer or of two; routers stay.

    So does what the experts of a layer share (the latent projections of Nemotron-H). Copies of
    the two are held meanwhile: what is written into them is undone too.

    Raises:
        OptionError: There is no such expert, or the two are not built alike.
        ModelError: The weights are not plain numbers in memory (quantised, offloaded).
    """
    tensors = a[0].expert_tensors(a[1]), b[0].expert_tensors(b[1])
    require_alike(a, b)
    copies = [{name: tensor.clone() for name, tensor in of.items()} for of in tensors]
    try:
        _write(tensors[0], copies[1])
        _write(tensors[1], copies[0])
        with noted(a[0].block), noted(b[0].block):
            yield
    finally:
        _write(tensors[0], copies[0])
        _write(tensors[1], copies[1])


@contextmanager
def ablate_neurons(expert: Expert, neurons: Sequence[int]) -> Iterator[None]:
    """Have the activations of neurons of an expert count as zero.

    The parameters that they are multiplied with, in the down projection, are set to zero. So it
    does not matter whether the expert is given an adapter, or is a target, before or after.

    Raises:
        OptionError: There is no such expert or neuron.
        ModelError: The weights are not plain numbers in memory (quantised, offloaded).
    """
    layer, number = expert
    tensors = layer.expert_tensors(number)
    down = layer.expert_weights(number).down.clone()  # [hidden, intermediate]
    wide = down.shape[1]
    for neuron in neurons:
        if not 0 <= neuron < wide:
            raise OptionError(
                f"the experts of layer {layer.index} have no such neuron",
                got=neuron,
                expected=f"0 to {wide - 1}",
            )
    columns = torch.tensor(list(neurons), dtype=torch.long, device=down.device)
    expected = torch.zeros_like(down, dtype=torch.bool).index_fill(1, columns, True)
    for tensor, axis in product(tensors.values(), (0, 1)):
        if tensor.ndim == 2 and tensor.shape[axis] == wide:
            rows = tensor.movedim(axis, 0)
            with _filled(rows, columns, torch.nan):
                # Families may keep it either way round, and behind another matrix.
                found = torch.equal(layer.expert_weights(number).down.isnan(), expected)
            if found:
                with _filled(rows, columns, 0.0), noted(layer.block):
                    yield
                return
    raise ModelError(f"no parameter of layer {layer.index} holds what neurons write")


@contextmanager
def _filled(tensor: Tensor, rows: Int64[Tensor, " rows"], value: float) -> Iterator[None]:
    copy = tensor[rows]
    try:
        tensor[rows] = value
        yield
    finally:
        tensor[rows] = copy


def _write(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])
