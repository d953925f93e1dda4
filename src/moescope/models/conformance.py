"""Proves that the view of a model is the model: rebuilds every block from its parts."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from moescope.errors import ConformanceError
from moescope.models.observe import Observation, observe
from moescope.models.offload import resident
from moescope.models.quantised import QuantisedLayer, is_quantised
from moescope.models.view import MoELayer, MoEModel, Routing

TOLERANCE = 1e-5
"""Largest relative error, ||rebuilt - returned|| / ||returned||, of a block that conforms."""
HALF_TOLERANCE = 2e-2
"""The same for a block of a half-precision model with quantised weights, which cannot be upcast:
the same experts, added up in another order, differ by up to 1e-2."""


@dataclass(frozen=True)
class _Difference:
    """How far what was rebuilt is from what was observed."""

    max_abs_error: float
    relative_error: float
    tolerance: float = TOLERANCE


def conformance(
    model: MoEModel,
    input_ids: Int[Tensor, "rows length"],
    *,
    attention_mask: Int[Tensor, "rows length"] | None = None,
) -> pd.DataFrame:
    """Rebuild what every mixture-of-experts block returns and compare, in fp32 or better.

    Rebuilt, per layer: the output from the *captured* routing, `expert_outputs` and
    `shared_output`; the same with `expert_weights` in place of `expert_outputs`; the router
    logits from `router_weight`; the routing from `route`. The errors in the table are the largest
    of the four (of three where experts are quantised and have no weights to read). Blocks of
    half-precision models run once more, upcast, on the inputs that they had in the model, so
    that both sides of the comparison are fp32 and a difference is a difference of mathematics.
    Blocks with quantised weights cannot be upcast: in half precision they are compared as they
    are, and a difference of less than rounding goes unseen.

    Args:
        model: The model.
        input_ids: Token ids.
        attention_mask: 1 at tokens that count; all by default.

    Returns:
        One row per layer: stack, layer, family, max_abs_error, relative_error, passed
        (relative_error <= 1e-5; 2e-2 with quantised weights in half precision).

    Raises:
        ConformanceError: A block was taken out of the model or is not run by it.
    """
    observations = _observations(model, input_ids, attention_mask)
    kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = []
    for observation in observations:
        layer = observation.layer
        difference = _compare(observation, kept.flatten().bool())
        rows.append(
            {
                "stack": layer.stack,
                "layer": layer.index,
                "family": layer.family,
                "max_abs_error": difference.max_abs_error,
                "relative_error": difference.relative_error,
                "passed": difference.relative_error <= difference.tolerance,
            }
        )
    return pd.DataFrame(rows)


def require_conformance(model: MoEModel) -> None:
    """Refuse a model whose blocks cannot be rebuilt, on a few random tokens (fixed seed).

    Raises:
        ConformanceError: Names the first layer that fails and its error.
    """
    table = conformance(model, sample_ids(model))
    for row in table.itertuples():
        if not row.passed:
            raise ConformanceError(
                f"{row.stack} layer {row.layer} of the model {model.name!r} does not do what the "
                f"family {row.family} says",
                got=f"relative error {row.relative_error:.3g}",
                expected=f"at most {TOLERANCE:g} ({HALF_TOLERANCE:g}: quantised in half precision)",
                remedy="Its blocks differ from those of the family in this version of transformers",
            )


def sample_ids(model: MoEModel) -> Int[Tensor, "rows length"]:
    """A few random tokens of the model's vocabulary, always the same."""
    embeddings = model.model.get_input_embeddings().get_parameter("weight")
    generator = torch.Generator().manual_seed(0)
    return torch.randint(len(embeddings), (2, 16), generator=generator)


def _observations(
    model: MoEModel, input_ids: Tensor, attention_mask: Tensor | None
) -> Sequence[Observation]:
    """One observation per layer, of the model's own forward pass."""
    for layer in model.layers:
        if all(module is not layer.block for module in layer.decoder_layer.modules()):
            raise _changed(model, layer, "another module has taken the place of the block")
    observed: list[Observation] = []
    with torch.no_grad(), observe(model.layers, observed.append):
        model.forward(input_ids, attention_mask)
    for layer in model.layers:
        if all(observation.layer is not layer for observation in observed):
            raise _changed(model, layer, "the forward pass of the model does not run the block")
    return observed


