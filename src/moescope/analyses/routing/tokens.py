"""The tokens most typical for each expert, and where in the text they stand."""

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray as Array

from moescope.analyses.contexts import Reader, Text
from moescope.analyses.routing.counts import LayerCounts
from moescope.analyses.routing.options import RoutingOptions
from moescope.analyses.routing.survey import Survey
from moescope.captures.read import Capture
from moescope.captures.stream import TokenShard

CONTEXTS = 3
"""Places, in as many documents, that are shown for a typical token."""
_CERTAIN = 1.96


def typical_tokens(
    capture: Capture, counts: LayerCounts, survey: Survey, read: Reader, options: RoutingOptions
) -> pd.DataFrame:
    """Vocabulary whose tokens go to an expert most surely, with places where they do.

    Ranked by the lower Wilson limit of the share of a token's occurrences that have the expert,
    so that the rarer of two equal shares comes later. Only tokens above the expert's own share.
    """
    frequent = np.flatnonzero(survey.vocabulary >= options.least_count)
    overall = counts.by_expert() / survey.tokens.sum()
    rows: list[dict[str, object]] = []
    for expert in range(counts.num_experts):
        total, routed = survey.vocabulary[frequent], counts.vocabulary[frequent, expert]
        share = routed / total
        ranked = np.argsort(-_lower_limit(share, total), kind="stable")
        best = [i for i in ranked[: options.typical_tokens] if share[i] > overall[expert]]
        for rank, i in enumerate(best, start=1):
            token = int(frequent[i])
            rows.append(
                {
                    **counts.names,
                    "expert": expert,
                    "rank": rank,
                    "token_id": token,
                    "token": repr(read([token])),
                    "share": share[i],
                    "lift": share[i] / overall[expert],
                    "tokens": routed[i],
                    "n_tokens": total[i],
                }
            )
    found = pd.DataFrame(rows)
    return found if found.empty else found.join(_contexts(capture, counts, found, read))


def _lower_limit(
    share: Float[Array, " tokens"], total: Int[Array, " tokens"]
) -> Float[Array, " tokens"]:
    """Lower 95% limit of a share of independent trials (Wilson 1927)."""
    square = _CERTAIN**2
    middle = share + square / (2 * total)
    spread = _CERTAIN * np.sqrt(share * (1 - share) / total + square / (4 * total**2))
    return np.asarray((middle - spread) / (1 + square / total))


def _contexts(
    capture: Capture, counts: LayerCounts, found: pd.DataFrame, read: Reader
) -> pd.DataFrame:
    """The first places of each (expert, token), each in another document."""
    keys = (found["token_id"] * counts.num_experts + found["expert"]).to_numpy()
    wanted = np.zeros(counts.vocabulary.size, dtype=bool)
    wanted[keys] = True
    texts: dict[int, dict[int, str]] = {int(key): {} for key in keys}
    for shard in capture.token_shards():
        places = _places(shard, counts, wanted)
        text = Text(shard, read)
        for key, document, position in places.itertuples(index=False):
            if len(texts[key]) < CONTEXTS and document not in texts[key]:
                texts[key][document] = text.around(position)
        wanted[[key for key, some in texts.items() if len(some) == CONTEXTS]] = False
        if not wanted.any():
            break
    named = [f"context_{number}" for number in range(1, CONTEXTS + 1)]
    lists = [[*texts[int(key)].values(), *[""] * CONTEXTS][:CONTEXTS] for key in keys]
    return pd.DataFrame(lists, columns=named, index=found.index)


def _places(shard: TokenShard, counts: LayerCounts, wanted: Array) -> pd.DataFrame:
    """Key, document and place in the shard of the first of them in each document."""
    experts = shard.experts(counts.layer).numpy()
    keys = shard.token_ids.numpy()[:, None] * counts.num_experts + experts
    positions, slots = np.nonzero(wanted[keys] & (experts >= 0))
    frame = pd.DataFrame(
        {
            "key": keys[positions, slots],
            "document": shard.documents.numpy()[positions],
            "position": positions,
        }
    )
    return frame.drop_duplicates(["key", "document"]).groupby("key").head(CONTEXTS)
