"""Losses of changed models on held-out documents, and their differences, paired by document."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import ndtr, ndtri
from torch import Tensor

from moescope.analyses.fits import Fits
from moescope.corpora.packing import Batch, rows_holding
from moescope.evaluate.predictions import Targets, evaluating, forward, losses
from moescope.evaluate.totals import (
    Resampling,
    Totals,
    counts,
    difference_columns,
    mean_columns,
)
from moescope.measures.multiple_tests import holm
from moescope.models.view import MoEModel
from moescope.progress import track

Setting = TypeVar("Setting", bound=Hashable)
Change = Callable[[], AbstractContextManager[object]]
"""Makes a context manager that changes the model."""
_NORMAL = float(ndtri(0.975))


class HeldOutText:
    """The held-out documents of a capture, read by the model as it is; kept in memory.

    Args:
        fits: Model, text, and which documents are held out.
        tokens: Most tokens of text to read.

    Raises:
        CorpusError: None of the documents lies in that part of the text.
        CaptureError: The text is another one than the captured, or cannot be found again.
    """

    def __init__(self, fits: Fits, tokens: int) -> None:
        self.model = fits.material.model
        corpus = fits.material.text(tokens)
        self.domains = corpus.domains
        batches = corpus.batches(self.model.tokenizer)
        self._batches = list(rows_holding(batches, fits.tokens.held_out, corpus.packing.rows))
        with evaluating(self.model):
            self.unchanged = [_losses(self.model, batch)[1] for batch in self._batches]

    def read(self, changes: Mapping[Setting, Change], description: str) -> dict[Setting, Totals]:
        """Sums per document of `loss`, in nats, and `difference`, from the model as it is."""
        found = dict[Setting, Totals]()
        with evaluating(self.model):
            for setting, change in track(changes.items(), description):
                found[setting] = Totals(self.domains)
                with change():
                    for batch, before in zip(self._batches, self.unchanged, strict=True):
                        targets, after = _losses(self.model, batch)
                        values = {"loss": after, "difference": after - before}
                        found[setting].add(targets, values)
        return found


def _losses(model: MoEModel, batch: Batch) -> tuple[Targets, Float[Tensor, " counted"]]:
    logits = forward(model, batch)
    targets = Targets.of(batch, logits.device)
    return targets, losses(logits, targets)


def loss_columns(documents: pd.DataFrame, resampling: Resampling) -> dict[str, object]:
    """Loss per token and its difference from the model as it is, with intervals and counts."""
    return {
        **mean_columns(documents, ["loss"], resampling),
        **difference_columns(documents, "difference", resampling),
        **counts(documents, resampling),
    }


def all_documents(totals: Totals) -> pd.DataFrame:
    """Sums of each document of every domain."""
    return next(totals.by_domain())[1]


def paired_columns(
    own: pd.DataFrame, others: Sequence[pd.DataFrame], resampling: Resampling
) -> dict[str, object]:
    """By how much the loss lies above the mean of others, with the interval of the difference."""
    mean = sum(other["loss"] for other in others) / len(others)
    frame = own.assign(difference=own["loss"] - mean)
    return difference_columns(frame, "difference", resampling) | counts(frame, resampling)


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """With p-values of no difference, those corrected for the number of rows, and the verdict.

    The p-value is that of a normal distribution with the row's 95% limits. verdict: `lower` or
    `higher` where the corrected one is under 0.05, `open` elsewhere, nothing without limits.
    """
    low, high = table["difference_low"].to_numpy(), table["difference_high"].to_numpy()
    middle, reach = (low + high) / 2, (high - low) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(middle == 0, 0, np.abs(middle) / reach)
    p_value = np.where(np.isnan(middle), np.nan, 2 * ndtr(-_NORMAL * distance))
    corrected = holm(p_value)
    verdict = np.where(corrected < 0.05, np.where(middle < 0, "lower", "higher"), "open")
    verdict[np.isnan(middle)] = ""
    return table.assign(p_value=p_value, p_corrected=corrected, verdict=verdict)


def rise_of(row: pd.Series) -> str:
    """The difference of a row in words, with its interval if it has one."""
    text = nats(row["difference"])
    if pd.notna(row["difference_low"]):
        low, high = nats(row["difference_low"]), nats(row["difference_high"])
        text += f" (95% interval {low} to {high})"
    return text


def nats(value: float) -> str:
    """With its sign, but without one where it rounds to zero."""
    return f"{round(value, 3) + 0.0:+.3f}"
