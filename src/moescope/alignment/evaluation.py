"""Everything about one target, gathered into its result."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moescope.alignment.controls import project_on_outputs
from moescope.alignment.forms import num_parameters, trained_rank
from moescope.alignment.held_out import HeldOut
from moescope.alignment.options import FitOptions
from moescope.alignment.outcomes import ControlLabels, Label, Outcome
from moescope.alignment.regularisers import divergences
from moescope.alignment.result import AlignmentResult, Status
from moescope.alignment.samples import Samples
from moescope.alignment.score import Errors, fvu_interval, score_of
from moescope.experts.weights import ExpertWeights
from moescope.measures.bootstrap import FEWEST_UNITS


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What was fitted for one source expert, and on what."""

    train: Samples
    """Training tokens."""
    held: HeldOut
    """Held-out tokens."""
    options: FitOptions
    """As they were used: form and rank are those of the fits."""
    underdetermined: bool
    """Whether the form asked for has more freedom than the training tokens can settle."""
    outcomes: Mapping[Label, Outcome]
    """Of the pairs and of their controls."""
    controls: Mapping[str, ControlLabels]
    """Which of them each target is compared with; empty where controls were switched off."""
    linear: Float[np.ndarray, " documents"]
    """Squared errors of the linear map."""
    published_mse: Mapping[str, float]
    """What the published loop prints, by target."""

    def ceiling(self, name: str) -> Outcome | None:
        """The hidden-rotation self of a target, where the source is known."""
        return self.outcomes.get(self.controls[name].ceiling) if name in self.controls else None


def refused(
    target: ExpertWeights, train: Samples, held_out: Samples, status: Status, options: FitOptions
) -> AlignmentResult:
    """A result without numbers."""
    return AlignmentResult(
        adapter=None,
        n_documents=held_out.num_documents,
        status=status,
        **_facts(target, train, held_out, options),
    )


@torch.no_grad()
def result_of(
    name: str,
    target: ExpertWeights,
    inputs: Float[Tensor, "tokens hidden"] | None,
    found: Found,
    seed: int,
) -> AlignmentResult:
    """Everything about one target.

    Args:
        name: The target.
        target: Its weights, in fp32 on the device of the tokens.
        inputs: Its inputs in its own layer, where known.
        found: The fits.
        seed: Draws the documents of the intervals.
    """
    held, pair = found.held, found.outcomes["pair", name]
    fit, ceiling = pair.fit, found.ceiling(name)
    assert fit is not None
    own = ceiling.fit if ceiling else None
    x, y = held.samples.inputs, held.samples.outputs
    low, high = fvu_interval(pair.errors, held.total, seed)
    adapted = fit.adapter(x)
    columns = {
        **_facts(target, found.train, held.samples, found.options),
        **held.describe(target(adapted)),
        **_fitted_controls(name, found, seed),
        **_distances(x, adapted, inputs),
    }
    hurried = any(f.cut_short and not f.converged for f in (fit, own) if f is not None)
    columns["status"] = _status(found, columns, hurried=hurried)
    return AlignmentResult(
        adapter=fit.adapter,
        curve=fit.curve,
        self_curve=own.curve if own else (),
        n_documents=held.samples.num_documents,
        published_mse=found.published_mse[name],
        fvu=held.share(pair.errors),
        fvu_low=low,
        fvu_high=high,
        fvu_constant=held.fvu(target(fit.constant.expand_as(x))),
        fvu_identity=held.fvu(target(x)),
        fvu_linear=held.share(found.linear),
        fvu_floor=held.fvu(project_on_outputs(y, target)),
        steps=fit.steps,
        converged=fit.converged,
        constant_kept=fit.constant_kept,
        underdetermined=found.underdetermined,
        self_converged=bool(own and own.converged),
        **columns,
    )


def _fitted_controls(name: str, found: Found, seed: int) -> dict[str, Any]:
    """Columns of the random targets, of the hidden-rotation self, and the score."""
    outcomes, held = found.outcomes, found.held
    if name not in found.controls:
        return {}
    labels = found.controls[name]
    kinds = (labels.same_output_space, labels.all_random)
    random = np.array([[outcomes[label].errors for label in kind] for kind in kinds])
    shares = random.sum(-1) / held.total.sum()  # [kinds, seeds]
    columns = {
        "fvu_random": float(shares.mean()),
        "fvu_random_sd": float(shares.std(ddof=1)),
        "fvu_random_down": float(shares[0].mean()),
        "fvu_random_all": float(shares[1].mean()),
    }
    ceiling = found.ceiling(name)
    if ceiling is None:
        return columns
    errors = Errors(
        total=held.total,
        pair=outcomes["pair", name].errors,
        linear=found.linear,
        ceiling=ceiling.errors,
        random=random,
    )
    score = score_of(errors, seed)
    return columns | {
        "fvu_self": held.share(ceiling.errors),
        "score": score.value,
        "score_low": score.low,
        "score_high": score.high,
    }


def _distances(
    x: Float[Tensor, "tokens hidden"],
    adapted: Float[Tensor, "tokens hidden"],
    inputs: Float[Tensor, "others hidden"] | None,
) -> dict[str, float]:
    """How far the target's inputs lie from its own, without and with the adapter."""
    if inputs is None:
        return {}
    kl, mmd = divergences(torch.stack([x, adapted]), inputs)
    return {
        "kl_before": float(kl[0]),
        "kl_after": float(kl[1]),
        "mmd_before": float(mmd[0]),
        "mmd_after": float(mmd[1]),
    }


def _facts(
    target: ExpertWeights, train: Samples, held_out: Samples, options: FitOptions
) -> dict[str, Any]:
    """The columns known before any fit."""
    hidden = train.hidden_size
    parameters = num_parameters(options.form, hidden, options.rank)
    return {
        "protocol": options.protocol,
        "form": options.form,
        "rank": trained_rank(options.form, hidden, options.rank),
        "n_train": len(train),
        "n_val": len(held_out),
        "adapter_parameters": parameters,
        "expert_parameters": target.num_parameters,
        "parameters_share": parameters / target.num_parameters,
        "seed": options.seed,
    }


def _status(found: Found, columns: Mapping[str, Any], *, hurried: bool) -> Status:
    if "fvu_random" not in columns:
        return "no_controls"
    if "fvu_self" not in columns:
        return "no_ceiling"
    if math.isnan(columns["score"]):
        return "undefined"
    if found.held.samples.num_documents < FEWEST_UNITS:
        return "few_documents"
    if hurried:
        return "not_settled"
    if found.underdetermined:
        return "underdetermined"
    return "ok"
