"""First checks for any model: known failures of routing, each against its null."""

from collections import defaultdict

import pandas as pd

from moescope.analyses.contexts import reader_of
from moescope.analyses.curves import Curve
from moescope.analyses.health.checks import check_rows
from moescope.analyses.health.counts import count_along
from moescope.analyses.health.findings import findings
from moescope.analyses.health.layer import Layer
from moescope.analyses.health.loss import loss_marks
from moescope.analyses.health.options import HealthOptions
from moescope.analyses.health.tables import along_table, expert_table, layer_row, shown_document
from moescope.analyses.health.text import loss_table, runs_table
from moescope.analyses.material import Material
from moescope.analyses.registry import analysis
from moescope.analyses.routing.counts import count_layer
from moescope.analyses.routing.survey import survey
from moescope.captures.read import Capture
from moescope.progress import track
from moescope.runs import Result


@analysis(
    question="Does the routing show a known failure: unbalanced, dead, blind or undecided?",
    source="A Closer Look (chosen experts along a text, first checks); nulls and verdicts ours",
    needs={"routing", "token_loss"},
    options=HealthOptions,
    curves=(
        Curve(
            measure="switch rate along the text",
            table="layers",
            value="switch_rate",
            limits=("switch_low", "switch_high"),
        ),
        Curve(
            measure="router margin (logits)",
            table="layers",
            value="margin",
            limits=("margin_low", "margin_high"),
        ),
    ),
)
def health(material: Material, options: HealthOptions) -> Result:
    """A verdict for each known failure and layer, with its evidence; routing along the text.

    One layer after the other and one shard at a time; of each token, a byte is kept.
    """
    places = material.capture.places
    captures = {stack: Capture(material.run, stack=stack) for stack in dict(places)}
    seen = survey(material.capture, documents=options.documents, sample=0, seed=options.seed)
    marks, read = loss_marks(material.capture), reader_of(material)
    document = shown_document(seen, options)
    rows, layers = [], []
    frames = defaultdict[str, list[pd.DataFrame]](list)
    for stack, number in track(places, "health: layers"):
        capture = captures[stack]
        layer = Layer(
            counts=count_layer(capture, number, seen),
            along=count_along(capture, number, seen, marks, options),
            survey=seen,
            domains=material.capture.domains,
            options=options,
            layers=len(places),
        )
        rows += check_rows(layer)
        layers.append(layer_row(layer))
        frames["experts"].append(expert_table(layer))
        frames["runs"].append(runs_table(layer))
        frames["along"].append(along_table(capture, number, document, read, options))
        if marks is not None:
            frames["loss"].append(loss_table(layer))
    tables = {name: pd.concat(parts, ignore_index=True) for name, parts in frames.items()}
    tables |= {"health": pd.DataFrame(rows), "layers": pd.DataFrame(layers)}
    return Result(
        name="health",
        tables=tables,
        findings=findings(tables),
        provenance={"seed": options.seed},
    )
