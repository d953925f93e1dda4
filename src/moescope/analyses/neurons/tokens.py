"""The text around the places where selective neurons are most active."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from moescope.analyses.contexts import Reader, Text
from moescope.captures.read import Capture


def with_text(capture: Capture, places: Sequence[dict[str, Any]], read: Reader) -> pd.DataFrame:
    """Rows of places with domain, document, token and what stands around it.

    Args:
        capture: The capture; its shards are read one at a time.
        places: Each with its `position` among the tokens of the capture.
        read: Token ids to text.
    """
    rows = []
    for shard in capture.token_shards():
        first = shard.tokens.start
        inside = [row for row in places if first <= row["position"] < shard.tokens.stop]
        if not inside:
            continue
        text, ids = Text(shard, read), shard.token_ids
        documents, domains = shard.documents, shard.domain_of
        for row in inside:
            at = row["position"] - first
            found = {"domain": capture.domains[domains[at]], "document": int(documents[at])}
            found |= {"token": repr(read([int(ids[at])])), "context": text.around(at)}
            rows.append(row | found)
    by = ["stack", "layer", "expert", "neuron", "rank"]
    return pd.DataFrame(rows).sort_values(by, ignore_index=True) if rows else pd.DataFrame()
