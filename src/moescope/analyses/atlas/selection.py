"""Which pairs get a converged fit: those that screening kept, and some that it did not."""

from typing import Literal, get_args

import numpy as np
import pandas as pd

from moescope.analyses.atlas.options import AtlasOptions

Stage = Literal["overlap", "short fit", "converged"]
"""How far a pair got by itself."""
STAGES = get_args(Stage)


def with_stages(screened: pd.DataFrame, options: AtlasOptions) -> pd.DataFrame:
    """The rows of one imitated expert with columns `stage` and `sampled`.

    `sampled` are the rejected that get a converged fit all the same, drawn without weights.
    """
    kept = screened["place"] <= (options.survivors or len(screened))
    stage = np.where(screened["short_fvu"].notna(), "short fit", "overlap")
    source = screened[["source_layer", "source_expert"]].iloc[0].tolist()
    random = np.random.default_rng([options.seed, *source])
    rejected = np.flatnonzero(~kept)
    drawn = random.permutation(rejected)[: options.rejected]
    return screened.assign(
        stage=np.where(kept, "converged", stage),
        sampled=np.isin(np.arange(len(screened)), drawn),
    )
