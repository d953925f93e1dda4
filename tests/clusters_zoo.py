"""Models with planted copies of experts, and adapters that need no fitting."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

import models_zoo
import moescope
from moescope.alignment.options import FitOptions
from moescope.analyses.fits import Fits, Fitted, Source, Target
from moescope.analyses.material import Material
from moescope.corpora.packing import Packing
from moescope.experts.adapter import Adapter
from moescope.models.load import load

EXPERTS = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Exact(Fits):
    """Adapters are the identity: copies imitate one another without any error, at once."""

    def between(self, source: Source, targets: Sequence[Target]) -> dict[Target, Fitted]:
        train, held_out = self.samples(source)
        if source not in self._linear:
            self._linear[source] = self.linear(source)(held_out.inputs)
        linear, found = self._linear[source], {}
        for target in targets:
            weights = self._weights(target).to(dtype=torch.float32)
            inner, fvu, fvu_linear = (
                self._fvu(given, wanted, train.outputs.mean(0))
                for given, wanted in (
                    (weights(train.inputs), train.outputs),
                    (weights(held_out.inputs), held_out.outputs),
                    (linear, held_out.outputs),
                )
            )
            found[target] = Fitted(
                source=source,
                target=target,
                adapter=Adapter(form="identity"),
                inner_fvu=inner,
                row={"fvu": fvu, "fvu_linear": fvu_linear, "adapter_parameters": 0},
            )
        return found

    @cached_property
    def _linear(self) -> dict[Source, torch.Tensor]:
        return {}

    @staticmethod
    def _fvu(given, wanted, mean) -> float:
        return float((given - wanted).square().sum() / (wanted - mean).square().sum())


@torch.no_grad()
def with_copies(layers: Sequence[int], of: int, count: int = 5):
    """A random model in which the experts of some layers are copies of those of another.

    Other parameters, the same function: neurons in another order, half of each value in what reads
    and the other half in what writes.
    """
    model = load(models_zoo.build("mixtral", num_hidden_layers=count, num_local_experts=EXPERTS))
    random = torch.Generator().manual_seed(0)
    for layer in layers:
        for expert in range(EXPERTS):
            copied = model.layer(of).expert_tensors(expert)
            gate, up = copied["gate_up_proj"].chunk(2)
            order = torch.randperm(len(up), generator=random)
            own = model.layer(layer).expert_tensors(expert)
            own["gate_up_proj"].copy_(torch.cat([gate[order], 2 * up[order]]))
            own["down_proj"].copy_(copied["down_proj"][:, order] / 2)
    return model


def corpus(documents: int):
    random = np.random.default_rng(0)
    ids = [random.integers(3, models_zoo.VOCABULARY, 24).tolist() for _ in range(documents)]
    return moescope.Corpus.from_token_ids({"words": ids}, Packing(length=24, rows=32))


def material(model, folder, documents: int = 160) -> Material:
    text = corpus(documents)
    moescope.capture(
        model, text, folder, record=("routing", "inputs"), tokens=128, tokens_per_expert=400
    )
    return Material(folder, model, text)


def exact(given: Material, options) -> Exact:
    fits = Fits.of(
        given,
        FitOptions(form="identity", controls=False, seed=options.seed),
        held_out_share=options.held_out_share,
        max_tokens=options.max_tokens,
    )
    return Exact(**{name: getattr(fits, name) for name in ("material", "tokens", "options")})
