"""How much less likely an answer is when one expert is ablated."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from moescope.analyses.attribute.passes import PromptBatch
from moescope.interventions.functions import Expert, replace_output
from moescope.models.observe import Observation, observe
from moescope.models.view import MoELayer, MoEModel
from moescope.progress import track


class Ablations:
    """Passes over prompts with one expert after the other ablated: zero in place of its output.

    Args:
        model: The model.
        batches: The prompts.
        answers: Tokens whose loss is wanted for every prompt.
    """

    def __init__(
        self, model: MoEModel, batches: Sequence[PromptBatch], answers: Int64[Tensor, " answers"]
    ) -> None:
        self._model = model
        self._batches = batches
        self._answers = answers
        self.used: dict[MoELayer, Bool[np.ndarray, "prompts experts"]] = {}
        """Which experts any token of a prompt is sent to."""
        self._as_is: list[Tensor] = []
        self._count = sum(len(batch.numbers) for batch in batches)
        for batch in batches:
            with observe(model.layers, self._noting(batch)):
                self._as_is.append(self._losses(batch))

    def rises(self) -> Iterator[tuple[Expert, Float[np.ndarray, "prompts answers"]]]:
        """Rise of the negative log-likelihood, nats, expert by expert; exactly 0 where unused."""
        experts = [(layer, e) for layer in self._model.layers for e in range(layer.num_experts)]
        for layer, expert in track(experts, "attribute: experts"):
            rises = np.zeros((self._count, len(self._answers)))
            used = self.used[layer][:, expert]
            for batch, before in zip(self._batches, self._as_is, strict=True):
                mine = torch.from_numpy(used)[batch.numbers]
                if mine.any():
                    with replace_output((layer, expert), 0.0):
                        rise = self._losses(batch) - before
                    rises[batch.numbers[mine]] = rise[mine].numpy()
            yield (layer, expert), rises

    def _losses(self, batch: PromptBatch) -> Float[Tensor, "rows answers"]:
        """In fp64, since differences of what is nearly alike are wanted."""
        logits = batch.run(self._model)
        losses: Tensor = -logits.double().log_softmax(-1)[:, self._answers.to(logits.device)]
        return losses.cpu()

    def _noting(self, batch: PromptBatch) -> Callable[[Observation], None]:
        def note(observation: Observation) -> None:
            layer, routing = observation.layer, observation.routing
            kept = batch.is_token(layer).flatten()
            sent = torch.where(routing.weights != 0, routing.experts, -1).cpu()
            sent = sent.masked_fill(~kept[:, None], -1).reshape(len(batch.numbers), -1)
            found = torch.zeros(len(sent), layer.num_experts + 1, dtype=torch.bool)
            found[torch.arange(len(sent))[:, None], sent] = True  # -1 is the last column
            used = self.used.setdefault(
                layer, np.zeros((self._count, layer.num_experts), dtype=bool)
            )
            used[batch.numbers] = found[:, :-1].numpy()

        return note
