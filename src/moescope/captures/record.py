"""Records what a model does with a text: one forward pass, written to a run folder."""

import os
from collections.abc import Iterator, Sequence

import torch

from moescope.captures.compact import write_samples
from moescope.captures.options import CaptureOptions
from moescope.captures.partial import (
    MANIFEST,
    Partial,
    discard_partial,
    read_manifest,
    require_same,
)
from moescope.captures.plan import Plan
from moescope.captures.read import Capture
from moescope.captures.recorder import Recorder, chained_sha256
from moescope.captures.shards import SCHEMA
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Batch
from moescope.errors import CaptureError
from moescope.models.observe import observe
from moescope.models.view import MoEModel
from moescope.progress import track
from moescope.runs import Run, library_versions

_DEFAULT = CaptureOptions()


def capture(
    model: MoEModel,
    corpus: Corpus,
    out: str | os.PathLike[str],
    *,
    record: Sequence[str] = _DEFAULT.record,
    tokens: int = _DEFAULT.tokens,
    tokens_per_expert: int = _DEFAULT.tokens_per_expert,
    layers: Sequence[int] | None = _DEFAULT.layers,
    dtype: str | torch.dtype | None = _DEFAULT.dtype,
    seed: int = _DEFAULT.seed,
    shard_tokens: int = _DEFAULT.shard_tokens,
) -> Capture:
    """Run the corpus through the model once and record what its MoE layers do.

    `CaptureOptions` describes the options. Only positions that the corpus keeps enter. Interrupted
    in any way and called again, it goes on after the last complete group of shards and ends with
    the same bytes; called again after the end, it opens what is there, having read local files of
    the corpus only to see that they are the same.

    Args:
        model: The model; it is put into evaluation mode meanwhile.
        corpus: The text, read with the model's own tokenizer.
        out: The run folder; `out/capture` is written.
        record: Names of tensors, see `moescope.captures.registry`.
        tokens: Size of the sample of whole rows, in tokens.
        tokens_per_expert: Size of each expert's uniform sample of its tokens, in tokens.
        layers: The model's own layer numbers, in every stack that has them.
        dtype: Type of the wide tensors.
        seed: Seed of the sample.
        shard_tokens: Tokens per group of shards.

    Raises:
        CaptureError: The folder holds another capture, or one that was altered; a tensor cannot
            be recorded; the corpus changed since an interruption.
        CorpusError: The text cannot be read.
        OptionError: A layer or an option does not exist.
        MoEScopeError: The disk is full.
    """
    options = CaptureOptions(
        record=tuple(record),
        tokens=tokens,
        tokens_per_expert=tokens_per_expert,
        layers=None if layers is None else tuple(layers),
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        seed=seed,
        shard_tokens=shard_tokens,
    )
    plan = Plan.make(model, corpus, options)
    folder, identity = Run(out).capture_folder, plan.identity()
    if (folder / MANIFEST).exists():
        require_same(folder, read_manifest(folder), identity)
        discard_partial(folder)
        return Capture(out)
    partial = Partial.open(folder, identity | {"libraries": library_versions()})
    recorder = Recorder(plan, partial)
    _forward_all(plan, partial, recorder)
    _finish(plan, partial, recorder)
    return Capture(out)


def _forward_all(plan: Plan, partial: Partial, recorder: Recorder) -> None:
    """Run every batch that is not in a complete group yet."""
    residual = any(tensor.needs == "residual" for tensor in plan.wide)
    batches = plan.corpus.batches(plan.model.tokenizer)
    with (
        torch.inference_mode(),
        plan.model.evaluating(),
        observe(plan.layers, recorder.observe, residual=residual),
    ):
        for batch in track(_remaining(batches, partial), "capture: batches"):
            _require_vocabulary(batch, plan)
            recorder.begin(batch)
            _forward(plan, batch, recorder)
            recorder.end()
            if recorder.full:
                recorder.flush()
    recorder.flush()


def _forward(plan: Plan, batch: Batch, recorder: Recorder) -> None:
    """One forward pass, with the language-model head only if something needs its logits."""
    input_ids, attention_mask = batch.input_ids, batch.attention_mask
    output = plan.model.forward(input_ids, attention_mask, head=bool(plan.per_token))
    for tensor in plan.per_token:
        on = output.logits.device
        values = tensor.compute(output.logits, input_ids.to(on), attention_mask.to(on))
        recorder.per_token(tensor.name, values)


def _remaining(batches: Iterator[Batch], partial: Partial) -> Iterator[Batch]:
    """Leave out the rows that are done, making sure that they are what they were."""
    done, digest = partial.last.rows, ""
    for batch in batches:
        if batch.first_row >= done:
            _require_unchanged(digest, partial, done)
            yield batch
            done = 0
        elif batch.first_row < done:
            digest = chained_sha256(digest, batch)
    _require_unchanged(digest, partial, done)


def _require_unchanged(digest: str, partial: Partial, done: int) -> None:
    if done and digest != partial.last.data_sha256:
        raise CaptureError(
            f"the corpus changed since the capture in {partial.folder} was interrupted",
            got=f"other tokens in its first {done} rows",
            remedy=f"Restore the text, or delete {partial.folder} to capture again",
        )


def _require_vocabulary(batch: Batch, plan: Plan) -> None:
    size = len(plan.model.model.get_input_embeddings().weight)  # type: ignore[arg-type]
    highest = int(batch.input_ids.max())
    if highest >= size:
        raise CaptureError(
            f"the corpus holds a token that {plan.model.name} does not know",
            got=highest,
            expected=f"0 to {size - 1}",
            remedy="Use the tokenizer the model was trained with",
        )


def _finish(plan: Plan, partial: Partial, recorder: Recorder) -> None:
    """Write the sample and the manifest."""
    state = partial.last
    if not state.tokens:
        raise CaptureError(
            "the corpus has no position to record: all are padding or first in their row"
        )
    written = write_samples(plan, partial, recorder.reservoirs) if plan.wide else ()
    samples = list(track(written, "capture: sample shards"))
    identity, description = dict(partial.identity), plan.description(state.unused_slots)
    partial.finish(
        identity
        | description
        | {
            "schema": SCHEMA,
            "model": identity["model"] | description["model"],
            "num_rows": state.rows,
            "num_tokens": state.tokens,
            "num_documents": state.documents,
            "num_whole_row_tokens": state.whole_tokens,
            "data_sha256": state.data_sha256,
            "shards": [*partial.shards, *samples],
        }
    )
