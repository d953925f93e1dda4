"""One source expert against many targets: what can be shared is computed once."""

from collections.abc import Mapping, MutableMapping

import torch
from jaxtyping import Float
from torch import Tensor

from moescope.alignment.candidates import Candidate, Workshop
from moescope.alignment.checks import refusal, require_fitting
from moescope.alignment.controls import linear_map
from moescope.alignment.evaluation import Found, refused, result_of
from moescope.alignment.forms import fitted_options, underdetermined
from moescope.alignment.held_out import HeldOut
from moescope.alignment.options import FitOptions
from moescope.alignment.outcomes import Label, Outcome
from moescope.alignment.randomness import seed_of
from moescope.alignment.result import AlignmentResult
from moescope.alignment.samples import Samples
from moescope.alignment.solver import Fit
from moescope.alignment.trainer import (
    Progress,
    Reduction,
    Work,
    converged_work,
    published_errors,
    published_work,
    train_groups,
)
from moescope.experts.weights import ExpertWeights


def fit_pairs(
    train: Samples,
    held_out: Samples,
    targets: Mapping[str, ExpertWeights],
    *,
    source: ExpertWeights | None = None,
    source_name: str = "source",
    target_inputs: Mapping[str, Float[Tensor, "..."]] | None = None,
    options: FitOptions = FitOptions(),  # noqa: B008 (frozen)
    progress: Progress | None = None,
    outcomes: MutableMapping[Label, Outcome] | None = None,
) -> dict[str, AlignmentResult]:
    """How well each target imitates the source behind a trained change of input.

    Fits run in chunks that fit in memory: experts of a chunk are built when it begins, its fits are
    reduced to errors per held-out document when it ends. Shared by all targets: the whitening, the
    linear map, and the hidden-rotation self (one that is told of its inputs for the targets whose
    inputs are known, one that is not for the others). The random targets with the true down
    projection are each target's own; those with three random matrices are shared by the targets of
    one shape whose inputs are all known, or all not. The linear map is fitted on all training
    tokens, inner ones included; the fits use the inner ones only to stop and to choose.

    Random choices depend on seed, names and purpose alone, never on the order of the targets or on
    how the fits are batched. A target's numbers do not depend on its company either, but for
    `fvu_random_all` and with it the score: the norms of the all-random targets, and where their
    inputs lie, come from the targets that share them. Their random directions do not.

    With fewer than four training tokens per dimension, form "layer_norm" is fitted as "low_rank",
    controls alike.

    Args:
        train: Tokens to learn from; an inner part of them decides when to stop.
        held_out: Tokens for the reported errors; used once.
        targets: Experts by name, of the same hidden size.
        source: The expert that made the outputs; without it there is no ceiling and no score.
        source_name: Keys the random choices of this source.
        target_inputs: Inputs [tokens, hidden] of each target in its own layer, where known; they
            give the fit its start. Under 64 tokens, or where all are alike, they are not used: the
            start would be dead.
        options: Protocol, form, controls, budget, seed, solver.
        progress: Called with the number of fits done and of all fits.
        outcomes: Gets every finished fit, chunk by chunk. A later call with the same arguments
            fits only what is missing there; `OutcomeFolder` keeps them on disk.

    Raises:
        AlignmentError: Shapes do not fit, or a tensor holds NaN or infinity.
    """
    if not targets:
        return {}
    require_fitting(train, held_out, targets, source, target_inputs or {})
    loose = underdetermined(options, len(train), train.hidden_size)
    options = fitted_options(options, len(train), train.hidden_size)
    status = refusal(train, held_out)
    if status is not None:
        return {n: refused(t, train, held_out, status, options) for n, t in targets.items()}
    train, held_out = train.single(), held_out.single()
    held = HeldOut(held_out, train.outputs.mean(0))
    workshop = Workshop.of(train, targets, target_inputs or {}, source, source_name, options)
    known = workshop.target_inputs
    outcomes = {} if outcomes is None else outcomes
    train_groups(
        workshop.groups(),
        _work(workshop, _reduction(held)),
        outcomes,
        chunk_bytes=options.solver.chunk_bytes,
        budget_seconds=options.budget_seconds,
        progress=progress,
    )
    found = Found(
        train=train,
        held=held,
        options=options,
        underdetermined=loose,
        outcomes=dict(outcomes),
        controls={n: workshop.controls(n) for n in targets} if options.controls else {},
        linear=held.errors(linear_map(workshop.rest, workshop.inner)(held_out.inputs)),
        published_mse=_published_mse(train, targets, outcomes, options),
    )
    results = {}
    for name, target in targets.items():
        here = target.to(dtype=torch.float32, device=train.inputs.device)
        inputs = known[name].to(train.inputs.device).float() if name in known else None
        seed = seed_of(options.seed, source_name, name, "bootstrap")
        results[name] = result_of(name, here, inputs, found, seed)
    return results


def _work(workshop: Workshop, reduce: Reduction) -> Work:
    """How every chunk is fitted."""
    options = workshop.options
    if options.protocol == "published":
        return published_work(workshop.train, options.seed, reduce)
    return converged_work(workshop.task(options), reduce)


def _reduction(held: HeldOut) -> Reduction:
    """Errors of every fit; of pairs and of the ceiling the fit too."""

    def reduce(label: Label, candidate: Candidate, fit: Fit) -> Outcome:
        kept = fit if label[0] in ("pair", "self") else None
        return Outcome(errors=held.errors_of(fit, candidate.expert), fit=kept)

    return reduce


def _published_mse(
    train: Samples,
    targets: Mapping[str, ExpertWeights],
    outcomes: Mapping[Label, Outcome],
    options: FitOptions,
) -> dict[str, float]:
    """What the published loop prints for each target, whatever the protocol."""
    if options.protocol == "published":
        fits = {name: outcomes["pair", name].fit for name in targets}
        return {name: fit.published_mse for name, fit in fits.items() if fit is not None}
    printed = published_errors(
        train, list(targets.values()), options.seed, options.solver.chunk_bytes
    )
    return dict(zip(targets, printed, strict=True))
