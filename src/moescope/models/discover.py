"""Finds the mixture-of-experts layers of a model."""

from torch import nn
from transformers import PreTrainedModel

from moescope.errors import ModelError
from moescope.models.families.dense import DenseLayer
from moescope.models.families.feed_forward import is_feed_forward
from moescope.models.families.fused import FusedLayer
from moescope.models.families.grok import ListedLayer
from moescope.models.families.registry import by_block_class
from moescope.models.offloaded import OffloadedLayer
from moescope.models.quantised import QuantisedLayer
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
        if _within(path, seen):
            continue
        family = families.get(type(module).__name__) or _pattern(module)
        if family is not None:
            seen.append(path)
            layers.append(_layer(model, path, family))
        elif _has_experts(module):
            raise _unknown_family(model, path, module)
    if not layers and _should_have_experts(model):
        raise _unknown_family(model, "", model)
    if not layers:
        raise ModelError(
            f"{type(model).__name__} is a dense model: it has no mixture-of-experts layer",
            got=f"model type {model.config.model_type}",
            expected="a mixture-of-experts model",
            remedy="`dense_as_experts=True` (in a command `--dense-as-experts`, where it has that) "
            "sees every feed-forward layer as one expert",
        )
    return layers


def dense_layers(model: PreTrainedModel) -> list[MoELayer]:
    """The feed-forward layers of a dense model, one expert each, in the order of the forward pass.

    Raises:
        ModelError: The model is not dense, or its feed-forward layers are of no known kind.
    """
    name = type(model).__name__
    if any(_has_experts(module) for module in model.modules()):
        raise ModelError(
            f"{name} is no dense model",
            got=f"model type {model.config.model_type}",
            remedy="Leave out `dense_as_experts` (in a command `--dense-as-experts`)",
        )
    paths = [path for path, module in model.named_modules() if is_feed_forward(module)]
    layers = [_layer(model, path, DenseLayer, name="dense") for path in paths]
    if not layers or len({(layer.stack, layer.index) for layer in layers}) < len(layers):
        raise ModelError(
            f"the feed-forward layers of {name} are built like none that moescope knows",
            got=f"{len(layers)} found",
            expected="one module per layer, with matrices and a nonlinearity",
        )
    return layers


def _pattern(block: nn.Module) -> type[MoELayer] | None:
    """The pattern that a block is built after."""
    patterns: tuple[type[FusedLayer | ListedLayer], ...] = (FusedLayer, ListedLayer)
    return next((pattern for pattern in patterns if pattern.fits(block)), None)


def _layer(
    model: PreTrainedModel, path: str, family: type[MoELayer], name: str | None = None
) -> MoELayer:
    """The layer whose block lies at `path`; its number is its place in the outermost list."""
    parts = path.split(".")
    for depth in range(1, len(parts)):
        listed = model.get_submodule(".".join(parts[:depth]))
        if isinstance(listed, nn.ModuleList) and parts[depth].isdigit():
            layer = family(
                model.get_submodule(path),
                listed[int(parts[depth])],
                index=int(parts[depth]),
                stack="encoder" if "encoder" in parts[:depth] else "decoder",
                family=name or model.config.get_text_config().model_type,
            )
            return QuantisedLayer.of(OffloadedLayer.of(layer))
    raise ModelError(
        f"a {type(model.get_submodule(path)).__name__} lies in no list of layers",
        got=path,
        expected="LAYERS.NUMBER. ... .BLOCK",
    )


def _within(path: str, blocks: list[str]) -> bool:
    return any(path.startswith(f"{block}.") for block in blocks)


def _has_experts(module: nn.Module) -> bool:
    return any(name == "experts" for name, _ in module.named_children())


def _should_have_experts(model: PreTrainedModel) -> bool:
    """Whether there are modules that the class says are routers."""
    recorder = (model._can_record_outputs or {}).get("router_logits")
    router = getattr(recorder, "target_class", recorder)  # transformers takes a class alone too
    return isinstance(router, type) and any(isinstance(m, router) for m in model.modules())


def _unknown_family(model: PreTrainedModel, path: str, module: nn.Module) -> ModelError:
    return ModelError(
        f"the experts of {type(model).__name__}, model type {model.config.model_type}, are built "
        "like those of no family that moescope knows",
        got=f"a {type(module).__name__}" + (f" at {path}" if path else ""),
        expected="a router, and experts in stacked tensors that are called with its choice",
        remedy="A family of another kind is one small file in moescope/models/families",
    )
