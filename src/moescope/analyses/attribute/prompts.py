"""The prompts of `attribute`, as tokens: one text, a file of facts, or places of a text."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moescope.analyses.attribute.options import AttributeOptions
from moescope.analyses.material import Material
from moescope.analyses.prompts import tokenizer_of
from moescope.corpora.corpus import Corpus
from moescope.corpora.sources import parse
from moescope.corpora.tokens import SpecialTokens
from moescope.errors import CorpusError, OptionError
from moescope.evaluate.predictions import Targets, require_decoder_only
from moescope.models.view import MoEModel

_LEAST_CONTEXT = 8  # tokens of the same document before a place of the text, where it has them


class Prompt(NamedTuple):
    """What the model reads, and what it should go on with."""

    name: str
    """Of the document or row it comes from."""
    ids: list[int]
    """Tokens of the prompt."""
    answer: int | None
    """Token that should come next; None for the one that the model finds most probable."""


def prompts_of(material: Material, options: AttributeOptions) -> list[Prompt]:
    """The prompts that are asked for; without any, places of the captured text.

    Raises:
        OptionError: The model has no tokenizer, or a prompt or an answer has no tokens.
        CorpusError: The file cannot be read, or lacks a field.
        CaptureError: The captured text cannot be read again.
        ModelError: Places of a text are asked for, and the model is an encoder-decoder.
    """
    model = material.model
    if options.prompt is not None:
        return [tokenised(model, "prompt", options.prompt, options.answer or "")]
    if options.facts is not None:
        found = [tokenised(model, *fact) for fact in _facts(options.facts)]
    else:
        found = places_of(material, options.prompts, options)
    if not found:
        raise CorpusError(f"{options.facts or 'the captured text'} holds no prompts")
    return found


def tokenised(model: MoEModel, name: str, prompt: str, answer: str) -> Prompt:
    """A prompt as the model reads it, and the first token of its answer.

    A space comes between the two where a letter (of a script that has capitals) or digit would
    meet another. They are tokenised together: the answer begins where the tokens are no longer
    those of the prompt alone. An encoder-decoder
    reads the prompt in its encoder, and the answer begins what it decodes.

    Raises:
        OptionError: The model has no tokenizer, or there are no tokens in the prompt or the answer.
    """
    tokenizer: Any = tokenizer_of(model)
    if model.model.config.is_encoder_decoder:
        ids = tokenizer(prompt)["input_ids"]
        target = tokenizer(answer, add_special_tokens=False)["input_ids"]
    else:
        apart = " " if _in_word(prompt[-1:]) and _in_word(answer[:1]) else ""
        alone, whole = tokenizer(
            [prompt, prompt + apart + answer if answer else prompt], add_special_tokens=False
        )["input_ids"]
        pairs = enumerate(zip(alone, whole, strict=False))
        common = next((n for n, (a, b) in pairs if a != b), min(len(alone), len(whole)))
        begin = SpecialTokens.of(tokenizer).begin
        ids, target = whole[:common] if begin is None else [begin, *whole[:common]], whole[common:]
    if not ids or (answer and not target):
        raise OptionError(f"{name} has no tokens", got=f"prompt {prompt!r}, answer {answer!r}")
    return Prompt(name, list(ids), target[0] if answer else None)


def _in_word(character: str) -> bool:
    return character.isdigit() or character.islower() or character.isupper()


def _facts(path: str) -> Iterator[tuple[str, str, str]]:
    """Name, prompt and answer of every row of a file."""
    if Path(path).suffix not in (".csv", ".tsv", ".jsonl"):
        raise OptionError(
            "cannot read facts from this",
            got=path,
            expected="a .csv, .tsv or .jsonl file with the fields prompt and answer",
        )
    rows = (parse(f"{path}:{field}").documents() for field in ("prompt", "answer"))
    for prompt, answer in zip(*rows, strict=True):
        if not isinstance(prompt.content, str) or not isinstance(answer.content, str):
            raise CorpusError(f"{path}: {prompt.name} is a conversation", expected="plain text")
        yield prompt.name, prompt.content, answer.content


def places_of(material: Material, count: int, options: AttributeOptions) -> list[Prompt]:
    """Random places of the captured text, one in each of the first documents.

    Only predictions that count (`Targets`), in the first row of a document; the prompt is what
    stands before, at most `context` tokens and of the same document, after the token that a text
    begins with, if the tokenizer has one.

    Raises:
        CaptureError: The captured text cannot be read again.
        ModelError: The model is an encoder-decoder.
    """
    require_decoder_only(material.model)
    text = material.text(material.capture.num_tokens)
    return list(islice(_places(text, material.model, options), count))


def _places(corpus: Corpus, model: MoEModel, options: AttributeOptions) -> Iterator[Prompt]:
    generator = np.random.default_rng(options.seed)
    beginning = SpecialTokens.of(model.tokenizer).begin
    names: dict[int, str] = {}
    done = set[int]()
    for batch in corpus.batches(model.tokenizer):
        names |= batch.document_names
        targets = Targets.of(batch, batch.input_ids.device)
        positions, owners = targets.positions.numpy(), targets.documents.numpy()
        ids, documents = batch.input_ids.flatten().numpy(), batch.documents.flatten().numpy()
        for document in sorted(set(owners.tolist()) - done):
            mine = positions[owners == document]
            row = mine[0] // batch.input_ids.shape[1]
            mine = mine[mine // batch.input_ids.shape[1] == row]
            first = row * batch.input_ids.shape[1]
            start = first + int((documents[first : mine[0] + 1] == document).argmax())
            late = mine[mine - start + 1 >= _LEAST_CONTEXT]
            place = int(generator.choice(late if len(late) else mine[-1:]))
            begin = max(start, place + 1 - options.context)
            done.add(document)
            before = ids[begin : place + 1].tolist()
            if beginning is not None and before[0] != beginning:
                before = [beginning, *before]
            yield Prompt(names[document], before, int(ids[place + 1]))
