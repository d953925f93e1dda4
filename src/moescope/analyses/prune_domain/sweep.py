"""The model as it is and every pruned one on the same text."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from moescope.analyses.prune_domain.choice import Kept, chosen, pruned, random_choice
from moescope.analyses.prune_domain.options import PruneDomainOptions, Setting
from moescope.analyses.prune_domain.use import Unpruned
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.corpora.packing import Batch
from moescope.evaluate.predictions import Targets, evaluating, forward, losses
from moescope.evaluate.totals import Totals
from moescope.models.view import MoEModel
from moescope.progress import track

Plan = Mapping[Setting, Sequence[Kept]]
"""For each setting the experts that stay while the first half is read, and the second."""


def plan(
    model: MoEModel,
    halves: Sequence[Unpruned],
    sizes: Sequence[int],
    domains: Sequence[str],
    options: PruneDomainOptions,
) -> Plan:
    """What is to be tried: each half is read with experts that were chosen on the other.

    Args:
        model: The model.
        halves: The text.
        sizes: Numbers of experts that every layer keeps.
        domains: Those to choose for; "all" stands for all the text.
        options: Criterion, random choices and their seed.
    """
    found: dict[Setting, Sequence[Kept]] = {}
    for count in sizes:
        for domain in domains:
            choice = Setting("pooled" if domain == RESERVED_DOMAIN else "domain", domain, count)
            found[choice] = [
                chosen(other.use[domain], count, options.criterion) for other in reversed(halves)
            ]
        for draw in range(options.random):
            kept = random_choice(model.layers, count, [options.seed, count, draw])
            found[Setting("random", "", count, draw)] = [kept] * len(halves)
    return found


def sweep(
    model: MoEModel, halves: Sequence[Unpruned], planned: Plan, domains: Sequence[str]
) -> dict[Setting, Totals]:
    """Sums of losses per document: of the model as it is, and of each pruned one, paired with it.

    Batches are read again and again, and of a pruned model nothing is kept but its sums.

    Returns:
        Totals of `loss`, in nats, and `difference`, from the model as it is.
    """
    most = max(layer.num_experts for layer in model.layers)
    unpruned = Totals(domains)
    for half in halves:
        for batch, before in zip(half.batches, half.losses, strict=True):
            _add(unpruned, batch, before, before)
    totals = {Setting("unpruned", "", most): unpruned}
    with evaluating(model):
        for setting, kept in track(planned.items(), "prune-domain: pruned"):
            totals[setting] = Totals(domains)
            for half, experts in zip(halves, kept, strict=True):
                with pruned(experts):
                    _read(model, half, totals[setting])
    return totals


def _read(model: MoEModel, half: Unpruned, total: Totals) -> None:
    for batch, before in zip(half.batches, half.losses, strict=True):
        logits = forward(model, batch)
        _add(total, batch, before, losses(logits, Targets.of(batch, logits.device)))


def _add(
    total: Totals,
    batch: Batch,
    before: Float[Tensor, " counted"],
    after: Float[Tensor, " counted"],
) -> None:
    targets = Targets.of(batch, after.device)
    total.add(targets, {"loss": after, "difference": after - before})
