"""One pass over a corpus, every batch through the model as it is and as each setting makes it."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from moescope.analyses.topk.options import Setting, restricted_layers, run_of
from moescope.analyses.topk.slots import Restriction, restricted, restrictions
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Batch
from moescope.evaluate.predictions import (
    Targets,
    evaluating,
    forward,
    losses,
    require_decoder_only,
)
from moescope.evaluate.totals import Totals
from moescope.models.view import MoEModel
from moescope.progress import track


def sweep(model: MoEModel, corpus: Corpus, settings: Sequence[Setting]) -> dict[Setting, Totals]:
    """Sums of losses per document for each setting, paired with those of the model as it is.

    A batch is read once; of a setting nothing is kept but its sums, and experts that it leaves out
    are not computed. Settings that are the same change run once.

    Returns:
        Totals of `loss`, in nats, and `difference`, from the model as it is.

    Raises:
        CorpusError: The text cannot be read, or holds nothing to predict.
        ModelError: The model is an encoder-decoder.
    """
    require_decoder_only(model)
    runs = {setting: run_of(model, setting) for setting in settings}
    changes = {run: _changes(model, run) for run in (None, *runs.values())}
    totals = {run: Totals(corpus.domains) for run in changes}
    with evaluating(model):
        for batch in track(corpus.batches(model.tokenizer), "topk: batches"):
            _run_batch(model, batch, changes, totals)
    return {setting: totals[run] for setting, run in runs.items()}


def _changes(model: MoEModel, run: Setting | None) -> list[Restriction]:
    if run is None:
        return []
    return restrictions(restricted_layers(model, run), run.k, run.weights)


def _run_batch(
    model: MoEModel,
    batch: Batch,
    changes: Mapping[Setting | None, Sequence[Restriction]],
    totals: Mapping[Setting | None, Totals],
) -> None:
    """The model as it is comes first."""
    baseline: Tensor | None = None
    for run, change in changes.items():
        targets, found = _losses(model, batch, change)
        baseline = found if baseline is None else baseline
        totals[run].add(targets, {"loss": found, "difference": found - baseline})


def _losses(
    model: MoEModel, batch: Batch, change: Sequence[Restriction]
) -> tuple[Targets, Float[Tensor, " counted"]]:
    """Logits are gone before the next setting makes its own."""
    with restricted(change):
        logits = forward(model, batch)
    targets = Targets.of(batch, logits.device)
    return targets, losses(logits, targets)
