"""One source expert against many targets: what can be shared is computed once."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from moescope.alignment.controls import (
    all_random,
    hidden_rotation,
    linear_control,
    rotation_for,
    same_output_space,
)
from moescope.alignment.evaluation import Found, HeldOut, Label, refused, result_of
from moescope.alignment.options import MINIMUM_HELD_OUT, MINIMUM_TRAIN, FitOptions
from moescope.alignment.randomness import generator, seed_of
from moescope.alignment.result import AlignmentResult, Status
from moescope.alignment.samples import Samples, require_finite
from moescope.alignment.solver import Fit
from moescope.alignment.starts import Domain
from moescope.alignment.trainer import (
    Candidate,
    Progress,
    train_converged,
    train_published,
    training_task,
)
from moescope.errors import AlignmentError
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
) -> dict[str, AlignmentResult]:
    """How well each target imitates the source behind a trained change of input.

    All fits of the call run as one batch. Shared by all targets: the whitening, the linear map, the
    hidden-rotation self, and the random targets with three random matrices, whose norms are drawn
    from all targets of the call. The random targets with the true down projection are each
    target's own. The linear map is fitted on all training tokens, inner ones included; the fits
    use the inner ones only to stop and to choose.

    Random choices depend on seed, names and purpose alone, never on how the fits are batched. But
    the norms of the all-random targets, and where their inputs lie, come from all targets of the
    call: `fvu_random_all`, and with it the score, changes with the company of a target.

    Args:
        train: Tokens to learn from; an inner part of them decides when to stop.
        held_out: Tokens for the reported errors; used once.
        targets: Experts by name, of the same hidden size.
        source: The expert that made the outputs; without it there is no ceiling and no score.
        source_name: Keys the random choices of this source.
        target_inputs: Inputs [tokens, hidden] of each target in its own layer, where known; they
            give the fit its start. Under 64 tokens they are not used: the start would be dead.
        options: Protocol, controls, budget, seed, solver.
        progress: Called with the number of fits done and of all fits.

    Raises:
        AlignmentError: Shapes do not fit, or a tensor holds NaN or infinity.
    """
    _check(train, held_out, targets, source, target_inputs or {})
    status = _refusal(train, held_out)
    if status is not None:
        return {n: refused(t, train, held_out, status, options) for n, t in targets.items()}
    train, held_out = train.single(), held_out.single()
    device = train.inputs.device
    targets = {name: t.to(dtype=torch.float32, device=device) for name, t in targets.items()}
    source = None if source is None else source.to(dtype=torch.float32, device=device)
    candidates = _candidates(train, targets, source, source_name, target_inputs or {}, options)
    fits = _train(train, candidates, source_name, options, progress)

    held = HeldOut(held_out, train.outputs.mean(0))
    rest, inner = _split(train, source_name, options)
    found = Found(
        fits=fits,
        errors={label: held.errors_of(fits[label], candidates[label].expert) for label in fits},
        linear=held.errors(linear_control(rest, inner, held_out.inputs)),
        published_mse=_published_mse(train, candidates, fits, options),
    )
    return {
        name: result_of(
            name,
            target,
            train,
            held,
            found,
            options,
            seed_of(options.seed, source_name, name, "bootstrap"),
        )
        for name, target in targets.items()
    }


def _check(
    train: Samples,
    held_out: Samples,
    targets: Mapping[str, ExpertWeights],
    source: ExpertWeights | None,
    target_inputs: Mapping[str, Tensor],
) -> None:
    hidden = train.hidden_size
    experts = {f"target {name}": expert for name, expert in targets.items()}
    if source is not None:
        experts["the source"] = source
    sizes = {"held-out tokens": held_out.hidden_size}
    sizes |= {name: expert.hidden_size for name, expert in experts.items()}
    for name, inputs in target_inputs.items():
        if inputs.ndim != 2 or len(inputs) == 0:
            raise AlignmentError(
                f"inputs of target {name} are no list of tokens",
                got=tuple(inputs.shape),
                expected="[tokens, hidden]",
            )
        sizes[f"inputs of target {name}"] = inputs.shape[1]
        require_finite(f"inputs of target {name}", inputs)
    for name, size in sizes.items():
        if size != hidden:
            raise AlignmentError(
                f"{name}: the hidden size does not fit the training tokens",
                got=size,
                expected=hidden,
            )
    for name, expert in experts.items():
        for part, tensor in expert.tensors().items():
            require_finite(f"{part} of {name}", tensor)


def _refusal(train: Samples, held_out: Samples) -> Status | None:
    """Why there will be no numbers, if so."""
    if len(train) < MINIMUM_TRAIN or len(held_out) < MINIMUM_HELD_OUT:
        return "too_few_tokens"
    for outputs in (train.outputs.double(), held_out.outputs.double()):
        varying = (outputs - outputs.mean(0)).square().sum()
        if varying <= 1e-10 * outputs.square().sum():
            return "constant_outputs"
    return None


def _split(train: Samples, source_name: str, options: FitOptions) -> tuple[Samples, Samples]:
    """Tokens for the weights and inner tokens for choices."""
    return train.split(
        options.solver.inner_share, generator(options.seed, source_name, "inner tokens")
    )


def _published_mse(
    train: Samples,
    candidates: Mapping[Label, Candidate],
    fits: Mapping[Label, Fit],
    options: FitOptions,
) -> dict[str, float]:
    """What the published loop prints for each target, whatever the protocol."""
    pairs = {str(label[1]): label for label in candidates if label[0] == "pair"}
    if options.protocol == "published":
        return {name: fits[label].published_mse for name, label in pairs.items()}
    again = train_published(
        train,
        [candidates[label] for label in pairs.values()],
        options.seed,
        options.solver.chunk_bytes,
    )
    return {name: fit.published_mse for name, fit in zip(pairs, again, strict=True)}


def _candidates(
    train: Samples,
    targets: Mapping[str, ExpertWeights],
    source: ExpertWeights | None,
    source_name: str,
    target_inputs: Mapping[str, Tensor],
    options: FitOptions,
) -> dict[Label, Candidate]:
    """Everything that will be fitted."""
    # Fewer say too little of where a target's inputs lie to start from there.
    target_inputs = {n: x for n, x in target_inputs.items() if len(x) >= MINIMUM_TRAIN}
    seed, shrinkage = options.seed, options.solver.shrinkage
    device = train.inputs.device

    def domain(inputs: Tensor | None, name: str) -> Domain:
        source_of_choice = generator(seed, name, "domain")
        if inputs is None:
            return Domain.unknown(train.inputs, shrinkage, source_of_choice)
        return Domain.of(inputs.to(device).float(), shrinkage, source_of_choice)

    found: dict[Label, Candidate] = {}
    for name, expert in targets.items():
        where = domain(target_inputs.get(name), name)
        found["pair", name] = Candidate(expert=expert, domain=where)
        for j, random in enumerate(same_output_space(expert, seed, name)):
            found["same output space", name, j] = Candidate(expert=random, domain=where)
    known = [target_inputs[name] for name in targets if name in target_inputs]
    where = domain(torch.cat(known) if known else None, "all random")
    for j, random in enumerate(all_random(targets, seed)):
        found["all random", j] = Candidate(expert=random, domain=where)
    if source is not None:
        rotation = rotation_for(train.hidden_size, seed, source_name).to(device)
        expert = hidden_rotation(source, rotation)
        # Told as much about its target's inputs as the pairs are.
        turned = train.inputs @ rotation.T if known else None
        found["self",] = Candidate(expert=expert, domain=domain(turned, source_name))
    if not options.controls:
        return {label: found[label] for label in found if label[0] == "pair"}
    return found


def _train(
    train: Samples,
    candidates: Mapping[Label, Candidate],
    source_name: str,
    options: FitOptions,
    progress: Progress | None,
) -> dict[Label, Fit]:
    everything = list(candidates.values())
    if options.protocol == "published":
        fits = train_published(
            train, everything, options.seed, options.solver.chunk_bytes, progress
        )
        return dict(zip(candidates, fits, strict=True))
    rest, inner = _split(train, source_name, options)
    task = training_task(rest, inner, options.solver, options.seed, source_name)
    fits = train_converged(task, everything, options.budget_seconds, progress)
    return dict(zip(candidates, fits, strict=True))
