"""Takes what the layers show during forward passes and turns it into shards."""

import hashlib
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from moescope.captures.partial import Group, Partial
from moescope.captures.places import Place, listed
from moescope.captures.plan import Plan
from moescope.captures.sampling import Reservoirs, expert_keys
from moescope.captures.shards import (
    SHARD_BYTES,
    SPILL_BYTES,
    Columns,
    Entry,
    read_tensor,
    write_shard,
)
from moescope.corpora.packing import Batch
from moescope.models.observe import Observation


class Recorder:
    """Buffers one group of shards and the reservoir candidates.

    Holds at most `SHARD_BYTES` + `SPILL_BYTES` + one batch, twice that while writing. What it
    computes per layer stays on the device of the model; only chosen rows leave it.
    """

    def __init__(self, plan: Plan, partial: Partial) -> None:
        self._plan = plan
        self._partial = partial
        self._written = self._state = replace(partial.last, shards=(), candidates=())
        self.reservoirs = _reservoirs(plan, partial)
        self._narrow, self._rows, self._spill = Columns(), Columns(), Columns()
        self._offers: dict[Place, tuple[Tensor, Tensor]] = {}
        self._names: list[str] = []
        self._spilling: set[Place] = set()
        self._spilled: list[Entry] = []
        before = partial.last.unused_slots
        self._unused = {place: torch.tensor(before.get(str(place), 0)) for place in plan.places}

    @property
    def full(self) -> bool:
        """Whether it is time to write.

        Depends on the corpus and the options alone, so that an interruption changes no group.
        """
        tokens = self._state.tokens - self._written.tokens
        buffered = self._narrow.bytes + self._rows.bytes
        return tokens >= self._plan.options.shard_tokens or buffered >= SHARD_BYTES

    def begin(self, batch: Batch) -> None:
        """Look at a batch before its forward pass."""
        self._first = self._state.tokens
        self._whole = self._tokens_in_whole_rows(batch)
        self._kept = batch.kept.flatten().nonzero()[:, 0]
        self._kept_on_device = self._kept
        self._state = Group(
            rows=batch.first_row + len(batch.input_ids),
            tokens=self._first + len(self._kept),
            documents=self._state.documents + len(batch.document_names),
            whole_tokens=self._state.whole_tokens + self._whole,
            data_sha256=chained_sha256(self._state.data_sha256, batch),
        )
        self._names += batch.document_names.values()
        rows, positions = batch.kept.nonzero(as_tuple=True)
        self._narrow.add("token_ids", batch.input_ids[batch.kept].to(torch.int32))
        self._narrow.add("documents", batch.documents[batch.kept].to(torch.int32))
        self._narrow.add("domains", batch.domains[batch.kept].to(torch.int16))
        self._narrow.add("rows", (rows + batch.first_row).to(torch.int32))
        self._narrow.add("positions", positions.to(torch.int32))

    def observe(self, seen: Observation) -> None:
        """Take the tensors of one layer during the forward pass."""
        place, kept = Place.of(seen.layer), self._kept_beside(seen.routing.experts)
        unused = (seen.routing.experts[kept] < 0).sum()
        self._unused[place] = self._unused[place].to(unused.device) + unused
        for tensor in self._plan.narrow:
            for name, values in tensor.compute(seen, kept).items():
                self._narrow.add(place.tensor(name), values)
        if self._plan.wide:
            if self._whole:
                self._take_whole_rows(seen, kept[: self._whole])
            self._take_candidates(seen, kept)

    def per_token(self, name: str, values: Tensor) -> None:
        """Take a tensor of one number per position of the batch."""
        self._narrow.add(name, values.flatten()[self._kept_beside(values)])

    def end(self) -> None:
        """Finish a batch after its forward pass."""
        for columns in (self._narrow, self._rows, self._spill):
            columns.settle()
        for place, (tokens, experts) in self._offers.items():
            self.reservoirs[place].offer(tokens.cpu(), experts.cpu())
        self._offers.clear()
        if self._spill.bytes >= SPILL_BYTES:
            self._write_candidates()

    def flush(self) -> None:
        """Write the group and note that it is complete."""
        if self._state.rows == self._written.rows:
            return
        folder, number = self._partial.folder, f"{len(self._partial.groups):05d}.safetensors"
        tokens = {
            "first_token": self._written.tokens,
            "tokens": self._state.tokens - self._written.tokens,
        }
        content = self._narrow.take() | _text_tensors(self._names)
        shards = [write_shard(folder, f"tokens-{number}", content, kind="tokens", **tokens)]
        if self._rows.bytes:
            layers = listed(self._plan.places)
            content = self._rows.take()
            shards.append(write_shard(folder, f"rows-{number}", content, kind="rows", **layers))
        self._write_candidates()
        unused = {str(place): int(count) for place, count in self._unused.items()}
        self._partial.commit(
            replace(self._state, shards=shards, candidates=self._spilled, unused_slots=unused)
        )
        self._names, self._spilled, self._written = [], [], self._state

    def _tokens_in_whole_rows(self, batch: Batch) -> int:
        """How many kept tokens of the batch are recorded with their rows: a prefix."""
        if not self._plan.wide:
            return 0
        counts = batch.kept.sum(1)
        before = self._state.tokens + counts.cumsum(0) - counts
        return int(counts[before < self._plan.options.tokens].sum())

    def _kept_beside(self, tensor: Tensor) -> Int64[Tensor, "kept"]:
        """Indices of the kept positions, on the device of a tensor."""
        if self._kept_on_device.device != tensor.device:
            self._kept_on_device = self._kept.to(tensor.device)
        return self._kept_on_device

    def _take_whole_rows(self, seen: Observation, chosen: Int64[Tensor, "chosen"]) -> None:
        tokens = torch.arange(self._first, self._first + len(chosen))
        self._rows.add(Place.of(seen.layer).tensor("tokens"), tokens)
        self._take_wide(self._rows, seen, chosen)

    def _take_candidates(self, seen: Observation, offered: Int64[Tensor, "offered"]) -> None:
        place = Place.of(seen.layer)
        candidates = self.reservoirs[place].candidates(seen.routing.experts[offered], self._first)
        accepted = candidates.nonzero()[:, 0]
        tokens = self._first + accepted
        experts = seen.routing.experts[offered[accepted]].to(torch.int16)
        self._offers[place] = (tokens, experts)
        # Those in whole rows, a prefix, are in the reservoirs too but recorded already.
        known = int((accepted < self._whole).sum()) if self._whole else 0
        if known == len(accepted):
            return
        self._spilling.add(place)
        self._spill.add(place.tensor("tokens"), tokens[known:])
        self._spill.add(place.tensor("experts"), experts[known:])
        self._take_wide(self._spill, seen, offered[accepted[known:]])

    def _take_wide(
        self, columns: Columns, seen: Observation, chosen: Int64[Tensor, "chosen"]
    ) -> None:
        for tensor in self._plan.wide:
            for name, values in tensor.compute(seen, chosen).items():
                columns.add(Place.of(seen.layer).tensor(name), values.to(self._plan.dtype))

    def _write_candidates(self) -> None:
        if not self._spill.bytes:
            return
        file = f"candidates-{len(self._partial.groups):05d}-{len(self._spilled):03d}.safetensors"
        layers = listed(self._spilling)
        self._spilled.append(
            write_shard(self._partial.candidate_folder, file, self._spill.take(), **layers)
        )
        self._spilling.clear()


