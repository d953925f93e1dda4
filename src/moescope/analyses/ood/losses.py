"""The loss with adapters trained on one domain in the place of an expert, by document."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from moescope.analyses.losses import Change, Losses
from moescope.analyses.material import Material
from moescope.analyses.ood.fits import Kind, Targets, Trained
from moescope.analyses.ood.split import HALVES
from moescope.captures.read import Capture
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.corpora.rows import rows_in_turn
from moescope.errors import OptionError
from moescope.experts.adapter import Adapter
from moescope.interventions import replace_output, substitute
from moescope.progress import track

ABLATED = "zero"
"""In tables: the output of the source expert set to zero."""


def substituted(
    material: Material,
    trained: Sequence[Trained],
    targets: Targets,
    domains: Sequence[str],
    tokens: int,
) -> pd.DataFrame:
    """Rise of the loss by document of the half that an adapter was not trained on.

    Returns:
        source, half, adapter ("real", "linear", "zero"), trained_on, tested_on, document, tokens,
        rise.

    Raises:
        OptionError: These tokens hold none of a domain.
    """
    frames = []
    for tested in HALVES:
        folder = trained[0].folder / f"losses-{tokens}-half{tested}"
        documents = (targets.half == tested) & _of_domains(material.capture, domains)
        losses = _losses(material, documents, tokens // len(HALVES), folder)
        found = set(losses.unchanged.index.get_level_values("domain"))
        if missing := [domain for domain in domains if domain not in found]:
            raise OptionError(
                f"the tokens that losses are measured on hold none of {', '.join(missing)}",
                got=f"tokens: {tokens}",
                remedy="Choose more `tokens`",
            )
        own = [one for one in trained if one.tested == tested]
        planned = [change for one in own for change in _changes(material, one, targets, domains)]
        for columns, change in track(planned, "ood: losses"):
            after = losses.of("-".join(columns.values()), change)
            frames.append(after.assign(half=tested, **columns))
    every = pd.concat(frames).reset_index()
    return every.rename(columns={"domain": "tested_on", "difference": "rise"})


def _of_domains(capture: Capture, domains: Sequence[str]) -> Bool[Tensor, " documents"]:
    numbers = torch.tensor([capture.domains.index(domain) for domain in domains])
    return torch.isin(capture.document_domains, numbers)


def _changes(
    material: Material, one: Trained, targets: Targets, domains: Sequence[str]
) -> Iterator[tuple[Mapping[str, str], Change]]:
    """What replaces one source expert, with the columns that tell it apart."""
    source = material.model.layer(one.source.layer), one.source.expert
    target = targets.layer, int(one.read()["target"].iloc[0])
    named = {"source": str(one.source)}
    yield (
        named | {"adapter": ABLATED, "trained_on": RESERVED_DOMAIN},
        lambda: replace_output(source, 0.0),
    )
    kinds: tuple[Kind, ...] = ("real", "linear")
    for kind in kinds:
        for domain in (*domains, RESERVED_DOMAIN):
            adapter = Adapter.load(one.adapter(kind, domain))
            stands_in = target if kind == "real" else None
            columns = named | {"adapter": kind, "trained_on": domain}
            yield columns, partial(substitute, source, stands_in, adapter)


def _losses(
    material: Material, documents: Bool[Tensor, " documents"], tokens: int, folder: Path
) -> Losses:
    corpus, model = material.text(), material.model
    rows = rows_in_turn(corpus.batches(model.tokenizer), documents, tokens, corpus.packing.rows)
    return Losses(model=model, batches=rows, domains=corpus.domains, folder=folder)
