"""What a tuned lens has to beat: a shift alone, and a prediction that looks at nothing."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moescope.decoding.lens import chunks, log_probabilities
from moescope.decoding.training_states import StateSource
from moescope.decoding.translators import Translators

_TOKENS = 32_768


@dataclass(frozen=True, eq=False, kw_only=True)
class Controls:
    """From training documents alone."""

    debiased: Translators
    """h becomes h plus the mean of what later layers add to it: no matrix (Belrose et al. 2023,
    section 3)."""
    constant: Float[Tensor, " vocabulary"]
    """Log of the mean of the model's own predictions: of all constant predictions the nearest."""
    tokens: int
    """How many tokens the means are over."""

    @classmethod
    def of(cls, source: StateSource, model_fingerprint: str) -> "Controls":
        """Means over the first 32,768 tokens of the training documents, in one pass."""
        shifts: list[Tensor] = []
        predictions: list[Tensor] = []
        tokens = 0
        with torch.no_grad():
            for states in source.states("training"):
                shifts.append((states.last - states.layers).sum(1).double().cpu())
                for some in chunks(source.readout, len(states.last)):
                    final = log_probabilities(source.readout, states.last[some])
                    predictions.append(final.exp().sum(0).double().cpu())
                tokens += len(states.last)
                if tokens >= _TOKENS:
                    break
        shift = (torch.stack(shifts).sum(0) / tokens).float()
        hidden = shift.shape[1]
        debiased = Translators(
            weights={layer: torch.zeros(hidden, hidden) for layer in source.layers},
            biases=dict(zip(source.layers, shift, strict=True)),
            model_fingerprint=model_fingerprint,
            training={},
        )
        constant = (torch.stack(predictions).sum(0) / tokens).log().float()
        return cls(debiased=debiased, constant=constant, tokens=tokens)
