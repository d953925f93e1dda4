"""Adapters trained further on the loss of the model, in the training documents."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moescope.alignment.randomness import generator
from moescope.analyses.fits import Fits
from moescope.analyses.substitute.options import SubstituteOptions
from moescope.analyses.substitute.stand_ins import StandIn
from moescope.corpora.packing import Batch
from moescope.corpora.rows import batched, joined, rows_holding
from moescope.errors import CorpusError
from moescope.evaluate.predictions import Targets, forward, losses
from moescope.experts.adapter import Adapter
from moescope.models.view import MoEModel
from moescope.progress import track


class Tuning:
    """Trains adapters, and keeps them in a folder.

    They learn from rows in which no token is held out: others would be their context.

    Args:
        fits: Which documents they may learn from.
        options: Steps, rate, seed, tokens of text.
        folder: Where they are kept.

    Raises:
        CorpusError: There is no such row.
    """

    def __init__(self, fits: Fits, options: SubstituteOptions, folder: Path) -> None:
        material = fits.material
        corpus = material.text(options.tokens)
        read = corpus.batches(material.model.tokenizer)
        rows = joined(rows_holding(read, ~fits.tokens.held_out, corpus.packing.rows))
        seen = fits.tokens.held_out[rows["documents"].clamp_min(0)] & (rows["documents"] >= 0)
        alone = (~seen.any(1)).nonzero()[:, 0]
        if not len(alone):
            raise CorpusError(
                "every row of text holds tokens of held-out documents, so that nothing is left to "
                "train adapters on",
                remedy="Capture with shorter rows or unpacked documents, or leave out tune_steps",
            )
        self._batches = batched(rows, alone, corpus.packing.rows)
        self._model, self._options, self._folder = material.model, options, folder

    def tuned(self, stand_in: StandIn) -> StandIn:
        """A stand-in with its adapter trained further; the same where it has none."""
        adapter = stand_in.adapter()
        if adapter is None:
            return stand_in
        training = f"-tuned-{self._options.tune_steps}-{self._options.tune_rate}"
        path = self._folder / f"{stand_in.name}{training}.safetensors"
        if not path.exists():
            self._train(stand_in, adapter).save(path)
        return stand_in.tuned(Adapter.load(path), training)

    def _train(self, stand_in: StandIn, start: Adapter) -> Adapter:
        parameters: dict[str, Any] = {
            name: tensor.clone().requires_grad_() for name, tensor in start.tensors().items()
        }
        adapter = replace(start, **parameters)
        optimiser = torch.optim.Adam(parameters.values(), lr=self._options.tune_rate)
        steps = self._options.tune_steps
        batches = _endless(self._batches, generator(self._options.seed, "tuning"))
        with self._model.evaluating(), _frozen(self._model), stand_in.behind(adapter):
            for step in track(range(steps), f"substitute: tuning {stand_in.name}"):
                optimiser.param_groups[0]["lr"] = self._options.tune_rate * _cooling(step / steps)
                loss = _loss(self._model, next(batches))
                optimiser.zero_grad()
                if loss.requires_grad:  # not where no token of the batch went to the source
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
        trained: dict[str, Any] = {name: tensor.detach() for name, tensor in parameters.items()}
        return replace(start, **trained)


@contextmanager
def _frozen(model: MoEModel) -> Iterator[None]:
    trained = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def _cooling(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def _loss(model: MoEModel, batch: Batch) -> torch.Tensor:
    logits = forward(model, batch)
    found = losses(logits, Targets.of(batch, logits.device))
    return found.sum() / max(1, len(found))


def _endless(batches: Sequence[Batch], source: torch.Generator) -> Iterator[Batch]:
    """All batches in random order, again and again."""
    while True:
        for number in torch.randperm(len(batches), generator=source).tolist():
            yield batches[number]
