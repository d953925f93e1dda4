"""Takes some experts, in some order, out of everything that holds one entry per expert."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from moescope.errors import ModelError
from moescope.models.view import MoELayer, MoEModel
from moescope.surgery.blueprint import Blueprint, recount
from moescope.surgery.proof import Proof


@torch.no_grad()
def select(model: MoEModel, blueprint: Blueprint, chosen: Mapping[MoELayer, Sequence[int]]) -> None:
    """Give layers some of their experts in some order, prove it, or leave everything as it was.

    Raises:
        ModelError: Something outside the blocks depends on the number of experts, or the routers
            choose otherwise than they did.
    """
    paths = {id(module): path for path, module in model.model.named_modules()}
    strange = [layer.index for layer in chosen if id(layer.block) not in paths]
    if strange:
        raise ModelError(
            "experts can be selected only where router and experts lie in one module",
            got=f"layers {strange} of {model.name}, where they do not",
        )
    blocks = {f"{paths[id(layer.block)]}.": list(experts) for layer, experts in chosen.items()}
    proofs = [Proof(layer, list(experts)) for layer, experts in chosen.items()]
    with ExitStack() as undo:
        change = _Change(model.model, blueprint, blocks, undo)
        change.tensors()
        change.lists()
        if all(len(experts) == blueprint.wanted for experts in blocks.values()):
            change.numbers()
        for proof in proofs:
            proof.require()
        undo.pop_all()


class _Change:
    """A change of a model, with what undoes it."""

    def __init__(
        self,
        model: nn.Module,
        blueprint: Blueprint,
        blocks: Mapping[str, list[int]],
        undo: ExitStack,
    ) -> None:
        self.model = model
        self.blueprint = blueprint
        self.blocks = blocks
        self.undo = undo

    def tensors(self) -> None:
        """Rows of stacked tensors."""
        for path, axis in self.blueprint.axes().items():
            experts = self._experts(path)
            if experts is None:
                continue
            owner, _, name = path.rpartition(".")
            module = self.model.get_submodule(owner)
            former: Any = getattr(module, name)
            self._require_shape(path, former.shape)
            tensor = axis.select(former, experts, self.blueprint.num_experts)
            if isinstance(former, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=former.requires_grad)
            self._set(module, name, tensor)

    def lists(self) -> None:
        """Members of lists of modules."""
        for path, names in self.blueprint.lists():
            experts = self._experts(path)
            if experts is None:
                continue
            module = self.model.get_submodule(path)
            former = list(module.children())
            members = [former[expert] for expert in experts]
            self._set(module, "_modules", dict(zip(names, members, strict=False)))

    def numbers(self) -> None:
        """What says how many experts there are: settings of modules, and configurations."""
        for path, name, value in self.blueprint.settings():
            self._set(self.model.get_submodule(path), name, value)
        for module in self.model.modules():
            config = vars(module).get("config")
            if isinstance(config, PreTrainedConfig):
                self._recount(config)

    def _recount(self, config: PreTrainedConfig) -> None:
        for part in (config, *vars(config).values()):
            if isinstance(part, PreTrainedConfig):
                self.undo.callback(vars(part).update, dict(vars(part)))
        recount(config, self.blueprint.num_experts, self.blueprint.wanted)

    def _experts(self, path: str) -> list[int] | None:
        """Those chosen for the block of a tensor or module; None if it stays as it is.

        Raises:
            ModelError: It depends on the number of experts, which changes, and lies in no block.
        """
        for block, experts in self.blocks.items():
            if path.startswith(block):
                return experts
        if all(len(experts) == self.blueprint.num_experts for experts in self.blocks.values()):
            return None
        raise ModelError(
            f"{path} depends on the number of experts and belongs to no sparse block",
            remedy="The experts of this family can be put into another order, but not be taken out",
        )

    def _require_shape(self, path: str, shape: torch.Size) -> None:
        expected = self.blueprint.shape(path)
        if shape != expected:
            raise ModelError(
                f"{path} is not what its configuration says",
                got=tuple(shape),
                expected=tuple(expected),
            )

    def _set(self, owner: object, name: str, value: object) -> None:
        self.undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)
