"""What can be set about `lens`, and what it takes."""

from dataclasses import dataclass
from pathlib import Path

from moescope.decoding.columns import columns_of
from moescope.errors import OptionError
from moescope.models.view import MoEModel


@dataclass(frozen=True, kw_only=True)
class LensOptions:
    """Options of `lens`."""

    prompt: str | None = None
    """A text to show position by position, beside the numbers over the corpus."""
    tokens: int = 20_000
    """Most tokens of text to read, from the beginning of the corpus, which is balanced by domain;
    0 reads the prompt alone."""
    translators: Path | None = None
    """Folder of translators, such as `tuned-lens` leaves in a run: states of the residual stream
    pass through that of their layer before they are decoded."""
    bootstrap: int = 1_000
    """Resamples of documents behind each 95% interval."""
    seed: int = 0
    """Seed of the resamples."""

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise OptionError("tokens is too small", got=self.tokens, expected="at least 0")
        if not self.tokens and self.prompt is None:
            raise OptionError("there is no text to read", remedy="Give a prompt, or some tokens")


def operations(model: MoEModel, options: LensOptions) -> float:
    """Floating-point operations of the products with the unembedding, which are most of it."""
    vocabulary, width = model.model.get_input_embeddings().get_parameter("weight").shape
    columns = sum(len(columns_of(layer)) for layer in model.layers if layer.stack == "decoder")
    return 2.0 * vocabulary * width * columns * options.tokens
