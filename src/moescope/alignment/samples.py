"""What an expert did on a sample of tokens: its inputs, its outputs, their documents."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from moescope.errors import AlignmentError


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs and outputs of one expert on the tokens routed to it.

    Raises:
        AlignmentError: The tensors do not fit one another, or hold NaN or infinity.
    """

    inputs: Float[Tensor, "..."]
    """[tokens, hidden]: what the expert was given."""
    outputs: Float[Tensor, "..."]
    """[tokens, hidden]: what it returned, before the routing weight."""
    documents: Int64[Tensor, "..."] | None = None
    """[tokens]: number of the document of each token; needed for intervals."""

    def __post_init__(self) -> None:
        if self.inputs.ndim != 2 or self.inputs.shape != self.outputs.shape:
            raise AlignmentError(
                "inputs and outputs do not fit one another",
                got=f"{tuple(self.inputs.shape)} and {tuple(self.outputs.shape)}",
                expected="[tokens, hidden] twice",
            )
        if self.documents is not None and self.documents.shape != self.inputs.shape[:1]:
            raise AlignmentError(
                "there is not one document per token",
                got=tuple(self.documents.shape),
                expected=tuple(self.inputs.shape[:1]),
            )
        require_finite("inputs", self.inputs)
        require_finite("outputs", self.outputs)

    def __len__(self) -> int:
        return self.inputs.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width of inputs and outputs."""
        return self.inputs.shape[1]

    @property
    def num_documents(self) -> int:
        """Number of documents, 0 where they are not known."""
        return 0 if self.documents is None else len(torch.unique(self.documents))

    def single(self) -> "Samples":
        """The same in fp32."""
        return Samples(self.inputs.float(), self.outputs.float(), self.documents)

    def where(self, chosen: Bool[Tensor, " tokens"]) -> "Samples":
        """The chosen tokens."""
        documents = None if self.documents is None else self.documents[chosen]
        return Samples(self.inputs[chosen], self.outputs[chosen], documents)

    def split(self, share: float, generator: torch.Generator) -> tuple["Samples", "Samples"]:
        """Set aside about `share` of the tokens, by whole documents where they are small enough.

        A document that would bring the part above twice the wanted size, or above half of the
        tokens, is never set aside whole. Where the others make up less than half of the wanted
        size, as with fewer than two documents, the rest is single tokens of what remains.

        Returns:
            The tokens that stay, and those set aside; at least one token in each.
        """
        number = len(self)
        wanted = min(max(1, round(share * number)), number - 1)
        most = max(wanted, min(2 * wanted, number // 2))
        documents = torch.zeros(number) if self.documents is None else self.documents.cpu()
        aside = _whole_documents(documents, wanted, most, generator)
        if 2 * int(aside.sum()) < wanted:
            left = (~aside).nonzero()[:, 0]
            order = torch.randperm(len(left), generator=generator)
            aside[left[order[: wanted - int(aside.sum())]]] = True
        aside = aside.to(self.inputs.device)
        return self.where(~aside), self.where(aside)

    def first(self, tokens: int, generator: torch.Generator) -> "Samples":
        """Whole documents in random order, until as near as can be to `tokens`; at least one.

        The same generator gives the same order: the tokens of a smaller call are among those of a
        larger one. Where documents are not known every token is one.
        """
        number = torch.arange(len(self)) if self.documents is None else self.documents.cpu()
        ids, of, sizes = torch.unique(number, return_inverse=True, return_counts=True)
        order = torch.randperm(len(ids), generator=generator)
        filled = sizes[order].cumsum(0)
        taken = filled - sizes[order] // 2 <= tokens
        taken[:1] = True
        chosen = torch.zeros(len(ids), dtype=torch.bool)
        chosen[order[taken]] = True
        return self.where(chosen[of].to(self.inputs.device))


def _whole_documents(
    documents: Tensor, wanted: int, most: int, generator: torch.Generator
) -> Bool[Tensor, " tokens"]:
    """Tokens of random documents, about `wanted` and at most `most` in all; maybe none."""
    ids, of, sizes = torch.unique(documents, return_inverse=True, return_counts=True)
    order = torch.randperm(len(ids), generator=generator)
    order = order[sizes[order] <= most]
    filled = sizes[order].cumsum(0)
    # In random order, as long as they bring the size nearer; the first in any case.
    taken = filled - sizes[order] // 2 <= wanted
    taken[:1] = True
    chosen = torch.zeros(len(ids), dtype=torch.bool)
    chosen[order[taken & (filled <= most)]] = True
    return chosen[of]


def require_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        AlignmentError: `tensor` holds some.
    """
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise AlignmentError(
            f"{name} hold NaN or infinity",
            got=f"{bad} of {tensor.numel()} values",
            remedy="Look for overflow in the model: capture in bf16 or fp32 instead of fp16",
        )
