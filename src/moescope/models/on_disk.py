"""Layers of a checkpoint, read one at a time: for what needs weights and runs nothing."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from moescope.errors import ModelError
from moescope.models.checkpoint import CONFIG, Checkpoint, first_line, locate, weights
from moescope.models.discover import dense_layers, moe_layers
from moescope.models.load import bars_on_terminals_only
from moescope.models.offload import resident
from moescope.models.outline import skeleton
from moescope.models.ported import deepseek
from moescope.models.stacking import without_copies
from moescope.models.view import MoELayer, MoEModel

_SAMPLED_BYTES = 4096
_SAMPLES = 256


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredLayers:
    """Layers of a model, the weights of which are in memory while they are read and no longer."""

    layers: list[MoELayer]
    """The mixture-of-experts layers in the order of the forward pass, without weights."""
    reading: Callable[[MoELayer], AbstractContextManager[None]]
    """Holds the weights of one of these layers in memory, within the context."""
    name: str
    """What was opened: Hub id, folder, or name of a reference model; "in memory" otherwise."""
    revision: str | None
    """Commit on the Hub."""
    fingerprint: str
    """Identity of the weights."""


def in_memory(model: MoEModel) -> StoredLayers:
    """The layers of a loaded model; what is offloaded comes into memory layer by layer."""
    return StoredLayers(
        layers=model.layers,
        reading=_resident,
        name=model.name,
        revision=model.revision,
        fingerprint=model.fingerprint,
    )


def on_disk(
    name: str | PathLike[str], *, revision: str | None = None, dense_as_experts: bool = False
) -> StoredLayers:
    """The layers of a checkpoint, straight from its safetensors files.

    Nothing runs, so that blocks are not proved as `load` proves them: what is read is what
    `load` would read, bit for bit.

    Args:
        name: Name of a reference model, folder, or Hub id.
        revision: Branch, tag, or commit, for a Hub id.
        dense_as_experts: Whether this is a dense model, to be seen as one expert per layer.

    Raises:
        ModelError: The checkpoint cannot be found or read, is quantised, is dense (or is not), or
            is of a family that moescope does not know.
    """
    deepseek.register()
    checkpoint = locate(name, revision=revision)
    shards = weights(checkpoint)
    model = _without_weights(checkpoint, shards)
    try:
        layers = (dense_layers if dense_as_experts else moe_layers)(model)
    except NotImplementedError as error:  # a family that has to run to be known
        raise ModelError(
            f"layers of {type(model).__name__} cannot be read one at a time",
            got=first_line(error),
        ) from error
    return StoredLayers(
        layers=layers,
        reading=partial(_read, model, _Shards(model, shards)),
        name=checkpoint.name,
        revision=checkpoint.revision,
        fingerprint=_fingerprint(checkpoint, shards),
    )


def _without_weights(checkpoint: Checkpoint, shards: list[Path]) -> PreTrainedModel:
    """The model as its configuration says, on the device "meta"."""
    model = skeleton(checkpoint, _first_dtype(shards))
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(
            f"the weights of {checkpoint.name} are quantised: they are no plain numbers",
            remedy="Dequantise it, or take the checkpoint that it was made from",
        )
    return model


def _first_dtype(shards: list[Path]) -> torch.dtype:
    """Of the first tensor, as transformers has it."""
    with safe_open(shards[0], framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(next(iter(file.keys())))
    return tensor.dtype


class _Shards:
    """Which tensors of a checkpoint become the parameters of which module."""

    def __init__(self, model: PreTrainedModel, shards: list[Path]) -> None:
        self.conversions: list[Any] = without_copies(get_model_conversion_mapping(model))
        renamings = [c for c in self.conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in self.conversions if isinstance(c, WeightConverter)]
        expected = model.state_dict()
        self._places: dict[str, list[tuple[Path, str]]] = {}
        for shard in shards:
            with safe_open(shard, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    target, _ = rename_source_key(
                        key, renamings, converters, model.base_model_prefix, expected
                    )
                    target = key if target not in expected and key in expected else target
                    self._places.setdefault(target.rpartition(".")[0], []).append((shard, key))

    @contextmanager
    def tensors(self, modules: set[str]) -> Iterator[dict[str, Any]]:
        """The tensors of some modules by their names in the checkpoint, to be read when sliced."""
        files: dict[Path, Any] = {}
        with ExitStack() as stack:
            found = {}
            for module in sorted(modules & self._places.keys()):
                for shard, key in self._places[module]:
                    if shard not in files:
                        files[shard] = stack.enter_context(safe_open(shard, framework="pt"))
                    found[key] = files[shard].get_slice(key)
            yield found


@contextmanager
def _read(model: PreTrainedModel, shards: _Shards, layer: MoELayer) -> Iterator[None]:
    own = set(layer.decoder_layer.modules())  # some families keep parts beside the block
    modules = {path for path, module in model.named_modules() if module in own}
    plan = model._get_dtype_plan(model.dtype)
    config = LoadStateDictConfig(
        dtype=model.dtype, dtype_plan=plan, weight_mapping=shards.conversions
    )
    try:
        with shards.tensors(modules) as tensors, bars_on_terminals_only():
            convert_and_load_state_dict_in_model(model, tensors, config)
        _require_whole(model, modules, layer)
        yield
    finally:
        layer.decoder_layer.to("meta")


def _require_whole(model: PreTrainedModel, modules: set[str], layer: MoELayer) -> None:
    """Refuse a layer without all of its weights, or with numbers that are none.

    Raises:
        ModelError: Names the parameter.
    """
    for path in sorted(modules):
        for name, parameter in model.get_submodule(path).named_parameters(recurse=False):
            if parameter.is_meta:
                raise ModelError(f"the checkpoint lacks the weights {path}.{name}")
            low, high = parameter.aminmax() if parameter.numel() else (parameter, parameter)
            if not (low.isfinite().all() and high.isfinite().all()):
                raise ModelError(
                    f"the weights {path}.{name} of layer {layer.index} are not all finite",
                    remedy="The checkpoint is damaged, or was trained until it diverged",
                )


@contextmanager
def _resident(layer: MoELayer) -> Iterator[None]:
    with resident(layer.decoder_layer):
        yield


def _fingerprint(checkpoint: Checkpoint, shards: list[Path]) -> str:
    """SHA-256 of the configuration, of the names and sizes of files, and an even sample of each."""
    digest = hashlib.sha256((checkpoint.folder / CONFIG).read_bytes())
    for shard in shards:
        size = shard.stat().st_size
        digest.update(f"{shard.name} {size}".encode())
        with shard.open("rb") as file:
            for start in range(0, size, max(_SAMPLED_BYTES, size // _SAMPLES)):
                file.seek(start)
                digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()
