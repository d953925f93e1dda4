"""What can be set about `tuned-lens`, and about how much work it is."""

from dataclasses import dataclass

from moescope.analyses.work import parameters_met
from moescope.corpora.packing import Packing
from moescope.decoding.training import TrainingOptions
from moescope.errors import OptionError
from moescope.models.view import MoEModel


@dataclass(frozen=True, kw_only=True)
class TunedLensOptions(TrainingOptions):
    """Options of `tuned-lens`."""

    tokens: int = 200_000
    """Most tokens of text to read, from the beginning of the corpus, which is balanced by domain;
    training, choice and held-out documents together."""
    bootstrap: int = 1_000
    """Resamples of documents behind each 95% interval."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1:
            raise OptionError("tokens is too small", got=self.tokens, expected="at least 1")


def operations(model: MoEModel, options: TunedLensOptions) -> float:
    """Floating-point operations of training and of the comparison, at the usual size of batches."""
    layers = [layer for layer in model.layers if layer.stack == "decoder"]
    unembedding = sum(p.numel() for p in model.model.get_input_embeddings().parameters())
    trained = options.steps * Packing().rows * Packing().length
    return 2.0 * (
        (trained + options.tokens) * parameters_met(model)
        + (2 * trained + options.tokens) * len(layers) * unembedding
    )
