"""The loss with adapters trained on one domain in the place of an expert, by document."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from jaxtyping import Int64
from torch import Tensor

from moescope.analyses.losses import Change, Losses
from moescope.analyses.material import Material
from moescope.analyses.ood.fits import Kind, Targets, Trained
from moescope.analyses.ood.split import HALVES
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.corpora.rows import rows_in_turn
from moescope.experts.adapter import Adapter
from moescope.interventions import replace_output, substitute
from moescope.progress import track

ABLATED = "zero"
"""In tables: the output of the source expert set to zero."""
_EVERYTHING = 2**62
"""More tokens than any text has."""


def substituted(
    material: Material,
    trained: Sequence[Trained],
    targets: Targets,
    domains: Sequence[str],
    tokens: int,
) -> pd.DataFrame:
    """Rise of the loss by document of the half that an adapter was not trained on.

    Returns:
        source, adapter ("real", "linear", "zero"), trained_on, tested_on, document, tokens, rise.
    """
    frames = []
    for tested in HALVES:
        folder = trained[0].folder / f"losses-{tokens}-half{tested}"
        losses = _losses(material, targets.half, tested, tokens // len(HALVES), folder)
        own = [one for one in trained if one.tested == tested]
        planned = [change for one in own for change in _changes(material, one, targets, domains)]
        for columns, change in track(planned, "ood: losses"):
            frames.append(losses.of("-".join(columns.values()), change).assign(**columns))
    found = pd.concat(frames).reset_index()
    found = found.rename(columns={"domain": "tested_on", "difference": "rise"})
    kept = ["source", "adapter", "trained_on", "tested_on", "document", "tokens", "rise"]
    return found.loc[found["tested_on"].isin(domains), kept]


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
    material: Material, half: Int64[Tensor, " documents"], tested: int, tokens: int, folder: Path
) -> Losses:
    corpus, model = material.text(_EVERYTHING), material.model
    return Losses(
        model=model,
        batches=rows_in_turn(
            corpus.batches(model.tokenizer), half == tested, tokens, corpus.packing.rows
        ),
        domains=corpus.domains,
        folder=folder,
    )
