"""The held-out tokens of one source expert, and what predictions of its outputs miss there."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from moescope.alignment.samples import Samples
from moescope.alignment.solver import Fit
from moescope.experts.weights import ExpertWeights


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
