"""What can be set about `swap-blocks`, and what of it `swap-experts` has too."""

from dataclasses import dataclass

from moescope.errors import ModelError, require_least
from moescope.models.view import MoELayer, MoEModel, Stack


@dataclass(frozen=True, kw_only=True)
class SwapOptions:
    """What every swap is measured on, and how."""

    questions: str = ""
    """Questions to be answered, instead of going on with the captured text: `banking77`, or a file
    with two columns such as `a.csv:question:answer` (docs/swaps.md)."""
    most_questions: int = 5_000
    """Most questions, drawn at random."""
    tokens: int = 50_000
    """Most tokens of text where there are no questions, from the beginning of the corpus, which is
    balanced by domain."""
    stack: Stack | None = None
    """Layers of which stack; of an encoder-decoder the encoder if it has two sparse layers."""
    margin_accuracy: float = 0.02
    """A swap is harmless if the change of accuracy is surely less than this, either way: one-sided
    p < 0.025, corrected for the number of swaps."""
    margin_loss: float = 0.02
    """The same for the loss, in nats per token or, with questions, per answer."""
    bootstrap: int = 1_000
    """Resamples of documents or questions behind each 95% interval of a loss."""
    seed: int = 0
    """Seed of the draw of questions, of resamples and of permutations."""

    def __post_init__(self) -> None:
        lowest = {"most_questions": 1, "tokens": 1, "bootstrap": 1}
        lowest |= {"margin_accuracy": 0, "margin_loss": 0}
        require_least(self, lowest)


@dataclass(frozen=True, kw_only=True)
class SwapBlocksOptions(SwapOptions):
    """Options of `swap-blocks`."""

    experts_only: bool = False
    """Exchange the experts alone: routers and shared experts stay."""
    left_out: bool = False
    """Also read with the routed experts of one layer after the other left out, to hold the swaps
    against: one more reading per layer."""
    shown: tuple[str, ...] = ()
    """Swaps whose routing is drawn, such as `1-3 1-7`; if left out those of the first layer with
    the second, the middle and the last."""


def layers_of(model: MoEModel, stack: Stack | None) -> list[MoELayer]:
    """The sparse layers of a stack.

    Raises:
        ModelError: There are fewer than two.
    """
    chosen, layers = sparse_layers(model, stack)
    if len(layers) < 2:
        raise ModelError(
            f"the {chosen} of the model {model.name!r} has fewer than two sparse layers, so that "
            "there is nothing to swap",
            got=len(layers),
            expected="at least 2",
        )
    return layers


def sparse_layers(model: MoEModel, stack: Stack | None) -> tuple[Stack, list[MoELayer]]:
    """The stack that is meant, and its sparse layers, however few."""
    stacks: dict[Stack, list[MoELayer]] = {"encoder": [], "decoder": []}
    for layer in model.layers:
        stacks[layer.stack].append(layer)
    chosen = stack or ("encoder" if len(stacks["encoder"]) > 1 else "decoder")
    return chosen, stacks[chosen]
