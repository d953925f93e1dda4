"""One pass over a corpus, every batch through the model as it is and as each setting makes it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from moescope.analyses.topk_options import Setting, restricted_layers, run_of
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
from moescope.interventions.choice import set_top_k
from moescope.models.view import MoEModel
from moescope.progress import track


def sweep(model: MoEModel, corpus: Corpus, settings: Sequence[Setting]) -> dict[Setting, Totals]:
    """Sums of losses per document for each setting, paired with those of the model as it is.

    A batch is read once; of a setting nothing is kept but its sums. Settings that are the same
    change run once.

    Returns:
        Totals of `loss`, in nats, and `difference`, from the model as it is.

    Raises:
        CorpusError: The text cannot be read, or holds nothing to predict.
        ModelError: The model is an encoder-decoder.
    """
    require_decoder_only(model)
    runs = {setting: run_of(model, setting) for setting in settings}
    totals = {run: Totals(corpus.domains) for run in (None, *runs.values())}
    with evaluating(model):
        for batch in track(corpus.batches(model.tokenizer), "topk: batches"):
            _run_batch(model, batch, totals)
    return {setting: totals[run] for setting, run in runs.items()}


def _run_batch(model: MoEModel, batch: Batch, totals: Mapping[Setting | None, Totals]) -> None:
    """The model as it is comes first in `totals`."""
    baseline: Tensor | None = None
    for run, total in totals.items():
        with _restricted(model, run):
            logits = forward(model, batch)
        targets = Targets.of(batch, logits.device)
        found = losses(logits, targets)
        baseline = found if baseline is None else baseline
        total.add(targets, {"loss": found, "difference": found - baseline})


@contextmanager
def _restricted(model: MoEModel, setting: Setting | None) -> Iterator[None]:
    with ExitStack() as stack:
        if setting is not None:
            for layer in restricted_layers(model, setting):
                k = min(setting.k, layer.top_k)
                stack.enter_context(set_top_k(layer, k, setting.weights))
        yield
