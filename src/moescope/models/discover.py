"""Finds the mixture-of-experts layers of a model."""

from torch import nn
from transformers import PreTrainedModel

from moescope.errors import ModelError
from moescope.models.families.registry import by_block_class, supported
from moescope.models.view import MoELayer


def moe_layers(model: PreTrainedModel) -> list[MoELayer]:
    """The mixture-of-experts layers of `model`, in the order of the forward pass.

    Raises:
        ModelError: The model is dense, or has experts that no family describes.
    """
    families = by_block_class()
    layers: list[MoELayer] = []
    seen: list[str] = []
    for path, module in model.named_modules():
        family = families.get(type(module).__name__)
        if family is not None:
            seen.append(path)
            layers.append(_layer(model, path, family))
        elif _has_experts(module) and not _within(path, seen):
            raise _unknown_family(model, path, module)
    if not layers and _should_have_experts(model):
        raise _unknown_family(model, "", model)
    if not layers:
        raise ModelError(
            f"{type(model).__name__} is a dense model: it has no mixture-of-experts layer",
            got=f"model type {model.config.model_type}",
            expected=f"a mixture-of-experts model of one of the families {supported()}",
        )
    return layers


def _layer(model: PreTrainedModel, path: str, family: type[MoELayer]) -> MoELayer:
    """The layer whose block lies at `path`; its number is its place in the list of layers."""
    layer_path = path.removesuffix(f".{family.block_path}")
    list_path, _, number = layer_path.rpartition(".")
    if layer_path == path or not isinstance(model.get_submodule(list_path), nn.ModuleList):
        raise ModelError(
            f"a {family.block_class} is not where the family {family.family} has it",
            got=path,
            expected=f"LAYERS.NUMBER.{family.block_path}",
        )
    return family(model.get_submodule(path), model.get_submodule(layer_path), index=int(number))


def _within(path: str, blocks: list[str]) -> bool:
    return any(path.startswith(f"{block}.") for block in blocks)


def _has_experts(module: nn.Module) -> bool:
    return any(name == "experts" for name, _ in module.named_children())


def _should_have_experts(model: PreTrainedModel) -> bool:
    """Whether the class says that it has routers, and is not a known one configured as dense."""
    known = {family.family for family in by_block_class().values()}
    return "router_logits" in (model._can_record_outputs or {}) and (
        model.config.model_type not in known
    )


def _unknown_family(model: PreTrainedModel, path: str, module: nn.Module) -> ModelError:
    return ModelError(
        f"no family describes the experts of {type(model).__name__}, "
        f"model type {model.config.model_type}",
        got=f"a {type(module).__name__}" + (f" at {path}" if path else ""),
        expected=f"one of the families {supported()}",
        remedy="A new family is one small file in moescope/models/families",
    )
