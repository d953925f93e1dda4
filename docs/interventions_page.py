"""The page on interventions: each is tried on a tiny model of every family."""

import sys
from collections import Counter
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from moescope import interventions
from moescope.experts.adapter import Adapter
from moescope.models.conformance import sample_ids
from moescope.models.load import load
from moescope.models.view import MoEModel

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from interventions_zoo import BUILDERS

INTRODUCTION = """\
# Interventions

An intervention changes a model for as long as a `with` block lasts. Afterwards the model is the
same to the bit, also after an error or an interrupted forward pass; the keys of its state dict
stay the same all the time.

```python
import moescope
from moescope.interventions import mask_experts, set_top_k, substitute

model = moescope.load("tiny")
layer, later = model.layers[0], model.layers[-1]

with set_top_k(model.layers, 1, "same_mass"), mask_experts(layer, [3]):
    model.forward(input_ids, head=True).logits

with substitute((layer, 5), (later, 2), adapter):  # an adapter that `align` found
    ...
```

An expert is a pair of a layer and a number, so that encoder and decoder are not mixed up.

| intervention | meanwhile |
|---|---|
| `mask_experts(layer, experts)` | the router chooses as if they did not exist, as after pruning |
| `set_top_k(layers, k, weights)` | only the k largest weights of the router's choice count, the \
others are 0; what stays is `"as_is"`, rescaled to the `"same_mass"` as before, or `"to_one"`; \
k = 0 leaves the shared expert alone |
| `swap_experts(a, b)` | the parameters of two experts are exchanged; routers stay |
| `swap_blocks(a, b, experts_only)` | router, experts and shared expert of two layers are \
exchanged, or the experts only; nothing is copied |
| `substitute(source, target, adapter)` | tokens routed to the source get f_target(A(x)) |
| `insert_adapter(expert, adapter)` | f(A(x)) |
| `scale_expert(expert, factor)` | factor * f(x) |
| `replace_output(expert, value)` | the value for all tokens: the mean of its outputs (mean \
ablation) or 0 |
| `ablate_neurons(expert, neurons)` | their activations count as zero |

`moescope.models.observe.observe` sees the routing that is used: the experts that were chosen
instead, weights of 0 where `set_top_k` left something out. What an expert computes does not change
what is seen of its routing. Gradients flow into the tensors of adapters; the experts can be frozen.
A softmax over all experts is, under `mask_experts`, taken over those that are left: in families
that do not renormalise, the weights of the chosen ones grow by the share of the masked ones. Where
the weight of the router scales the input of an expert (Llama 4), x is the scaled input.

## Several at once

Write them in one `with`, or enter them into a `contextlib.ExitStack`.

- Of two that change what the same expert computes, the later changes what the earlier made: first
  `replace_output` to v, then `scale_expert` by 2 gives 2v; the other way round gives v. Of two
  adapters the later is the nearer to the input.
- The target of a substitution is what its parameters make it: whatever else is computed in its
  place is for tokens routed to it. So two experts can stand in for each other. `ablate_neurons` and
  `swap_experts` change parameters, so they count for the target too.
- `swap_blocks` exchanges parameters, so what is done to a position stays there: layers, observers
  and other interventions, entered before or after, act on what runs at their position.

## What is refused

Numbers, widths and top_k that do not exist or fit, before anything runs; masks that leave a router
fewer than top_k (or, with groups, as soon as that shows); swaps of experts or blocks that are not
built alike (shapes, dtype, nonlinearity, settings such as top_k). Of models whose weights are
offloaded or quantised: `swap_experts`, `ablate_neurons` and `swap_blocks(..., experts_only=True)`,
which need the weights of single experts. Offloaded, or on two devices: `swap_blocks`. The others
work there too.

## What works where

"""

COLUMNS = """\
Each was really tried on a tiny random model of every family (`moescope.interventions.support` does
it for yours): not refused, what the model returns changed meanwhile, and it was the same to the
bit afterwards. The last column is the relative change of what the model returns with an adapter
that is the identity.

"""


def interventions_page() -> str:
    """The whole page."""
    logging.set_verbosity_error()
    reasons: dict[str, int] = {}
    counts: Counter[str] = Counter()
    lines = []
    for family in sorted(BUILDERS):
        heads, cells = _row(BUILDERS[family](), reasons, counts)
        if not lines:
            lines += [["family", *heads, "identity"], ["---"] * (len(heads) + 2)]
        lines.append([f"`{family}`", *cells])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    notes = "".join(f"\n{number}. {reason}" for reason, number in reasons.items())
    total = (
        f"{counts.total()} in all: {counts['works']} work, {counts['refused']} are refused"
        f"{' because' if reasons else ''}\n{notes}\n"
    )
    return f"{INTRODUCTION}{COLUMNS}{table}\n{total}"


def _row(
    built: PreTrainedModel, reasons: dict[str, int], counts: Counter[str]
) -> tuple[list[str], list[str]]:
    model = load(built)
    table = interventions.support(model)
    cells = []
    for tried in table.itertuples():
        if tried.left != 0 or (tried.works and not tried.change > 0):
            raise AssertionError(f"{tried.intervention} on {model!r}: {tried}")
        counts["works" if tried.works else "refused"] += 1
        number = reasons.setdefault(tried.reason, len(reasons) + 1) if tried.reason else None
        cells.append("yes" if number is None else f"refused ({number})")
    heads = [f"`{name}`" for name in table.intervention]
    return heads, [*cells, _identity_error(model)]


@torch.no_grad()
def _identity_error(model: MoEModel) -> str:
    """The largest over the experts of a layer."""
    layer, ids = model.layers[0], sample_ids(model)
    ones = torch.ones(layer.hidden_size)
    adapter = Adapter(gain=ones, shift=0 * ones, form="scale")
    before = model.forward(ids, head=True)[0]
    worst = 0.0
    for expert in range(layer.num_experts):
        with interventions.insert_adapter((layer, expert), adapter):
            after = model.forward(ids, head=True)[0]
        worst = max(worst, float((after - before).norm() / before.norm()))
    return "< 1e-6" if worst < 1e-6 else f"{worst:.0e}"
