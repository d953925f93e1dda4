"""Turns reservoir candidates into the final sample, layer by layer."""

from collections.abc import Iterator

import torch
from jaxtyping import Int64
from torch import Tensor

from moescope.captures.partial import Partial
from moescope.captures.places import Place, listed
from moescope.captures.plan import Plan
from moescope.captures.sampling import Reservoirs
from moescope.captures.shards import (
    SHARD_BYTES,
    Columns,
    Entry,
    read_tensor,
    write_shard,
)


def write_samples(
    plan: Plan, partial: Partial, reservoirs: dict[Place, Reservoirs]
) -> Iterator[Entry]:
    """Write the sample beyond the whole rows; its shards depend on the sample alone.

    Tokens of whole rows are among no candidates, so they are not written twice.

    Holds one file of candidates and one shard (twice that while writing) at a time.
    """
    for place in plan.places:
        rows = _sampled_rows(plan, partial, place, reservoirs[place].sample())
        for number, content in enumerate(_in_shards(rows)):
            named = {place.tensor(name): values for name, values in content.items()}
            file = f"sample-{place.file}-{number:05d}.safetensors"
            yield write_shard(partial.folder, file, named, kind="sample", **listed([place]))


def _sampled_rows(
    plan: Plan, partial: Partial, place: Place, sample: Int64[Tensor, "sample"]
) -> Iterator[dict[str, Tensor]]:
    """Tensors of the sampled tokens in token order, one file of candidates after the other."""
    folder, names = partial.candidate_folder, ["tokens", *(tensor.name for tensor in plan.wide)]
    for entry in partial.candidates:
        if not place.within(entry):
            continue
        tokens = read_tensor(folder, entry, place.tensor("tokens"))
        chosen = torch.isin(tokens, sample).nonzero()[:, 0]
        if len(chosen):
            tensors = (read_tensor(folder, entry, place.tensor(name)) for name in names)
            yield {name: tensor[chosen] for name, tensor in zip(names, tensors, strict=True)}


def _in_shards(parts: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Join and cut again into as many rows as fit `SHARD_BYTES`, wherever the parts ended."""
    columns, held = Columns(), 0
    for part in parts:
        for name, values in part.items():
            columns.add(name, values)
        held += len(part["tokens"])
        size = max(1, SHARD_BYTES // (columns.bytes // held))
        while held >= size:
            rows = columns.take()
            yield {name: values[:size] for name, values in rows.items()}
            for name, values in rows.items():
                columns.add(name, values[size:])
            held -= size
    if held:
        yield columns.take()
