"""Errors on the held-out tokens, gathered into one result per target."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from moescope.alignment.controls import project_on_outputs
from moescope.alignment.options import RANDOM_SEEDS, WELL_DETERMINED, FitOptions
from moescope.alignment.result import AlignmentResult, Status
from moescope.alignment.samples import Samples
from moescope.alignment.score import Errors, fvu_interval, score_of
from moescope.alignment.solver import Fit
from moescope.experts.weights import ExpertWeights
from moescope.measures.bootstrap import FEWEST_UNITS

Label = tuple[str | int, ...]
"""("pair", target), ("same output space", target, j), ("all random", j) or ("self",)."""


class HeldOut:
    """The held-out tokens of one source expert, and what a prediction of their outputs misses.

    Args:
        samples: The tokens, in fp32.
        training_mean: Mean output over the training tokens: the mean predictor.
    """

    def __init__(self, samples: Samples, training_mean: Float[Tensor, " hidden"]) -> None:
        self.samples = samples
        if samples.documents is None:
            self.documents, self.of = 1, torch.zeros(len(samples), dtype=torch.int64)
        else:
            ids, of = torch.unique(samples.documents.cpu(), return_inverse=True)
            self.documents, self.of = len(ids), of
        self.total = self.errors(training_mean.expand_as(samples.outputs))

    def errors(self, predicted: Float[Tensor, "tokens hidden"]) -> Float[np.ndarray, " documents"]:
        """Squared errors summed over dimensions and over the tokens of each document."""
        error = (predicted.double() - self.samples.outputs.double()).square().sum(1).cpu()
        sums = torch.zeros(self.documents, dtype=torch.float64).index_add_(0, self.of, error)
        return np.asarray(sums)

    @torch.no_grad()
    def errors_of(self, fit: Fit, expert: ExpertWeights) -> Float[np.ndarray, " documents"]:
        """The same for an expert behind its adapter."""
        return self.errors(expert(fit.adapter(self.samples.inputs)))

    def fvu(self, predicted: Float[Tensor, "tokens hidden"]) -> float:
        """Fraction of variance unexplained."""
        return self.share(self.errors(predicted))

    def share(self, errors: Float[np.ndarray, " documents"]) -> float:
        """Summed errors as a fraction of the variance."""
        return float(errors.sum() / self.total.sum())

    def describe(self, predicted: Float[Tensor, "tokens hidden"]) -> dict[str, Any]:
        """Mean-squared errors, cosine and median relative error per token, by column name."""
        wanted = self.samples.outputs
        error = (predicted - wanted).norm(dim=1)
        size = wanted.norm(dim=1)
        relative = (error / size)[size > 0]
        mse_sum = float(self.errors(predicted).sum() / len(wanted))
        return {
            "mse_sum": mse_sum,
            "mse_mean": mse_sum / wanted.shape[1],
            "cosine": float(cosine_similarity(predicted, wanted, dim=1).mean()),
            "token_error": float(relative.median()) if len(relative) else math.nan,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What was fitted for one source expert, and its errors per held-out document."""

    fits: Mapping[Label, Fit]
    """The adapters."""
    errors: Mapping[Label, Float[np.ndarray, " documents"]]
    """Squared errors of each."""
    linear: Float[np.ndarray, " documents"]
    """Squared errors of the linear map."""
    published_mse: Mapping[str, float]
    """What the published loop prints, by target."""


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
    train: Samples,
    held: HeldOut,
    found: Found,
    options: FitOptions,
    seed: int,
) -> AlignmentResult:
    """Everything about one target; `seed` draws the documents of the intervals."""
    fit, ceiling = found.fits["pair", name], found.fits.get(("self",))
    x, y = held.samples.inputs, held.samples.outputs
    error = found.errors["pair", name]
    low, high = fvu_interval(error, held.total, seed)
    columns = {
        **_facts(target, train, held.samples, options),
        **held.describe(target(fit.adapter(x))),
        **_fitted_controls(name, held, found, seed),
    }
    columns["status"] = _status(train, held, columns)
    return AlignmentResult(
        adapter=fit.adapter,
        curve=fit.curve,
        self_curve=() if ceiling is None else ceiling.curve,
        n_documents=held.samples.num_documents,
        published_mse=found.published_mse[name],
        fvu=held.share(error),
        fvu_low=low,
        fvu_high=high,
        fvu_constant=held.fvu(target(fit.constant.expand_as(x))),
        fvu_identity=held.fvu(target(x)),
        fvu_linear=held.share(found.linear),
        fvu_floor=held.fvu(project_on_outputs(y, target)),
        steps=fit.steps,
        converged=fit.converged,
        constant_kept=fit.constant_kept,
        self_converged=ceiling is not None and ceiling.converged,
        **columns,
    )


def _fitted_controls(name: str, held: HeldOut, found: Found, seed: int) -> dict[str, Any]:
    """Columns of the random targets, of the hidden-rotation self, and the score."""
    if ("all random", 0) not in found.errors:
        return {}
    seeds = range(RANDOM_SEEDS)
    labels: list[list[Label]] = [
        [("same output space", name, j) for j in seeds],
        [("all random", j) for j in seeds],
    ]
    random = np.array([[found.errors[label] for label in kind] for kind in labels])
    shares = random.sum(-1) / held.total.sum()  # [kinds, seeds]
    columns = {
        "fvu_random": float(shares.mean()),
        "fvu_random_sd": float(shares.std(ddof=1)),
        "fvu_random_down": float(shares[0].mean()),
        "fvu_random_all": float(shares[1].mean()),
    }
    if ("self",) not in found.errors:
        return columns
    errors = Errors(
        total=held.total,
        pair=found.errors["pair", name],
        linear=found.linear,
        ceiling=found.errors["self",],
        random=random,
    )
    score = score_of(errors, seed)
    return columns | {
        "fvu_self": held.share(errors.ceiling),
        "score": score.value,
        "score_low": score.low,
        "score_high": score.high,
    }


def _facts(
    target: ExpertWeights, train: Samples, held_out: Samples, options: FitOptions
) -> dict[str, Any]:
    """The columns known before any fit."""
    hidden = train.hidden_size
    return {
        "protocol": options.protocol,
        "n_train": len(train),
        "n_val": len(held_out),
        "adapter_parameters": hidden * hidden + 3 * hidden,
        "expert_parameters": target.num_parameters,
        "seed": options.seed,
    }


def _status(train: Samples, held: HeldOut, columns: Mapping[str, Any]) -> Status:
    if "fvu_random" not in columns:
        return "no_controls"
    if "fvu_self" not in columns:
        return "no_ceiling"
    if math.isnan(columns["score"]):
        return "undefined"
    if held.samples.num_documents < FEWEST_UNITS:
        return "few_documents"
    if len(train) < WELL_DETERMINED * train.hidden_size:
        return "underdetermined"
    return "ok"
