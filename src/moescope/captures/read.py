"""Opens what `capture` wrote."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from moescope.captures.facts import CaptureFacts
from moescope.captures.partial import MANIFEST
from moescope.captures.places import Place
from moescope.captures.sampling import expert_keys, lowest, priorities
from moescope.captures.shards import read_tensor, verify
from moescope.captures.stream import TokenShard
from moescope.errors import CaptureError
from moescope.models.view import Routing, Stack
from moescope.runs import Run


@dataclass(frozen=True, eq=False)
class Recorded:
    """A wide tensor of some of the tokens."""

    tokens: Int64[Tensor, "recorded"]
    """Indices into the tokens of the capture, ascending."""
    values: Float[Tensor, "recorded hidden"]
    """One row per token, in the dtype of the capture."""


class Capture(CaptureFacts):
    """An opened capture.

    Tokens are the kept positions of the corpus in its order, T of them; padding is not among
    them unless the packing kept it. Tensors are read from the disk when they are asked for.
    Both stacks of an encoder-decoder model see the same tokens; layers are those of one stack.
    """

    def __init__(self, run: str | os.PathLike[str], *, stack: Stack = "decoder") -> None:
        """Open `run/capture` and check every shard.

        Args:
            run: The run folder.
            stack: Whose layers to speak of.

        Raises:
            CaptureError: There is no complete capture, or a shard is missing, truncated or altered;
                no layer of the stack was recorded.
        """
        super().__init__(Run(run).capture_folder, stack)
        for entry in self.manifest["shards"]:
            verify(self.folder, entry)
        if sum(entry["tokens"] for entry in self._shards("tokens")) != self.num_tokens:
            raise CaptureError(f"{self.folder / MANIFEST} was altered: its tokens do not add up")

    @staticmethod
    def exists(run: str | os.PathLike[str]) -> bool:
        """Whether a run folder holds a complete capture."""
        return (Run(run).capture_folder / MANIFEST).exists()

    @cached_property
    def token_ids(self) -> Int64[Tensor, "tokens"]:
        """Vocabulary index of every token."""
        return self._column("token_ids").long()

    @cached_property
    def documents(self) -> Int64[Tensor, "tokens"]:
        """Document number of every token."""
        return self._column("documents").long()

    @cached_property
    def domain_of(self) -> Int64[Tensor, "tokens"]:
        """Index into `domains` of every token."""
        return self._column("domains").long()

    @cached_property
    def document_domains(self) -> Int64[Tensor, "documents"]:
        """Index into `domains` of every document; -1 for one without kept tokens."""
        domains = torch.full((int(self.manifest["num_documents"]),), -1)
        for shard in self.token_shards():
            domains[shard.documents] = shard.domain_of
        return domains

    @cached_property
    def rows(self) -> Int64[Tensor, "tokens"]:
        """Row of the corpus of every token."""
        return self._column("rows").long()

    @cached_property
    def positions(self) -> Int64[Tensor, "tokens"]:
        """Position within its row of every token."""
        return self._column("positions").long()

    @property
    def token_loss(self) -> Float[Tensor, "tokens"]:
        """Loss of predicting the token after each, in nats; NaN where the row ends with it.

        Raises:
            CaptureError: It was not recorded.
        """
        self._require("token_loss")
        return self._column("token_loss")

    @cached_property
    def document_names(self) -> list[str]:
        """Names of the documents by number."""
        names = []
        for entry in self._shards("tokens"):
            content = read_tensor(self.folder, entry, "document_names.bytes").numpy().tobytes()
            ends = read_tensor(self.folder, entry, "document_names.ends").tolist()
            names += [content[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)]
        return names

    def routing(self, layer: int) -> Routing:
        """What the router of a layer did with every token.

        Raises:
            CaptureError: The layer was not recorded.
        """
        parts = [routing for _, routing in self.routing_shards(layer)]
        return Routing(
            logits=torch.cat([part.logits for part in parts]),
            weights=torch.cat([part.weights for part in parts]),
            experts=torch.cat([part.experts for part in parts]),
        )

    def routing_shards(self, layer: int) -> Iterator[tuple[slice, Routing]]:
        """The same in parts that fit in memory, each with the tokens it is about."""
        self.layer_facts(layer)
        for shard in self.token_shards():
            yield shard.tokens, shard.routing(layer)

    def token_shards(self) -> Iterator[TokenShard]:
        """All tokens in order, in parts that fit in memory, with what is known of each token."""
        for entry in self._shards("tokens"):
            yield TokenShard(self.folder, entry, self.stack)

    def inputs(self, layer: int) -> Recorded:
        """Inputs of the block, for the sample."""
        return self.wide(layer, "inputs")

    def residual(self, layer: int) -> Recorded:
        """Residual stream before the block and its norm, for the sample."""
        return self.wide(layer, "residual")

    def shared_output(self, layer: int) -> Recorded:
        """What the shared expert added, for the sample."""
        return self.wide(layer, "shared_output")

    def wide(self, layer: int, name: str) -> Recorded:
        """Any wide tensor, for the sample of a layer.

        The sample is all tokens of the first rows and the union of the experts' own samples; it
        is not a uniform sample of all tokens.

        Raises:
            CaptureError: The layer or the tensor was not recorded.
        """
        self.layer_facts(layer)
        self._require(name)
        entries = [
            entry
            for kind in ("rows", "sample")
            for entry in self._shards(kind)
            if Place(self.stack, layer).within(entry)
        ]
        if not entries:
            raise CaptureError(
                f"{self.folder} holds no sample of layer {layer}",
                remedy="Capture with tokens or tokens_per_expert above 0",
            )
        tokens, values = (
            torch.cat([read_tensor(self.folder, e, self._tensor(layer, part)) for e in entries])
            for part in ("tokens", name)
        )
        return Recorded(tokens, values)

    def whole_row_tokens(self, *tensors: str) -> int:
        """How many tokens of whole rows wide tensors were recorded for; they come first.

        Args:
            *tensors: Names of those that have to be recorded.

        Raises:
            CaptureError: One was not, or no whole rows were.
        """
        if missing := [name for name in tensors if name not in self.recorded]:
            raise CaptureError(
                f"{self.folder} lacks {' and '.join(missing)}",
                got=", ".join(self.recorded),
                remedy=f"Capture again, with --record routing {' '.join(tensors)}",
            )
        count = int(self.manifest["num_whole_row_tokens"])
        if not count:
            raise CaptureError(
                f"{self.folder} holds no whole rows", remedy="Capture again with tokens above 0"
            )
        return count

    def tokens_of(self, layer: int, expert: int) -> Int64[Tensor, "routed"]:
        """All tokens that a layer routed to an expert, ascending.

        Raises:
            CaptureError: The layer was not recorded or has no such expert.
        """
        self._require_expert(layer, expert)
        return torch.cat(
            [
                (experts == expert).any(1).nonzero()[:, 0] + first
                for first, experts in self._routing_shards(layer, "experts")
            ]
        )

    def expert_inputs(self, layer: int, expert: int) -> Recorded:
        """Inputs of the tokens in one expert's own sample; `expert_samples` says which.

        Raises:
            CaptureError: The layer was not recorded, has no such expert, or has no inputs; the
                experts have no samples.
        """
        return self.expert_samples(layer, (expert,))[expert]

    def expert_samples(self, layer: int, experts: Sequence[int]) -> dict[int, Recorded]:
        """Inputs of the tokens in the own samples of several experts; reads the layer once.

        Where the router's weight scales the input of an expert (Llama 4), so are these.

        An expert's sample is uniform without replacement over all tokens of the capture that
        were routed to it: `tokens_per_expert` of them, or all if there are fewer. Other recorded
        tokens are left out, be they in the whole rows or chosen by another of their experts:
        those would stand for the first rows, and for what is also sent to rare experts.

        Raises:
            CaptureError: The layer was not recorded, has no such expert, or has no inputs; the
                experts have no samples.
        """
        for expert in experts:
            self._require_expert(layer, expert)
        self._require_samples()
        recorded = self.inputs(layer)
        used = self._routing_at(layer, "experts", recorded.tokens).long()
        position, slot = torch.isin(used, torch.tensor(experts)).nonzero(as_tuple=True)
        number = Place(self.stack, layer).number
        keys = expert_keys(self.seed, number, self.layer_facts(layer)["num_experts"])
        numbers = priorities(keys, used, recorded.tokens)[position, slot]
        chosen = lowest(used[position, slot], numbers, torch.full_like(keys, self._per_expert))
        position, slot = position[chosen], slot[chosen]
        ascending = position.argsort()
        position, slot = position[ascending], slot[ascending]
        tokens, values = recorded.tokens[position], recorded.values[position]
        if self.layer_facts(layer).get("weighs_inputs", False):
            weights = self._routing_at(layer, "weights", recorded.tokens)[position, slot]
            values = (values * weights[:, None]).to(values)
        own = {expert: used[position, slot] == expert for expert in experts}
        return {expert: Recorded(tokens[mine], values[mine]) for expert, mine in own.items()}

    def _routing_shards(self, layer: int, name: str) -> Iterator[tuple[int, Tensor]]:
        """First token, and int16 experts or fp32 weights [tokens, top_k], of every shard."""
        for entry in self._shards("tokens"):
            tensor = read_tensor(self.folder, entry, self._tensor(layer, name))
            yield entry["first_token"], tensor

    def _routing_at(self, layer: int, name: str, tokens: Int64[Tensor, "some"]) -> Tensor:
        """Experts or weights [some, top_k] of some tokens, which ascend; one shard at a time."""
        parts = []
        for first, values in self._routing_shards(layer, name):
            here = (tokens >= first) & (tokens < first + len(values))
            parts.append(values[tokens[here] - first])
        return torch.cat(parts)

    def _tensor(self, layer: int, name: str) -> str:
        return Place(self.stack, layer).tensor(name)

    def _column(self, name: str) -> Tensor:
        return torch.cat([read_tensor(self.folder, e, name) for e in self._shards("tokens")])
