"""Forward passes over prompts of unequal length, and what they give at the last position."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from moescope.analyses.attribute.prompts import Prompt
from moescope.corpora.tokens import SpecialTokens
from moescope.errors import ModelError
from moescope.models.view import MoELayer, MoEModel

_TOKENS_PER_BATCH = 2_048


@dataclass(frozen=True, eq=False, kw_only=True)
class PromptBatch:
    """Prompts of about one length, padded on the right; on the CPU."""

    numbers: Int64[Tensor, " rows"]
    """Which prompts."""
    input_ids: Int64[Tensor, "rows length"]
    """Their tokens."""
    attention_mask: Int64[Tensor, "rows length"]
    """1 at tokens, 0 at padding."""
    start: int | None
    """What an encoder-decoder decodes first, its only position; None for decoders."""

    def run(self, model: MoEModel) -> Float[Tensor, "rows vocabulary"]:
        """Logits at the last position of each prompt.

        Raises:
            ModelError: The model has no language-model head.
        """
        if self.start is None:
            output = model.forward(self.input_ids, self.attention_mask, head=True)
        else:
            output = model.model(
                input_ids=self.input_ids.to(model.device),
                attention_mask=self.attention_mask.to(model.device),
                decoder_input_ids=torch.full((len(self.numbers), 1), self.start).to(model.device),
                use_cache=False,
            )
        if "logits" not in output:
            raise ModelError(
                f"the model {model.name!r} predicts no tokens",
                got=f"a {type(model.model).__name__}",
                expected="a model with a language-model head",
            )
        logits: Tensor = self.last(output.logits)
        return logits

    def last(
        self, states: Shaped[Tensor, "rows positions *width"]
    ) -> Shaped[Tensor, "rows *width"]:
        """Of what the decoder has at its positions, that at the last of each prompt."""
        if self.start is not None:
            return states[:, 0]
        ends = (self.attention_mask.sum(1) - 1).to(states.device)
        return states[torch.arange(len(ends), device=states.device), ends]

    def is_token(self, layer: MoELayer) -> Bool[Tensor, "rows positions"]:
        """Which positions of a layer are no padding."""
        if self.start is not None and layer.stack == "decoder":
            return torch.ones(len(self.numbers), 1, dtype=torch.bool)
        return self.attention_mask.bool()


def batches_of(model: MoEModel, prompts: Sequence[Prompt]) -> list[PromptBatch]:
    """The prompts by length, so that there is little padding."""
    padding = SpecialTokens.of(model.tokenizer).padding
    start = _start(model)
    return [_batch(prompts, numbers, padding, start) for numbers in _by_length(prompts)]


def _by_length(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    batch: list[int] = []
    for number in sorted(range(len(prompts)), key=lambda n: len(prompts[n].ids)):
        if batch and (len(batch) + 1) * len(prompts[number].ids) > _TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(number)
    yield batch


def _batch(
    prompts: Sequence[Prompt], numbers: list[int], padding: int, start: int | None
) -> PromptBatch:
    rows = [torch.tensor(prompts[number].ids) for number in numbers]
    pad = torch.nn.utils.rnn.pad_sequence
    return PromptBatch(
        numbers=torch.tensor(numbers),
        input_ids=pad(rows, batch_first=True, padding_value=padding),
        attention_mask=pad([torch.ones_like(row) for row in rows], batch_first=True),
        start=start,
    )


def _start(model: MoEModel) -> int | None:
    config: Any = model.model.config
    if not config.is_encoder_decoder:
        return None
    start: int | None = config.decoder_start_token_id
    if start is None:
        raise ModelError(
            f"the model {model.name!r} does not say what its decoder begins with",
            expected="decoder_start_token_id in its configuration",
        )
    return start
