"""Prompts: what it takes to read them, and how their tokens are shown."""

from transformers import PreTrainedTokenizerBase

from moescope.errors import OptionError
from moescope.models.view import MoEModel


def tokenizer_of(model: MoEModel) -> PreTrainedTokenizerBase:
    """What a prompt is read with.

    Raises:
        OptionError: The model has none.
    """
    if model.tokenizer is None:
        raise OptionError(
            f"a prompt is text, and the model {model.name!r} came without a tokenizer",
            remedy="Load it with `tokenizer=...`; or give no prompt, and the captured text is used",
        )
    return model.tokenizer


def visible(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    """A token as it can be seen: a dot for each space, escapes for what cannot be printed."""
    alone, twice = (
        str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        for ids in ([number], [number, number])
    )
    # Some tokenizers drop the space before the first word of a text.
    text = twice.removeprefix(alone)
    seen = (c if c.isprintable() else repr(c)[1:-1] for c in text)
    return "".join(seen).replace(" ", "\u00b7")
