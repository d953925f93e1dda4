"""Router logits of a sample of tokens: principal components, and how far domains lie apart."""

import numpy as np
import pandas as pd

from moescope.analyses.routing.counts import LayerCounts
from moescope.analyses.routing.options import RoutingOptions
from moescope.analyses.routing.survey import Survey
from moescope.measures.components import principal_components, variance_between


def logits_tables(
    counts: LayerCounts, survey: Survey, domains: list[str], options: RoutingOptions
) -> tuple[pd.DataFrame, dict[str, object]]:
    """Coordinates of every token of the sample, and one row of what they say of the layer."""
    coordinates, parts = principal_components(counts.logits)
    domain_of = survey.domain_of[survey.sample_documents]
    table = pd.DataFrame(
        {
            **counts.names,
            "domain": np.array(domains)[domain_of],
            "document": survey.sample_documents,
            "token": survey.sample,
            "pc1": coordinates[:, 0],
            "pc2": coordinates[:, 1],
        }
    )
    documents, units = np.unique(survey.sample_documents, return_inverse=True)
    between, null = variance_between(
        counts.logits,
        survey.domain_of[documents],
        units,
        permutations=options.permutations,
        seed=options.seed,
    )
    summary = {
        **counts.names,
        "pc1_variance": parts[0],
        "pc2_variance": parts[1],
        "between_domains": between,
        "null_mean": null.mean(),
        "null_p95": np.quantile(null, 0.95),
        "p_value": (1 + (null >= between).sum()) / (1 + len(null)),
        "n_tokens": len(table),
        "n_documents": len(documents),
        "seed": options.seed,
    }
    return table, summary