def _reservoirs(plan: Plan, partial: Partial) -> dict[Place, Reservoirs]:
    """The reservoirs of every layer as the complete groups left them."""
    found = {}
    for layer in plan.layers:
        place = Place.of(layer)
        keys = expert_keys(plan.options.seed, place.number, layer.num_experts)
        found[place] = one = Reservoirs(
            keys, plan.options.tokens_per_expert, layer.router_weight.device
        )
        for group in partial.groups if plan.wide else ():
            _restore(one, place, partial, group)
    return found


def _restore(reservoirs: Reservoirs, place: Place, partial: Partial, group: Group) -> None:
    for entry in group.shards:
        if entry["kind"] == "rows":
            tokens = read_tensor(partial.folder, entry, place.tensor("tokens"))
            experts = read_tensor(partial.folder, group.shards[0], place.tensor("experts"))
            reservoirs.offer(tokens, experts[: len(tokens)])
    for entry in group.candidates:
        if place.within(entry):
            tokens, experts = (
                read_tensor(partial.candidate_folder, entry, place.tensor(name))
                for name in ("tokens", "experts")
            )
            reservoirs.offer(tokens, experts)


def chained_sha256(before: str, batch: Batch) -> str:
    """Hash of all rows up to the end of a batch, from that of the rows before it.

    Per row: SHA-256 of the hex digest so far, then token ids, documents, domain and kept flags as
    little-endian int32, without the padding. The same rows give the same hash in any batches.
    """
    for row, mask in enumerate(batch.attention_mask.bool()):
        columns = (batch.input_ids, batch.documents, batch.domains, batch.kept)
        values = [column[row][mask].numpy().astype("<i4").tobytes() for column in columns]
        before = hashlib.sha256(before.encode() + b"".join(values)).hexdigest()
    return before


def _text_tensors(names: list[str]) -> dict[str, Tensor]:
    """Strings as UTF-8 bytes and the end of each."""
    encoded = [name.encode() for name in names]
    ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    return {
        "document_names.bytes": torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
        if any(encoded)
        else torch.empty(0, dtype=torch.uint8),
        "document_names.ends": torch.from_numpy(ends),
    }
