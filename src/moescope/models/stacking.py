"""Experts of a checkpoint put together into one tensor, with no second copy of them."""

from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist


class StackedBeside(ConversionOps):
    """Matrices of each expert beside each other, and the experts stacked.

    The same as `MergeModulelist(dim=0)` and `Concatenate(dim=1)` one after the other, which stack
    the experts matrix by matrix first and hold everything twice then.
    """

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, list[Float[Tensor, "rows columns"]]],
        source_patterns: list[str],
        target_patterns: list[str],
        **_: Any,
    ) -> dict[str, Any]:
        """Checkpoint tensors by pattern, one per expert, into the tensor of the model.

        Returns:
            One tensor [experts, rows of all matrices, columns].
        """
        (target,) = target_patterns
        experts = zip(*(input_dict[pattern] for pattern in source_patterns), strict=True)
        first = input_dict[source_patterns[0]]
        rows = sum(len(input_dict[pattern][0]) for pattern in source_patterns)
        whole = first[0].new_empty(len(first), rows, first[0].shape[1])
        for expert, matrices in zip(whole, experts, strict=True):
            torch.cat(matrices, out=expert)
        return {target: whole}


def without_copies(conversions: list[Any]) -> list[Any]:
    """Conversions of a checkpoint, those that stack experts done in one step."""
    lean = deepcopy(conversions)
    for conversion in lean:
        match getattr(conversion, "operations", []):  # renamings have none
            case [MergeModulelist(dim=0), Concatenate(dim=1)]:
                conversion.operations = [StackedBeside()]
    return lean
