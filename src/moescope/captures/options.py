"""Options of a capture."""

from dataclasses import dataclass

from moescope.errors import OptionError, require_least

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """What to record, and of how many tokens."""

    record: tuple[str, ...] = ("routing", "inputs")
    """Tensors to record: routing, inputs, residual, shared_output, token_loss. Routing is always
    recorded."""
    tokens: int = 16_384
    """Record the wide tensors of whole rows until this many tokens are in."""
    tokens_per_expert: int = 5_000
    """Size of each expert's own sample: of all tokens that the corpus sends to an expert, record
    this many at random, or all if there are fewer."""
    layers: tuple[int, ...] | None = None
    """The model's own numbers of the layers to record, in every stack that has them; None records
    every MoE layer."""
    dtype: str | None = None
    """Type of the wide tensors: float32, bfloat16 or float16; None keeps the model's own."""
    seed: int = 0
    """Seed of the random choice of tokens."""
    shard_tokens: int = 32_768
    """Tokens per group of shards, fewer if they take more than 128 MiB. An interruption loses at
    most one group."""

    def __post_init__(self) -> None:
        lowest = {"tokens": 0, "tokens_per_expert": 0, "seed": 0, "shard_tokens": 1}
        require_least(self, lowest)
        if self.dtype not in (None, *DTYPES):
            raise OptionError(
                "unknown dtype for wide tensors", got=self.dtype, expected=", ".join(DTYPES)
            )
