"""What can be recorded. A new tensor is one more `register` call; the format stays as it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from moescope.errors import CaptureError, unknown
from moescope.models.observe import Observation

Parts = dict[str, Tensor]
"""One tensor of [tokens, ...] per name within the file."""


@dataclass(frozen=True, kw_only=True)
class BlockTensor:
    """Something of every mixture-of-experts layer."""

    name: str
    """What the user asks for, and the name in the file unless there are several parts."""
    kind: Literal["narrow", "wide"]
    """Narrow tensors are kept for every token, wide ones for a sample."""
    needs: Literal["block", "residual", "shared expert"]
    """The part of the model that has to be there and to be watched."""
    description: str
    """What it is, with its unit."""
    compute: Callable[[Observation, Int64[Tensor, "chosen"]], Parts]
    """Values for some rows of an observation."""


@dataclass(frozen=True, kw_only=True)
class LogitsTensor:
    """One number per token, computed from the logits of the language-model head."""

    name: str
    """What the user asks for, and the name in the file."""
    description: str
    """What it is, with its unit."""
    compute: Callable[
        [Float[Tensor, "rows length vocabulary"], Int64[Tensor, "rows length"], Tensor],
        Float[Tensor, "rows length"],
    ]
    """Values from logits, input ids and attention mask."""


RECORDABLE: dict[str, BlockTensor | LogitsTensor] = {}
"""Everything that can be recorded, by name."""


def register(tensor: BlockTensor | LogitsTensor) -> None:
    """Make a tensor recordable; a name can be taken once."""
    assert tensor.name not in RECORDABLE, f"{tensor.name} is registered twice"
    RECORDABLE[tensor.name] = tensor


def recordable(name: str) -> BlockTensor | LogitsTensor:
    """Look up a tensor.

    Raises:
        CaptureError: Nothing of that name is registered.
    """
    if name not in RECORDABLE:
        raise unknown("tensor to record:", name, RECORDABLE, CaptureError)
    return RECORDABLE[name]


def _routing(seen: Observation, chosen: Int64[Tensor, "chosen"]) -> Parts:
    routing = seen.routing
    return {
        "experts": routing.experts.index_select(0, chosen).to(torch.int16),
        "weights": routing.weights.index_select(0, chosen).float(),
        "logits": routing.logits.index_select(0, chosen).float(),
    }


def _inputs(seen: Observation, chosen: Int64[Tensor, "chosen"]) -> Parts:
    return {"inputs": seen.input.index_select(0, chosen)}


def _residual(seen: Observation, chosen: Int64[Tensor, "chosen"]) -> Parts:
    assert seen.residual is not None, "observed without the residual stream"
    return {"residual": seen.residual.index_select(0, chosen)}


def _shared_output(seen: Observation, chosen: Int64[Tensor, "chosen"]) -> Parts:
    output = seen.layer.shared_output(seen.input.index_select(0, chosen))
    assert output is not None, "recorded from a layer without a shared expert"
    return {"shared_output": output}


def token_loss(
    logits: Float[Tensor, "rows length vocabulary"],
    input_ids: Int64[Tensor, "rows length"],
    attention_mask: Tensor,
) -> Float[Tensor, "rows length"]:
    """Loss in nats of predicting, at each position, the next token of the row.

    NaN at the last token of a row, which has no next one, and at padding; finite elsewhere.
    """
    losses = torch.full(input_ids.shape, torch.nan, device=logits.device)
    for row, ids in enumerate(input_ids):  # a row at a time: fp32 logits are large
        losses[row, :-1] = functional.cross_entropy(
            logits[row, :-1].float(), ids[1:], reduction="none"
        )
    losses[:, :-1].masked_fill_(attention_mask[:, 1:] == 0, torch.nan)
    return losses


register(
    BlockTensor(
        name="routing",
        kind="narrow",
        needs="block",
        description="experts used, their weights, and the router's raw logits",
        compute=_routing,
    )
)
register(
    BlockTensor(
        name="inputs",
        kind="wide",
        needs="block",
        description="input of the block: the residual stream after the norm before the block",
        compute=_inputs,
    )
)
register(
    BlockTensor(
        name="residual",
        kind="wide",
        needs="residual",
        description="residual stream before the block and its norm",
        compute=_residual,
    )
)
register(
    BlockTensor(
        name="shared_output",
        kind="wide",
        needs="shared expert",
        description="what the shared expert adds to the output, its gate included",
        compute=_shared_output,
    )
)
register(
    LogitsTensor(
        name="token_loss",
        description="loss of predicting the next token of the row, in nats",
        compute=token_loss,
    )
)
