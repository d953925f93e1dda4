"""The loss with adapters trained on one domain in the place of an expert, by document."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pandas as pd
from jaxtyping import Int64
from torch import Tensor

from moescope.analyses.damage.losses import Change, Losses, rows_in_turn
from moescope.analyses.material import Material
from moescope.analyses.ood.fits import Kind, Targets, Trained
from moescope.analyses.ood.split import HALVES
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.evaluate.paired import BASELINE
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
        folder = trained[0].folder / f"losses-{tokens}"
        losses = _losses(material, targets.half, tested, tokens // len(HALVES), folder)
        before = losses.of(f"half{tested}-{BASELINE}", nullcontext)
        assert before is not None
        own = [one for one in trained if one.tested == tested]
        planned = [change for one in own for change in _changes(material, one, targets, domains)]
        for columns, change in track(planned, "ood: losses"):
            name = "-".join([f"half{tested}", *columns.values()])
            after = losses.of(name, change)
            if after is not None:
                frame = after.assign(**columns, rise=after["loss"] - before["loss"])
                frames.append(frame)
    names = dict(enumerate(material.capture.domains))
    found = pd.concat(frames, ignore_index=True)
    found["tested_on"] = found["domain"].map(names)
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
