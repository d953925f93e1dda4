"""Tokens of a capture, so many at a time as one shard holds."""

from pathlib import Path

from jaxtyping import Float, Int64
from torch import Tensor

from moescope.captures.places import Place
from moescope.captures.shards import Entry, read_tensor
from moescope.models.view import Routing, Stack


class TokenShard:
    """Consecutive tokens of a capture, in whole rows; a tensor is read when it is asked for."""

    def __init__(self, folder: Path, entry: Entry, stack: Stack) -> None:
        self._folder, self._entry, self._stack = folder, entry, stack

    def __len__(self) -> int:
        return int(self._entry["tokens"])

    @property
    def tokens(self) -> slice:
        """Which tokens of the capture these are."""
        first = int(self._entry["first_token"])
        return slice(first, first + len(self))

    @property
    def token_ids(self) -> Int64[Tensor, "tokens"]:
        """Vocabulary index of every token."""
        return self._column("token_ids")

    @property
    def documents(self) -> Int64[Tensor, "tokens"]:
        """Document number of every token."""
        return self._column("documents")

    @property
    def domain_of(self) -> Int64[Tensor, "tokens"]:
        """Index into the domains of the capture of every token."""
        return self._column("domains")

    @property
    def rows(self) -> Int64[Tensor, "tokens"]:
        """Row of the corpus of every token."""
        return self._column("rows")

    def routing(self, layer: int) -> Routing:
        """What the router of a layer did with every token."""
        logits, weights = self._of(layer, "logits"), self._of(layer, "weights")
        return Routing(logits=logits, weights=weights, experts=self.experts(layer))

    def experts(self, layer: int) -> Int64[Tensor, "tokens top_k"]:
        """The experts alone; -1 in an unused slot."""
        return self._of(layer, "experts").long()

    def logits(self, layer: int) -> Float[Tensor, "tokens experts"]:
        """The router logits alone."""
        return self._of(layer, "logits")

    def _column(self, name: str) -> Int64[Tensor, "tokens"]:
        return read_tensor(self._folder, self._entry, name).long()

    def _of(self, layer: int, name: str) -> Tensor:
        return read_tensor(self._folder, self._entry, Place(self._stack, layer).tensor(name))
