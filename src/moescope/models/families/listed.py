"""Experts that are modules of their own, one beside the other."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from moescope.experts.weights import ExpertWeights
from moescope.models.families.feed_forward import feed_forward_weights
from moescope.models.view import MoELayer


class ListedExperts(MoELayer, ABC):
    """What a layer says of its experts where each is a feed-forward module."""

    @abstractmethod
    def expert_module(self, expert: int) -> nn.Module:
        """The module of one expert."""

    @property
    def intermediate_size(self) -> int:
        """From the matrices of the first expert."""
        return self.expert_weights(0).intermediate_size

    def expert_weights(self, expert: int) -> ExpertWeights:
        """Views of the matrices of one module."""
        self.check_experts([expert])
        return feed_forward_weights(self.expert_module(expert))

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """The parameters of one module."""
        self.check_experts([expert])
        named = self.expert_module(expert).named_parameters()
        return {name: parameter.detach() for name, parameter in named}