def _changed(model: MoEModel, layer: MoELayer, what: str) -> ConformanceError:
    return ConformanceError(
        f"{layer.stack} layer {layer.index} of the model {model.name!r} was changed",
        got=what,
        remedy="Undo the change, or load the model again",
    )


@torch.no_grad()
def _compare(observation: Observation, kept: Bool[Tensor, " tokens"]) -> _Difference:
    """The largest difference between what a layer did and what its parts say it did."""
    layer = observation.layer
    kept = kept.to(observation.input.device)
    half = observation.input.dtype.itemsize < torch.float32.itemsize
    fixed = any(is_quantised(tensor) for tensor in layer.block.parameters())
    with resident(layer.block), nullcontext() if fixed else _at_least_fp32(layer.block):
        if half and not fixed:
            observation = _replayed(layer, observation.input)
        x, routing = observation.input, observation.routing
        again = _route(layer, x)
        used = ((routing.experts >= 0) & (again.experts >= 0)).all(1)
        pairs = [
            (_rebuilt(observation, _by_module), observation.output),
            (_logits(layer, x.to(routing.logits)), routing.logits),
            (_dense(again) * used[:, None], _dense(routing) * used[:, None]),
        ]
        if not isinstance(layer, QuantisedLayer):
            pairs.append((_rebuilt(observation, _by_weights), observation.output))
        differences = [_difference(rebuilt[kept], seen[kept]) for rebuilt, seen in pairs]
    worst = max(differences, key=lambda d: (math.isnan(d.relative_error), d.relative_error))
    return replace(worst, tolerance=HALF_TOLERANCE) if half and fixed else worst


def _by_module(layer: MoELayer, expert: int, x: Tensor) -> Tensor:
    return layer.expert_outputs(x, [expert])[0]


def _by_weights(layer: MoELayer, expert: int, x: Tensor) -> Tensor:
    return layer.expert_weights(expert)(x)


def _rebuilt(
    observation: Observation, output_of: Callable[[MoELayer, int, Tensor], Tensor]
) -> Float[Tensor, "tokens hidden"]:
    """Block output: shared expert + sum over the chosen experts of weight * expert output."""
    layer, routing, x = observation.layer, observation.routing, observation.input
    shared = layer.shared_output(x) if layer.shared_in_block else None
    output = torch.zeros_like(x) if shared is None else shared.clone()
    for expert in sorted(set(routing.experts[routing.experts >= 0].tolist())):
        tokens, slots = torch.where(routing.experts == expert)
        function = partial(output_of, layer, expert)
        weighted = layer.weigh(function, x[tokens], routing.weights[tokens, slots])
        output.index_add_(0, tokens, weighted.to(output))
    return output


def _route(layer: MoELayer, x: Float[Tensor, "tokens hidden"]) -> Routing:
    try:
        return layer.route(x)
    except TypeError as error:
        raise ConformanceError(
            f"the router of {layer.stack} layer {layer.index} needs more than its block's input",
            got=error,
        ) from error


def _logits(layer: MoELayer, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens experts"]:
    bias = layer.router_bias
    return linear(x, layer.router_weight.to(x), None if bias is None else bias.to(x))


def _dense(routing: Routing) -> Float[Tensor, "tokens experts"]:
    """The weight of every expert for every token, 0 where it is not used."""
    weights = torch.zeros_like(routing.logits)
    experts = routing.experts.clamp_min(0)  # unused slots weigh 0
    return weights.scatter_add_(1, experts, routing.weights.to(weights))


def _difference(rebuilt: Tensor, seen: Tensor) -> _Difference:
    error = (rebuilt - seen).double()
    scale = seen.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
    return _Difference(error.abs().max().item(), (error.norm() / scale).item())


def _replayed(layer: MoELayer, x: Float[Tensor, "tokens hidden"]) -> Observation:
    """What the (upcast) block does with the same inputs, upcast."""
    observed: list[Observation] = []
    with observe([layer], observed.append):
        layer.block(x.float()[None])
    return observed[0]


@contextmanager
def _at_least_fp32(block: nn.Module) -> Iterator[None]:
    """Upcast the half-precision tensors of a block in place, then put the originals back.

    In place rather than on a copy, so that whatever was done to the block takes part.
    """
    originals = [
        (tensor, tensor.data)
        for tensor in chain(block.parameters(), block.buffers())
        if tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize
    ]
    try:
        for tensor, original in originals:
            tensor.data = original.float()
        yield
    finally:
        for tensor, original in originals:
            tensor.data = original
