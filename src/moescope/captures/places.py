"""Which layer a tensor on disk belongs to: its stack and its number."""

from collections.abc import Iterable
from typing import NamedTuple

from moescope.captures.shards import Entry
from moescope.models.view import MoELayer, Stack

_PREFIXES: dict[Stack, str] = {"decoder": "layer", "encoder": "encoder"}
_LISTS: dict[Stack, str] = {"decoder": "layers", "encoder": "encoder_layers"}


class Place(NamedTuple):
    """A layer of a model; both stacks of an encoder-decoder number theirs from 0."""

    stack: Stack
    layer: int

    @classmethod
    def of(cls, layer: MoELayer) -> "Place":
        """That of a layer in memory."""
        return cls(layer.stack, layer.index)

    def __str__(self) -> str:
        return f"{_PREFIXES[self.stack]}.{self.layer}"

    def tensor(self, name: str) -> str:
        """Name within a file of a tensor that belongs to the layer."""
        return f"{self}.{name}"

    @property
    def file(self) -> str:
        """Part of the names of files that hold this layer alone."""
        return f"{self.layer:03d}" if self.stack == "decoder" else f"encoder-{self.layer:03d}"

    @property
    def number(self) -> int:
        """What the random numbers of the layer are made from: n or, in an encoder, -1 - n."""
        return self.layer if self.stack == "decoder" else -1 - self.layer

    def within(self, entry: Entry) -> bool:
        """Whether a shard holds tensors of the layer."""
        return self.layer in entry.get(_LISTS[self.stack], ())


def listed(places: Iterable[Place]) -> Entry:
    """What the entry of a shard says of the layers within."""
    lists: Entry = {"layers": []}
    for place in sorted(places):
        lists.setdefault(_LISTS[place.stack], []).append(place.layer)
    return lists
