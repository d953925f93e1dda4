"""Blocks that keep their choice to themselves: changed ones are computed from their parts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from moescope.models.families.linear_router import linear_map, router_of
from moescope.models.families.shared import shared_experts
from moescope.models.patching import Forward, wrapped
from moescope.models.view import Function, MoELayer, Replacement, Rerouting, Routing


class RebuiltLayer(MoELayer, ABC):
    """A layer whose experts are not called with experts and weights.

    The routing that is used is read from what the router returns. While something is changed, the
    block computes routing, experts and shared expert one after another, as conformance does.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._changes: list[Rerouting] = []
        self._replacements: list[tuple[int, Replacement]] = []

    @property
    def router(self) -> nn.Module:
        """`block.gate` or `block.router`."""
        return router_of(self.block)

    @property
    def router_weight(self) -> Float[Tensor, "experts hidden"]:
        """The matrix in the router, detached."""
        return linear_map(self.router)[0]

    @property
    def router_bias(self) -> Float[Tensor, " experts"] | None:
        """The `bias` beside that matrix."""
        return linear_map(self.router)[1]

    @abstractmethod
    def chosen(
        self, router_output: Any
    ) -> tuple[Int64[Tensor, "tokens top_k"], Float[Tensor, "tokens top_k"]]:
        """The experts and weights that the block uses, from what the router returns."""

    @abstractmethod
    def block_output(
        self, output: Float[Tensor, "tokens hidden"], x: Tensor, router_output: Any
    ) -> Any:
        """What the block returns for inputs `x` of any shape, with what goes beside the output."""

    def shared_output(
        self, x: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens hidden"] | None:
        """`shared(x)`."""
        return shared_experts(self.block, x)

    @contextmanager
    def on_routing(self, seen: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
        """From what the router returns."""

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            seen(*self._used(output))

        handle = self.router.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    def route(self, x: Float[Tensor, "tokens hidden"]) -> Routing:
        """What the router returns for `x`."""
        output = self.router(x.to(self.router_weight))
        experts, weights = self._used(output)
        return Routing(logits=self.router_logits(output), weights=weights, experts=experts)

    @contextmanager
    def replacing(self, expert: int, function: Replacement) -> Iterator[None]:
        """The block is computed from its parts, one of them another."""
        self.check_experts([expert])
        self._replacements.append((expert, function))
        try:
            with wrapped(self.block, self._from_parts):
                yield
        finally:
            self._replacements.pop()

    @contextmanager
    def rerouting(self, change: Rerouting) -> Iterator[None]:
        """The block is computed from its parts and the changed routing."""
        self._changes.append(change)
        try:
            with wrapped(self.block, self._from_parts):
                yield
        finally:
            self._changes.pop()

    def _used(self, router_output: Any) -> tuple[Tensor, Tensor]:
        experts, weights = self.chosen(router_output)
        for change in self._changes:
            experts, weights = change(experts, weights)
        return experts, weights

    def _from_parts(self, _: Forward) -> Forward:
        def forward(x: Tensor, *__: Any, **___: Any) -> Any:
            rows = x.reshape(-1, self.hidden_size)
            router_output = self.router(rows)
            experts, weights = self._used(router_output)
            shared = self.shared_output(rows)
            output = torch.zeros_like(rows) if shared is None else shared
            for expert in range(self.num_experts):
                # A slot of weight 0 is none, also where the weight goes into the function.
                tokens, slots = torch.where((experts == expert) & (weights != 0))
                new = self.weigh(self._function(expert), rows[tokens], weights[tokens, slots])
                output = output.index_add(0, tokens, new.to(output))
            return self.block_output(output, x, router_output)

        return forward

    def _function(self, expert: int) -> Function:
        """What one expert computes now."""
        function: Function = lambda x: self.expert_outputs(x, [expert])[0]  # noqa: E731
        for number, replacement in self._replacements:
            if number == expert:
                function = _after(replacement, function)
        return function


def _after(replacement: Replacement, before: Function) -> Function:
    return lambda x: replacement(before, x)
