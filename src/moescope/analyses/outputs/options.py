"""What can be set about `outputs`, and what it costs."""

from dataclasses import dataclass

from moescope.errors import require_least
from moescope.models.view import MoEModel


@dataclass(frozen=True, kw_only=True)
class OutputsOptions:
    """Options of `outputs`."""

    tokens: int = 16_384
    """Most tokens of whole rows that every expert is given."""
    matched: int = 8
    """Most experts of a layer whose neurons are matched with one another, at random; their time
    grows with the third power of the number of neurons."""
    permutations: int = 9_999
    """Permutations of the experts behind each p-value."""
    bootstrap: int = 1_000
    """Resamples of documents behind each 95% interval."""
    seed: int = 0
    """Seed of resamples, choices and permutations, and of the order of ranks that tie."""

    def __post_init__(self) -> None:
        require_least(self, {"tokens": 1, "matched": 0, "permutations": 1})


def operations(model: MoEModel, options: OutputsOptions) -> float:
    """Floating-point operations: every expert on every token, twice, and products of all pairs."""
    return sum(
        2.0
        * options.tokens
        * layer.num_experts
        * (2 * 3 * layer.intermediate_size + 2 * layer.num_experts)
        * layer.hidden_size
        for layer in model.layers
    )
