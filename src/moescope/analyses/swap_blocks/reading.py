"""What swaps are measured on: the captured text, or questions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Int64
from torch import Tensor

from moescope.analyses.material import Material
from moescope.analyses.registry import of_capture
from moescope.analyses.swap_blocks.kept import Kept
from moescope.analyses.swap_blocks.options import SwapOptions
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Batch
from moescope.corpora.questions import NO_TARGET, QuestionBatch, Questions
from moescope.errors import ModelError
from moescope.evaluate.answers import answer_batches, answered
from moescope.evaluate.predictions import Targets, forward, losses
from moescope.models.view import MoEModel, Stack

Unit = Literal["documents", "questions"]


@dataclass(frozen=True, eq=False)
class TextPassage:
    """Rows of a corpus, to be read again and again."""

    batch: Batch
    """The rows."""

    def read(self, model: MoEModel) -> tuple[Targets, dict[str, Tensor]]:
        """The loss of every next token."""
        logits = forward(model, self.batch)
        targets = Targets.of(self.batch, logits.device)
        return targets, {"loss": losses(logits, targets)}

    def units(self, stack: Stack) -> Int64[Tensor, " tokens"]:
        """Document of each token; -1 where it does not count."""
        return self.batch.documents.where(self.batch.kept, -1).flatten()


@dataclass(frozen=True, eq=False)
class QuestionPassage:
    """Questions, to be answered again and again."""

    batch: QuestionBatch
    """The questions with their answers."""

    def read(self, model: MoEModel) -> tuple[Targets, dict[str, Tensor]]:
        """Loss and mistakes at the tokens of the answers."""
        return answered(model, self.batch)

    def units(self, stack: Stack) -> Int64[Tensor, " tokens"]:
        """Question of each token that a stack reads; -1 at padding.

        The decoder of an encoder-decoder reads the answers.
        """
        batch = self.batch
        if batch.decoder_input_ids is not None and stack == "decoder":
            counted = batch.targets != NO_TARGET
        else:
            counted = batch.attention_mask.bool()
        numbers = batch.first + counted.new_ones(len(counted)).long().cumsum(0) - 1
        return numbers[:, None].where(counted, -1).flatten()


@dataclass(frozen=True, eq=False)
class Reading:
    """Everything that is read once for each swap."""

    passages: Sequence[TextPassage | QuestionPassage]
    """In their order."""
    unit: Unit
    """What intervals are over."""


def reading_of(material: Material, options: SwapOptions) -> Reading:
    """The questions that are named, else the captured text.

    Raises:
        ModelError: There are no questions, and the model is an encoder-decoder.
        CorpusError: The questions cannot be read.
    """
    if not options.questions:
        require_text(material.model)
        return of_text(material.model, material.text(options.tokens))
    return of_questions(material.model, questions_of(options))


def of_text(model: MoEModel, corpus: Corpus) -> Reading:
    """A corpus."""
    require_text(model)
    batches = corpus.batches(model.tokenizer)
    return Reading([TextPassage(batch) for batch in batches], "documents")


def of_questions(model: MoEModel, questions: Questions) -> Reading:
    """Questions.

    Raises:
        CorpusError: One of them is longer than the model can read.
    """
    return Reading([QuestionPassage(b) for b in answer_batches(model, questions)], "questions")


def questions_of(options: SwapOptions) -> Questions:
    """The questions that are named."""
    return Questions.from_source(options.questions, most=options.most_questions, seed=options.seed)


def basis(material: Material, options: SwapOptions) -> dict[str, Any]:
    """What a result rests on: the capture, and the questions if there are any."""
    found = of_capture(material, options)
    return found | {"questions": questions_of(options).identity} if options.questions else found


def kept_of(material: Material, options: SwapOptions) -> Kept:
    """Where measurements of the same model on the same text or questions are kept."""
    return Kept.of(material.run, basis(material, options) | {"most_tokens": options.tokens})


def require_text(model: MoEModel) -> None:
    """Refuse an encoder-decoder, which does not go on with a text.

    Raises:
        ModelError: It is one.
    """
    if model.model.config.is_encoder_decoder:
        raise ModelError(
            f"the model {model.name!r} is an encoder-decoder: it answers, and does not go on with "
            "a plain text",
            remedy="Name questions: `--questions banking77`, or `--questions FILE:QUESTION:ANSWER`",
        )
