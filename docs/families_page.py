"""The page on model families: each is built tiny, taken apart and put together again."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from moescope.errors import ModelError
from moescope.models.conformance import conformance
from moescope.models.families.registry import by_block_class
from moescope.models.load import load
from moescope.models.observe import Observation, observe
from moescope.models.view import MoELayer, MoEModel

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import deviants_zoo
import families_zoo

LENGTHS = (13, 4, 9)
# Errors differ from machine to machine by more than their first digit; these bounds do not.
BOUNDS = (1e-6, 1e-5)
PORTED = {"deepseek"}

INTRODUCTION = """\
# Model families

A model is loaded if, and only if, moescope can rebuild the output of every one of its sparse
blocks from three things: the routing that the block *used* (captured, not re-derived), the
experts, and the shared expert. Rebuilt in single precision, the relative error must be at most
1e-5; `moescope.load` checks it every time on a short input and refuses a model that fails, naming
the layer and the error. So a family that is not listed here loads too, if it is built like one
that is.

Below, every family that transformers ships: tiny random models (2 layers, hidden size 32), rows
of unequal length behind an attention mask, the largest error over layers. Blocks in half precision
are upcast for the comparison. `moescope inspect MODEL` or `moescope.conformance(model, input_ids)`
does the same for yours. What can be changed in each: [interventions](interventions.md).

"""

COLUMNS = """\
What the columns say is measured on those models, with the configuration's defaults. *Weights*:
what the routing weights are made of, up to a constant where they are "scaled"; "other" are two
masked softmaxes (`phimoe`) and a scale of each expert (`gemma4_text`). *Choice*: whether it is
the experts with the largest router logits; "adjusted" where a bias or groups of experts have a
say (biases are random here). *Expert*: its neurons, from what its first one or two matrices give.

"""


def families_page() -> str:
    """The whole page."""
    logging.set_verbosity_error()
    builders = {family: _builder(family) for family in families_zoo.FAMILIES}
    refused = {family: _builder(family) for family in families_zoo.REFUSED}
    builders |= deviants_zoo.DEVIANTS
    refused |= deviants_zoo.REFUSED
    rows = [_row(family, builders[family]) for family in sorted(builders)]
    table = _table(
        ["family", "block", "weights", "choice", "shared expert", "expert", "fp32", "bf16"], rows
    )
    reasons = [[f"`{family}`", _reason(refused[family])] for family in sorted(refused)]
    return (
        f"{INTRODUCTION}## {len(rows)} that load\n\n{COLUMNS}{table}\n"
        f"`{'`, `'.join(sorted(PORTED))}` is not part of transformers and comes with moescope.\n\n"
        f"## {len(reasons)} that are refused\n\n{_table(['family', 'reason'], reasons)}"
    )


def _builder(family: str) -> Callable[[], PreTrainedModel]:
    return lambda: families_zoo.build(family)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(family: str, build: Callable[[], PreTrainedModel]) -> list[str]:
    model = load(build())
    with torch.no_grad():
        observation = _observed(model)
        layer = observation.layer
        return [
            f"`{family}`",
            _block(layer),
            _weights(observation),
            _choice(observation),
            _shared(layer),
            _expert(layer),
            _error(model),
            _error(load(build().to(torch.bfloat16))),
        ]


def _reason(build: Callable[[], PreTrainedModel]) -> str:
    """What is wrong, and what was found, of an error's message."""
    try:
        load(build())
    except ModelError as error:
        found = re.match(r"(.*?)\.(?: Got: (.*?)\.)?(?: Expected| [A-Z]|$)", str(error))
        assert found is not None
        return ": ".join(part for part in found.groups() if part)
    raise AssertionError("a family that is listed as refused loads")


def _block(layer: MoELayer) -> str:
    """The class of the block in transformers; where there is none, of what holds its parts."""
    block = type(layer.block)
    if not block.__module__.startswith("moescope.models.families"):
        return block.__name__
    families = by_block_class()
    return next(name for name in families if families[name] is type(layer))


def _ids(rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(families_zoo.VOCABULARY, (rows, length), generator=generator)


def _observed(model: MoEModel) -> Observation:
    seen: list[Observation] = []
    with observe(model.layers, seen.append):
        model.forward(_ids(4, 32))
    return seen[0]


def _error(model: MoEModel) -> str:
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    table = conformance(model, _ids(*mask.shape) * mask, attention_mask=mask)
    largest = table.relative_error.max()
    return next(f"< {bound:.0e}".replace("e-0", "e-") for bound in BOUNDS if largest < bound)


def _weights(observation: Observation) -> str:
    routing = observation.routing
    used = (routing.experts >= 0).all(1)
    weights, experts = routing.weights[used].float(), routing.experts[used]
    for name, scores in _scores(routing.logits[used].float()):
        ratios = weights / scores.gather(1, experts)
        if _constant(ratios, ratios.mean()):
            return name if _constant(ratios, torch.ones(())) else f"{name}, scaled"
        if _constant(ratios, ratios.mean(1, keepdim=True)):
            sums = weights.sum(1)
            if not _constant(sums, sums.mean()):
                return f"{name}, normalised with the shared expert"
            scaled = "" if _constant(sums, torch.ones(())) else ", scaled"
            return f"{name}, normalised{scaled}"
    return "other"


def _scores(logits: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "softmax", logits.softmax(1)
    yield "sigmoid", logits.sigmoid()
    yield "sqrt(softplus)", torch.nn.functional.softplus(logits).sqrt()


def _constant(values: Tensor, expected: Tensor) -> bool:
    return bool(torch.allclose(values, expected.expand_as(values), rtol=1e-4, atol=0))


def _choice(observation: Observation) -> str:
    routing = observation.routing
    used = (routing.experts >= 0).all(1)
    logits, experts = routing.logits[used], routing.experts[used]
    largest = logits.topk(experts.shape[1]).indices
    same = torch.equal(largest.sort(1).values, experts.sort(1).values)
    dropped = "" if used.all() else ", while there is capacity"
    return ("largest" if same else "adjusted") + dropped


def _shared(layer: MoELayer) -> str:
    if not layer.has_shared_expert:
        return "none"
    if not layer.shared_in_block:
        return "beside the block"
    names = [name for name, _ in layer.block.named_children()]
    gated = any(name.startswith("shared_") and name.endswith("_gate") for name in names)
    return "behind a gate" if gated else "yes"


def _expert(layer: MoELayer) -> str:
    weights = layer.expert_weights(0)
    up = f"(up + {weights.up_offset:g})" if weights.up_offset else "up"
    neurons = f"{weights.activation}(up)"
    if weights.gate is not None:
        neurons = f"{weights.activation}(gate) {up}"
    return neurons if weights.limit is None else f"{neurons}, limited"
