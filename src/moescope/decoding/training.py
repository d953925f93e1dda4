"""Trains the translators of a tuned lens on the states of a model (arXiv 2303.08112, section 3)."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from moescope.alignment.optimiser import newton_schulz
from moescope.corpora.corpus import Corpus
from moescope.decoding.lens import chunks, divergence, log_probabilities
from moescope.decoding.training_states import States, StateSource
from moescope.decoding.translators import Translators
from moescope.errors import OptionError
from moescope.models.view import MoEModel
from moescope.progress import track

_CHOICE_TOKENS = 4096  # their states are kept in memory
_EXACT = 1e-6  # nats: a state that the readout decodes as the model does, up to rounding
_MOMENTUM = 0.95
_DECAY = 0.1


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How translators are trained."""

    steps: int = 250
    """Optimiser steps. Each takes one batch of the text, which begins anew where it ends."""
    learning_rate: float = 0.05
    """Spectral norm of the first step on W (Muon); it falls to zero linearly."""
    checks: int = 5
    """How often, evenly spaced, the translators are compared on documents set aside for that; of
    each layer the best are kept."""
    seed: int = 0
    """Says which documents are held out: 2 of 10, and 1 of 10 for the choice."""

    def __post_init__(self) -> None:
        if self.checks < 1 or self.steps < self.checks:
            raise OptionError(
                "training needs a check, and a step before every check",
                got=f"{self.steps} steps, {self.checks} checks",
            )
        if not self.learning_rate > 0:
            raise OptionError("learning_rate is not positive", got=self.learning_rate)


def fit(model: MoEModel, corpus: Corpus, options: TrainingOptions) -> Translators:
    """Train one translator per sparse decoder layer to predict what the model predicts in the end.

    Minimises KL(final || translated) over the tokens of the training documents, all layers at once,
    one pass through the model per step and no gradient in it. Starts at the identity, which also
    stays where nothing is better on the documents of the choice, and untrained where states are
    decoded exactly already.

    Returns:
        The translators; `training` holds `training_key`, the `tokens` of all steps, and the
        `course`: for every check and layer step, tokens so far and mean KL over the documents of
        the choice, and `kept` where the layer is what it was then.

    Raises:
        ModelError: The states of the model cannot be decoded.
        CorpusError: The text has too few documents, or cannot be read.
    """
    source = StateSource.of(model, corpus, options.seed)
    fitting = _Fitting(source, options)
    fitting.check(0)
    due = {options.steps * number // options.checks for number in range(1, options.checks + 1)}
    batches = _endless(source)
    for step in track(range(1, options.steps + 1), "tuned lens: steps", total=options.steps):
        fitting.step(next(batches), schedule=1 - (step - 1) / options.steps)
        if step in due:
            fitting.check(step)
    return fitting.translators(training_key(corpus, options))


def training_key(corpus: Corpus, options: TrainingOptions) -> dict[str, object]:
    """What the outcome of a training depends on, beside the model."""
    names = asdict(TrainingOptions())
    return {
        "text": corpus.description,
        "options": {name: getattr(options, name) for name in names},
    }


def _endless(source: StateSource) -> Iterator[States]:
    while True:
        yield from source.states("training")


class _Fitting:
    """Translators on their way: W and b of a layer are one matrix, so that Muon moves both."""

    def __init__(self, source: StateSource, options: TrainingOptions) -> None:
        self.source, self.options = source, options
        self.tokens = 0
        self._course: list[dict[str, Any]] = []
        self._choice = _beginning(source)
        layers = self._choice.layers
        self._lengths = layers.norm(dim=-1).mean(1)  # of a state: what b is a multiple of
        count, _, hidden = layers.shape
        self._matrices = layers.new_zeros(count, hidden, hidden + 1)
        self._momentum = torch.zeros_like(self._matrices)
        self._best = torch.zeros_like(self._matrices)
        self._lowest = [torch.inf] * count

    @torch.enable_grad()
    def step(self, states: States, schedule: float) -> None:
        """One step of Muon (Jordan et al. 2024) on all layers; `schedule` scales its length."""
        moving = [i for i, lowest in enumerate(self._lowest) if lowest > _EXACT]
        if not moving:
            return
        gradient = torch.zeros_like(self._matrices)
        tokens = len(states.last)
        for some in chunks(self.source.readout, tokens):
            with torch.no_grad():
                final = self.source.readout.logits(states.last[some]).float().softmax(-1)
            for i in moving:
                matrix = self._matrices[i].detach().requires_grad_()
                own = self.source.readout.logits(self._moved(i, matrix, states.layers[i, some]))
                # Up to a constant, the entropy of `final`, it is the divergence.
                loss = cross_entropy(own.float(), final, reduction="sum") / tokens
                gradient[i] += torch.autograd.grad(loss, matrix)[0]
        self._momentum.mul_(_MOMENTUM).add_(gradient)
        direction = newton_schulz(gradient[moving] + _MOMENTUM * self._momentum[moving])
        rate = self.options.learning_rate * schedule
        self._matrices[moving] = (1 - _DECAY * rate) * self._matrices[moving] - rate * direction
        self.tokens += tokens

    @torch.no_grad()
    def check(self, step: int) -> None:
        """Compare the translators with the best so far."""
        count, tokens, _ = self._choice.layers.shape
        sums = [0.0] * count
        for some in chunks(self.source.readout, tokens):
            final = log_probabilities(self.source.readout, self._choice.last[some])
            for i in range(count):
                moved = self._moved(i, self._matrices[i], self._choice.layers[i, some])
                found = divergence(final, log_probabilities(self.source.readout, moved))
                sums[i] += found.sum().item()
        for i, layer in enumerate(self.source.layers):
            mean = sums[i] / tokens
            if mean < self._lowest[i]:
                self._lowest[i], self._best[i] = mean, self._matrices[i]
            self._course.append({"step": step, "tokens": self.tokens, "layer": layer, "kl": mean})

    def translators(self, key: dict[str, object]) -> Translators:
        """The best ones."""
        best = self._best.cpu()
        lengths = self._lengths.cpu()
        layers = self.source.layers
        lowest = dict(zip(layers, self._lowest, strict=True))
        course = [row | {"kept": row["kl"] == lowest[row["layer"]]} for row in self._course]
        return Translators(
            weights={layer: best[i, :, :-1].clone() for i, layer in enumerate(layers)},
            biases={layer: lengths[i] * best[i, :, -1] for i, layer in enumerate(layers)},
            model_fingerprint=self.source.readout.model.fingerprint,
            training={**key, "tokens": self.tokens, "course": course},
        )

    def _moved(
        self,
        i: int,
        matrix: Float[Tensor, "hidden columns"],
        states: Float[Tensor, "tokens hidden"],
    ) -> Float[Tensor, "tokens hidden"]:
        bias = self._lengths[i] * matrix[:, -1]
        return states + torch.addmm(bias, states, matrix[:, :-1].T)


def _beginning(source: StateSource) -> States:
    """States of the first documents of the choice."""
    found: list[States] = []
    for states in source.states("choice"):
        found.append(states)
        if sum(len(states.last) for states in found) >= _CHOICE_TOKENS:
            break
    last = torch.cat([states.last for states in found])
    layers = torch.cat([states.layers for states in found], 1)
    return States(last[:_CHOICE_TOKENS], layers[:, :_CHOICE_TOKENS])
