"""Who gets the tokens: expert use by layer and domain, pairs of experts, and typical tokens."""

from collections import defaultdict

import numpy as np
import pandas as pd

from moescope.analyses.contexts import reader_of
from moescope.analyses.curves import Curve
from moescope.analyses.material import Material
from moescope.analyses.registry import analysis
from moescope.analyses.routing.counts import count_layer
from moescope.analyses.routing.findings import findings
from moescope.analyses.routing.logits import logits_tables
from moescope.analyses.routing.options import RoutingOptions
from moescope.analyses.routing.pairs import coactivation_table, transition_table
from moescope.analyses.routing.survey import survey
from moescope.analyses.routing.tables import (
    concentration_table,
    corrected,
    divergence_rows,
    layer_row,
    share_table,
)
from moescope.analyses.routing.tokens import typical_tokens
from moescope.captures.read import Capture
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.measures.jackknife import GROUPS
from moescope.progress import track
from moescope.runs import Result


@analysis(
    question="Which experts get the tokens, and are domains routed differently?",
    source="MoE Lens (routing specialisation); counts, matching and null ours",
    needs={"routing"},
    options=RoutingOptions,
    curves=(
        Curve(
            measure="share of the K busiest experts",
            table="concentration",
            value="busiest_k_share",
            limits=("busiest_k_low", "busiest_k_high"),
            where={"domain": RESERVED_DOMAIN},
        ),
        Curve(
            measure="entropy of expert use (bits)",
            table="concentration",
            value="entropy_bits",
            limits=("entropy_low", "entropy_high"),
            where={"domain": RESERVED_DOMAIN},
        ),
        Curve(
            measure="mean entropy of the router (bits)", table="layers", value="router_entropy_bits"
        ),
    ),
)
def routing(material: Material, options: RoutingOptions) -> Result:
    """Expert use by layer and domain, divergence, pairs of experts, tokens, router logits.

    One layer after the other and one shard at a time: memory grows with the documents, by a few
    bytes each, and not with the tokens.
    """
    domains, read = material.capture.domains, reader_of(material)
    places = material.capture.places
    seen = survey(
        material.capture, documents=options.documents, sample=options.sample, seed=options.seed
    )
    grouped = np.bincount(seen.group_of, seen.tokens, minlength=GROUPS).astype(np.int64)
    frames = defaultdict[str, list[pd.DataFrame]](list)
    layers, divergences, logits = [], [], []
    captures = {stack: Capture(material.run, stack=stack) for stack in dict(places)}
    for stack, layer in track(places, "routing: layers"):
        capture = captures[stack]
        counts = count_layer(capture, layer, seen)
        frames["routing"].append(share_table(counts, seen, domains, options))
        frames["concentration"].append(concentration_table(counts, seen, domains))
        frames["coactivation"].append(coactivation_table(counts))
        frames["transitions"].append(transition_table(counts, grouped))
        frames["tokens"].append(typical_tokens(capture, counts, seen, read, options))
        coordinates, summary = logits_tables(counts, seen, domains, options)
        frames["pca"].append(coordinates)
        layers.append(layer_row(counts, seen))
        divergences += divergence_rows(counts, seen, domains, options)
        logits.append(summary)
    tables = {name: pd.concat(parts, ignore_index=True) for name, parts in frames.items()}
    tables |= {
        "layers": pd.DataFrame(layers),
        "divergence": corrected(divergences),
        "logits": corrected(logits),
    }
    return Result(
        name="routing",
        tables=tables,
        findings=findings(tables, options),
        provenance={"seed": options.seed},
    )
