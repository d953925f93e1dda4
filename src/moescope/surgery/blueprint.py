"""What depends on the number of experts: found by building the model twice, without weights.

The two configurations differ in nothing but that number. So what differs between the two models
is what a change of the number must change, whatever a family calls it.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moescope.errors import ModelError

_COUNTS_EXPERTS = re.compile(r"expert")
_COUNTS_OTHERS = re.compile(r"per_tok|top_?k|shared|zero|group|capacity|dim|size|layer")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Where the experts lie in a tensor."""

    dim: int
    """Along which dimension."""
    rows: int
    """How many rows an expert has there."""

    def select(self, tensor: Tensor, experts: list[int], num_experts: int) -> Tensor:
        """Those experts in that order; rows behind those of all experts stay there."""
        behind = range(num_experts * self.rows, tensor.shape[self.dim])
        rows = [e * self.rows + row for e in experts for row in range(self.rows)]
        index = torch.tensor([*rows, *behind], device=tensor.device)
        return tensor.detach().index_select(self.dim, index)


@dataclass(frozen=True, eq=False, kw_only=True)
class Blueprint:
    """A model as it is, and as it would be with another number of experts, both without weights."""

    num_experts: int
    """Number of experts as it is."""
    wanted: int
    """The other number."""
    before: dict[str, nn.Module]
    """Modules as they are, by name."""
    after: dict[str, nn.Module]
    """Modules as they would be."""

    @classmethod
    def draw(cls, model: PreTrainedModel, num_experts: int, wanted: int) -> "Blueprint":
        """Build both.

        Raises:
            ModelError: The configuration does not say how many experts there are, or allows no
                other number.
        """
        config = copy.deepcopy(model.config)
        if not recount(config, num_experts, wanted):
            raise ModelError(
                f"the configuration of {type(model).__name__} does not say how many experts a "
                "layer has",
                expected=f"a number of experts that is {num_experts}",
            )
        try:
            before, after = _built(model, copy.deepcopy(model.config)), _built(model, config)
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} cannot have {wanted} experts per layer", got=error
            ) from error
        return cls(
            num_experts=num_experts,
            wanted=wanted,
            before=dict(before.named_modules()),
            after=dict(after.named_modules()),
        )

    def shape(self, name: str) -> torch.Size:
        """That of a tensor as it is."""
        return _shapes(self.before)[name]

    def axes(self) -> dict[str, Axis]:
        """The axis of every tensor that holds something of each expert, by name.

        Raises:
            ModelError: A tensor changes in a way that is not that of stacked experts.
        """
        shapes = _shapes(self.before), _shapes(self.after)
        found = {}
        for name, shape in shapes[0].items():
            if name in shapes[1] and shape != shapes[1][name]:
                found[name] = self._axis(name, shape, shapes[1][name])
        return found

    def settings(self) -> Iterator[tuple[str, str, Any]]:
        """Module, attribute and new value of every number that follows that of experts."""
        for name in self.before.keys() & self.after.keys():
            new = vars(self.after[name])
            for attribute, value in vars(self.before[name]).items():
                if type(value) in (int, tuple, list) and new.get(attribute) != value:
                    yield name, attribute, new[attribute]

    def lists(self) -> Iterator[tuple[str, list[str]]]:
        """Modules that hold one module per expert, with the names of those after."""
        for name, module in self.before.items():
            children = [child for child, _ in module.named_children()]
            after = self.after.get(name)
            if after is not None and len(children) == self.num_experts:
                names = [child for child, _ in after.named_children()]
                if names != children:
                    yield name, names

    def _axis(self, name: str, shape: torch.Size, new: torch.Size) -> Axis:
        differing = [dim for dim, (a, b) in enumerate(zip(shape, new, strict=False)) if a != b]
        if len(shape) == len(new) and len(differing) == 1:
            (dim,) = differing
            rows, left = divmod(shape[dim] - new[dim], self.num_experts - self.wanted)
            if left == 0 and rows * self.num_experts <= shape[dim]:
                return Axis(dim=dim, rows=rows)
        raise ModelError(
            f"{name} does not hold experts one after another",
            got=f"{tuple(shape)}, and {tuple(new)} for {self.wanted} experts",
        )


def _built(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return type(model)(config)


def recount(config: PreTrainedConfig, num_experts: int, wanted: int) -> int:
    """Write another number of experts into a configuration; how often it was there."""
    written = 0
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            written += recount(value, num_experts, wanted)
        elif _COUNTS_EXPERTS.search(name) and not _COUNTS_OTHERS.search(name):
            if value == num_experts and type(value) is int:
                setattr(config, name, wanted)
                written += 1
            elif isinstance(value, list) and value and set(value) == {num_experts}:
                setattr(config, name, [wanted] * len(value))
                written += 1
    return written


def _shapes(modules: dict[str, nn.Module]) -> dict[str, torch.Size]:
    return {
        f"{path}.{name}".lstrip("."): tensor.shape
        for path, module in modules.items()
        for name, tensor in chain(
            module.named_parameters(recurse=False), module.named_buffers(recurse=False)
        )
    }
