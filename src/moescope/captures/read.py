"""Opens what `capture` wrote."""

import hashlib
import html
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from moescope.captures.partial import MANIFEST, read_manifest
from moescope.captures.places import Place
from moescope.captures.sampling import expert_keys, lowest, priorities
from moescope.captures.shards import Entry, read_tensor, verify
from moescope.captures.stream import TokenShard
from moescope.errors import CaptureError, unknown
from moescope.models.view import Routing, Stack
from moescope.runs import Run


@dataclass(frozen=True, eq=False)
class Recorded:
    """A wide tensor of some of the tokens."""

    tokens: Int64[Tensor, "recorded"]
    """Indices into the tokens of the capture, ascending."""
    values: Float[Tensor, "recorded hidden"]
    """One row per token, in the dtype of the capture."""


class Capture:
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
        self.folder = Run(run).capture_folder
        self.stack: Stack = stack
        self.manifest: dict[str, Any] = read_manifest(self.folder)
        for entry in self.manifest["shards"]:
            verify(self.folder, entry)
        if sum(entry["tokens"] for entry in self._shards("tokens")) != self.num_tokens:
            raise CaptureError(f"{self.folder / MANIFEST} was altered: its tokens do not add up")
        if not self._layers:
            raise CaptureError(
                f"{self.folder} holds no layer of the {stack}",
                expected=" or ".join(sorted({_stack(la) for la in self.manifest["layers"]})),
            )

    @staticmethod
    def exists(run: str | os.PathLike[str]) -> bool:
        """Whether a run folder holds a complete capture."""
        return (Run(run).capture_folder / MANIFEST).exists()

    @property
    def layers(self) -> list[int]:
        """The model's own numbers of the recorded layers of the stack, ascending."""
        return [layer["index"] for layer in self._layers]

    @property
    def recorded(self) -> list[str]:
        """Names of the recorded tensors."""
        return list(self.manifest["options"]["record"])

    @property
    def domains(self) -> list[str]:
        """Names of the domains."""
        return list(self.manifest["domains"])

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens."""
        return int(self.manifest["num_tokens"])

    @property
    def seed(self) -> int:
        """Seed of the sample."""
        return int(self.manifest["options"]["seed"])

    @property
    def model_name(self) -> str:
        """What was loaded: Hub id, folder, or name of a reference model."""
        return str(self.manifest["model"]["name"])

    @property
    def model_fingerprint(self) -> str:
        """SHA-256 of the model's configuration and weights, as `MoEModel.fingerprint`."""
        return str(self.manifest["model"]["fingerprint"])

    @property
    def model_revision(self) -> str | None:
        """Commit on the Hub, if the model came from there."""
        revision = self.manifest["model"]["revision"]
        return None if revision is None else str(revision)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest, which names the checksum of every shard."""
        return hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()

    def layer_facts(self, layer: int) -> dict[str, Any]:
        """Family, `num_experts`, `top_k`, `hidden_size` and `intermediate_size` of a layer.

        And `unused_slots`: of T x `top_k` those that no expert was used for, for lack of capacity.

        Raises:
            CaptureError: The layer was not recorded.
        """
        for facts in self._layers:
            if facts["index"] == layer:
                return {"unused_slots": 0, **facts}
        raise CaptureError(
            f"layer {layer} is not in {self.folder}",
            expected=f"one of {', '.join(map(str, self.layers))}",
            remedy="Capture again with that layer",
        )

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

    @property
    def _per_expert(self) -> int:
        return int(self.manifest["options"]["tokens_per_expert"])

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

    @cached_property
    def _layers(self) -> list[dict[str, Any]]:
        """What the manifest says of the layers of the stack."""
        return [layer for layer in self.manifest["layers"] if _stack(layer) == self.stack]

    def _tensor(self, layer: int, name: str) -> str:
        return Place(self.stack, layer).tensor(name)

    def _shards(self, kind: str) -> list[Entry]:
        return [entry for entry in self.manifest["shards"] if entry["kind"] == kind]

    def _column(self, name: str) -> Tensor:
        return torch.cat([read_tensor(self.folder, e, name) for e in self._shards("tokens")])

    def _require(self, name: str) -> None:
        if name not in self.recorded:
            raise unknown("recorded tensor:", name, self.recorded, CaptureError)

    def _require_samples(self) -> None:
        if not self._per_expert:
            raise CaptureError(
                f"{self.folder} holds no samples of experts, whole rows alone",
                remedy="Capture with tokens_per_expert above 0",
            )

    def _require_expert(self, layer: int, expert: int) -> None:
        count = self.layer_facts(layer)["num_experts"]
        if not 0 <= expert < count:
            raise CaptureError(
                f"layer {layer} has no such expert", got=expert, expected=f"0 to {count - 1}"
            )

    def _facts(self) -> dict[str, str]:
        return {
            "model": self.model_name,
            "domains": ", ".join(self.domains),
            "tokens": f"{self.num_tokens:,}",
            "documents": f"{self.manifest['num_documents']:,}",
            "layers": ", ".join(map(str, self.layers)),
            "recorded": ", ".join(self.recorded),
        }

    def __repr__(self) -> str:
        facts = "; ".join(f"{name} {fact}" for name, fact in self._facts().items())
        return f"Capture({str(self.folder)!r}: {facts})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(fact)}</td></tr>"
            for name, fact in self._facts().items()
        )
        return f"<h3>Capture</h3><table>{rows}</table>"


def _stack(layer: dict[str, Any]) -> str:
    """That of a layer in the manifest; version 1 knew decoders only."""
    return str(layer.get("stack", "decoder"))
