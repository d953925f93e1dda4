"""Blocks whose experts cannot be called one at a time: their outputs come from the tensors."""

from abc import ABC
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from moescope.models.families.gating import plain
from moescope.models.families.rebuilt import RebuiltLayer


class ByWeightsLayer(RebuiltLayer, ABC):
    """A rebuilt layer that computes experts from `expert_weights`."""

    def expert_outputs(
        self, x: Float[Tensor, "tokens hidden"], experts: Sequence[int]
    ) -> Float[Tensor, "experts tokens hidden"]:
        """From the tensors."""
        weights = [self.expert_weights(expert) for expert in experts]
        x = x.to(next(iter(self.expert_tensors(0).values())))
        outputs = x.new_empty(len(experts), *x.shape)
        for row, expert in enumerate(weights):
            outputs[row] = expert(x)
        return outputs


def named_nonlinearity(function: nn.Module) -> str:
    """The name under which `ExpertWeights` knows a nonlinearity.

    Raises:
        ModelError: It does not know it.
    """
    return plain(nn.ModuleDict({"act_fn": function})).activation
