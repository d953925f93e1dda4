"""The model as it is on the text: its losses, and what each domain asks of the experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor

from moescope.analyses.prune_domain.options import Criterion
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.corpora.packing import Batch
from moescope.evaluate.predictions import Targets, evaluating, forward, losses
from moescope.measures.saliency import Saliency, routed_norms
from moescope.models.observe import Observation, observe
from moescope.models.view import MoELayer, MoEModel
from moescope.progress import track

Use = dict[str, dict[MoELayer, Saliency]]
"""By domain, "all" among them, and layer."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Unpruned:
    """One half of the text read by the model as it is."""

    batches: Sequence[Batch]
    """The half."""
    losses: Sequence[Float[Tensor, "_"]]
    """Losses of each batch's targets, in nats."""
    use: Use
    """Over the tokens that enter measures."""


def read(
    model: MoEModel, batches: Sequence[Batch], domains: Sequence[str], criterion: Criterion
) -> Unpruned:
    """One pass over a half of the text.

    Args:
        model: The model.
        batches: The half.
        domains: Names of the domains of the corpus.
        criterion: Norms of outputs are computed only where it asks for them.
    """
    found: list[Tensor] = []
    use: Use = {domain: {} for domain in domains}
    with evaluating(model):
        for batch in track(batches, "prune-domain: unpruned"):

            def count(seen: Observation, batch: Batch = batch) -> None:
                _count(seen, batch, use, criterion)

            with observe(model.layers, count):
                logits = forward(model, batch)
            found.append(losses(logits, Targets.of(batch, logits.device)))
    use[RESERVED_DOMAIN] = {
        layer: reduce(add, (use[domain][layer] for domain in domains)) for layer in model.layers
    }
    return Unpruned(batches=batches, losses=found, use=use)


def both(one: Use, other: Use) -> Use:
    """The use that two parts of the text make of the experts, together."""
    return {
        domain: {layer: seen + other[domain][layer] for layer, seen in layers.items()}
        for domain, layers in one.items()
    }


def _count(seen: Observation, batch: Batch, use: Use, criterion: Criterion) -> None:
    domain_of = torch.where(batch.kept, batch.domains, -1).flatten()
    for number, layers in enumerate(use.values()):
        own = (domain_of == number).to(seen.input.device)
        if own.any():
            found = _saliency(seen, own, criterion)
            before = layers.get(seen.layer)
            layers[seen.layer] = found if before is None else before + found


def _saliency(seen: Observation, own: Tensor, criterion: Criterion) -> Saliency:
    layer, experts, weights = seen.layer, seen.routing.experts[own], seen.routing.weights[own]
    norms = torch.zeros_like(weights)
    if criterion == "reap":
        x = seen.input[own]

        def outputs(expert: int, rows: Tensor) -> Tensor:
            return layer.expert_outputs(rows, [expert])[0]

        if layer.weighs_inputs:
            slots = zip(torch.split(weights, 1, 1), torch.split(experts, 1, 1), strict=True)
            norms = torch.cat([routed_norms(x * w, e, outputs) for w, e in slots], dim=1)
            weights = (weights != 0).to(weights)
        else:
            norms = routed_norms(x, experts, outputs)
    return Saliency.of(experts, weights, norms, layer.num_experts)
