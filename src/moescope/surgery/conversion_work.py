"""Builds the converted model, and compares it with the dense one."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from moescope.errors import ModelError, OptionError
from moescope.models.load import load
from moescope.models.view import MoEModel
from moescope.surgery.conversion_result import PROBES, Conversion
from moescope.surgery.conversion_targets import Target, config_of
from moescope.surgery.conversion_weights import Deal, converted_tensors

_ROW_BYTES = 16  # rows of matrices that transformers multiplies expert by expert take multiples
_TOLERANCE = 1e-4
_TOLERANCE_HALF = 5e-2  # rounding grows from layer to layer


def convert(
    dense: MoEModel,
    target: Target,
    deal: Deal,
    top_k: int,
    provenance: dict[str, Any],
    *,
    kept: bool,
) -> Conversion:
    """Convert a dense model.

    Args:
        dense: The model.
        target: The class that it turns into.
        deal: Which expert gets which neurons.
        top_k: Experts per token.
        provenance: What `Conversion.provenance` is to say.
        kept: Whether the output is to be that of the dense model.

    Raises:
        ModelError: The class cannot hold the model, or does not compute the same.
        OptionError: Experts would have a number of neurons that the class cannot compute with.
    """
    experts, neurons = deal.neurons.shape
    config = config_of(target, dense.model.config, experts=experts, top_k=top_k, neurons=neurons)
    tensors = converted_tensors(dense.model, deal, shared_expert=target.shared_expert)
    converted = _built(target, config, tensors)
    multiple = _ROW_BYTES // dense.model.dtype.itemsize
    if neurons % multiple:
        raise OptionError(
            f"experts in {dense.model.dtype} cannot have this number of neurons",
            got=neurons,
            expected=f"a multiple of {multiple}",
        )
    converted.generation_config = copy.deepcopy(dense.model.generation_config)
    model = load(converted, tokenizer=dense.tokenizer)
    difference = _difference(dense.model, converted)
    half = converted.dtype.itemsize < torch.float32.itemsize
    tolerance = _TOLERANCE_HALF if half else _TOLERANCE
    if kept and not difference <= tolerance:
        raise ModelError(
            f"{target.model.__name__} does not compute what {dense.name} does",
            got=f"logits that differ by {difference:.2g} of their norm",
            expected=f"at most {tolerance:g}",
        )
    return Conversion(model=model, difference=difference, kept=kept, provenance=provenance)


def _built(target: Target, config: PreTrainedConfig, tensors: dict[str, Tensor]) -> PreTrainedModel:
    with no_init_weights():
        model = target.model(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    if missing or unexpected:
        raise ModelError(
            f"{target.model.__name__} has no place for all weights, or needs others",
            got=", ".join([*unexpected, *(f"no {name}" for name in missing)][:3]),
        )
    model.tie_weights()
    return model


@torch.no_grad()
def _difference(dense: PreTrainedModel, converted: PreTrainedModel) -> float:
    """Norm of the difference of the logits over that of the dense logits, on random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(dense.config.vocab_size, (1, PROBES), generator=generator)
    one, other = (
        model(input_ids=tokens.to(model.device)).logits.double() for model in (dense, converted)
    )
    return float((one - other).norm() / one.norm())
