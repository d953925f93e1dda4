"""What the loss does without the neurons that are most selective for a domain, and without others.

Every batch goes through the model as it is and then through every changed one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy import ndarray as Array

from moescope.analyses.neurons.options import NeuronsOptions
from moescope.analyses.neurons.selective import CLEAR
from moescope.corpora.corpus import RESERVED_DOMAIN, Corpus
from moescope.evaluate.predictions import Targets, evaluating, forward, losses
from moescope.evaluate.totals import Resampling, Totals, counts, difference_columns
from moescope.interventions.functions import replace_output
from moescope.interventions.tensors import ablate_neurons
from moescope.measures.intervals import Estimate, difference
from moescope.models.view import MoEModel
from moescope.progress import track

Kind = Literal["neuron", "group", "expert"]
Choice = Literal["selective", "random", "matched"]
Place = tuple[int, int]
"""Layer and expert of the decoder."""


class Ablation(NamedTuple):
    """What is taken away."""

    domain: str
    """The domain that it was chosen for."""
    kind: Kind
    """The most selective neuron; the most selective of them; the expert that has most of these."""
    choice: Choice
    """The neurons themselves; as many others of the same experts at random; others of the same
    experts that add as much. Of experts: another of the layer at random; that which gets the
    nearest share of the tokens of the domain."""


Parts = Mapping[Place, Sequence[int] | None]
"""Neurons by expert; None stands for the whole expert."""


def planned(
    candidates: pd.DataFrame,
    norms: Mapping[Place, Float[Array, " neurons"]],
    reach: Mapping[str, Mapping[Place, float]],
    options: NeuronsOptions,
) -> dict[Ablation, Parts]:
    """Every ablation with its controls, for each domain that has clearly selective neurons.

    Args:
        candidates: Selective neurons of all layers of the decoder.
        norms: Mean norm of what each neuron adds, by expert.
        reach: By domain and expert the share of the tokens that are routed there.
        options: Size of the groups, and seed.
    """
    random = np.random.default_rng(options.seed)
    clear = candidates[candidates["p_corrected"] <= CLEAR]
    plan: dict[Ablation, Parts] = {}
    for domain in map(str, clear["domain"].unique()):
        own = clear[clear["domain"] == domain]
        rank = own["difference"] * own["reach"]
        ranked = own.loc[rank.sort_values(ascending=False, kind="stable").index]
        sizes: dict[Kind, int] = {"neuron": 1, "group": options.group}
        for kind, size in sizes.items():
            group = _by_expert(ranked.head(size))
            plan[Ablation(domain, kind, "selective")] = group
            plan[Ablation(domain, kind, "random")] = {
                place: _others(norms[place], chosen, random) for place, chosen in group.items()
            }
            plan[Ablation(domain, kind, "matched")] = {
                place: nearest(norms[place], chosen) for place, chosen in group.items()
            }
        place = max(group, key=lambda place: len(group[place]))
        plan[Ablation(domain, "expert", "selective")] = {place: None}
        for choice, other in _other_experts(reach[domain], place, random).items():
            plan[Ablation(domain, "expert", choice)] = {other: None}
    return plan


def _by_expert(rows: pd.DataFrame) -> dict[Place, list[int]]:
    found: dict[Place, list[int]] = {}
    for layer, expert, neuron in rows[["layer", "expert", "neuron"]].itertuples(index=False):
        found.setdefault((layer, expert), []).append(neuron)
    return found


def _others(
    norms: Float[Array, " neurons"], chosen: Sequence[int], random: np.random.Generator
) -> list[int]:
    rest = np.setdiff1d(np.arange(len(norms)), chosen)
    return [int(neuron) for neuron in random.permutation(rest)[: len(chosen)]]


def nearest(norms: Float[Array, " neurons"], chosen: Sequence[int]) -> list[int]:
    """For each chosen neuron another one whose norm is nearest, none of them twice."""
    rest = np.setdiff1d(np.arange(len(norms)), chosen).tolist()
    found = []
    for neuron in chosen[: len(rest)]:
        found.append(min(rest, key=lambda other: abs(norms[other] - norms[neuron])))
        rest.remove(found[-1])
    return found


def _other_experts(
    reach: Mapping[Place, float], place: Place, random: np.random.Generator
) -> dict[Choice, Place]:
    """Another expert of the layer at random, and that with the nearest share of the tokens."""
    others = [other for other in reach if other[0] == place[0] and other != place]
    if not others:
        return {}
    near = min(others, key=lambda other: abs(reach[other] - reach[place]))
    return {"random": others[random.integers(len(others))], "matched": near}


@contextmanager
def without(model: MoEModel, parts: Parts) -> Iterator[None]:
    """The model without these neurons and experts: what they add counts as zero."""
    with ExitStack() as stack:
        for (index, expert), chosen in parts.items():
            place = model.layer(index), expert
            stack.enter_context(
                replace_output(place, 0.0) if chosen is None else ablate_neurons(place, chosen)
            )
        yield


def sweep(
    model: MoEModel, corpus: Corpus, plan: Mapping[Ablation, Parts]
) -> dict[Ablation, Totals]:
    """Sums of `difference` per document: loss of the changed model above that as it is, nats.

    Raises:
        CorpusError: The text cannot be read, or holds nothing to predict.
        ModelError: The weights are not plain numbers in memory.
    """
    totals = {ablation: Totals(corpus.domains) for ablation in plan}
    with evaluating(model):
        for batch in track(corpus.batches(model.tokenizer), "neurons: ablations"):
            logits = forward(model, batch)
            targets = Targets.of(batch, logits.device)
            before = losses(logits, targets)
            del logits
            for ablation, parts in plan.items():
                with without(model, parts):
                    after = losses(forward(model, batch), targets)
                totals[ablation].add(targets, {"difference": after - before})
    return totals


def ablation_table(
    totals: Mapping[Ablation, Totals],
    plan: Mapping[Ablation, Parts],
    read: Bool[Array, " documents"],
    resampling: Resampling,
) -> pd.DataFrame:
    """One row per ablation and text: the domain it was chosen for, the others, the contrast.

    Of the neurons of a domain, `excess` is the rise above that of a control, on the same tokens;
    it stands in the row of the control.

    Args:
        totals: Sums of all documents.
        plan: What was ablated.
        read: Which documents count: those that nothing was chosen on.
        resampling: Of the intervals.
    """
    documents = {
        ablation: _texts(total, ablation.domain, read) for ablation, total in totals.items()
    }
    rows = []
    for ablation, texts in documents.items():
        selective = documents[ablation._replace(choice="selective")]
        facts = ablation._asdict() | {
            "neurons": sum(len(chosen or ()) for chosen in plan[ablation].values())
        }
        found = {name: difference_columns(t, "difference", resampling) for name, t in texts.items()}
        for name, text in texts.items():
            row = facts | {"text": name} | found[name] | counts(text, resampling)
            if ablation.choice != "selective":
                above = text.assign(excess=selective[name]["difference"] - text["difference"])
                row |= difference_columns(above, "excess", resampling)
            rows.append(row)
        own, others = (
            Estimate(*map(np.asarray, found[name].values())) for name in ("own", "others")
        )
        contrast = map(float, difference(others, own))
        row = facts | {"text": "own - others"}
        row |= dict(zip(found["own"], contrast, strict=True))
        rows.append(row | counts(pd.concat(list(texts.values())), resampling))
    return pd.DataFrame(rows)


def _texts(total: Totals, domain: str, read: Bool[Array, " documents"]) -> dict[str, pd.DataFrame]:
    by_domain = {
        name: frame[read[frame.index.get_level_values(1)]] for name, frame in total.by_domain()
    }
    others = [f for name, f in by_domain.items() if name not in (RESERVED_DOMAIN, domain)]
    return {"own": by_domain[domain], "others": pd.concat(others)}
