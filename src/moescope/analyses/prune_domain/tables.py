"""Tables of `prune-domain`: losses, comparisons of choices, and the choices themselves."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd

from moescope.analyses.prune_domain.choice import chosen, coverage
from moescope.analyses.prune_domain.options import Criterion, Setting
from moescope.analyses.prune_domain.use import Unpruned, both
from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.evaluate.totals import (
    Resampling,
    Totals,
    counts,
    difference_columns,
    mean_columns,
)

_SELECTED_ON = ("first half", "second half", "all documents")


def loss_table(totals: Mapping[Setting, Totals], resampling: Resampling) -> pd.DataFrame:
    """Loss and its paired difference from the model as it is, by setting and domain."""
    rows = []
    for setting, total in totals.items():
        for domain, documents in total.by_domain():
            row = setting._asdict() | {"domain": domain}
            row |= mean_columns(documents, ["loss"], resampling)
            row |= difference_columns(documents, "difference", resampling)
            rows.append(row | counts(documents, resampling))
    return pd.DataFrame(rows)


def against_table(
    totals: Mapping[Setting, Totals], domains: Sequence[str], resampling: Resampling
) -> pd.DataFrame:
    """Each domain's choice against the others of its size, on its own documents and elsewhere.

    Args:
        totals: Of all settings.
        domains: Of the corpus, in its order.
        resampling: Of the intervals.

    Returns:
        One row per domain's choice and place. rise, of the loss over the model as it is;
        versus_pooled and versus_random, its difference from the rise with experts chosen on all
        text, and from the mean over the random choices; each with its paired 95% interval.
        random_rise, that mean; random_least and random_most of a single choice.
    """
    documents = {setting: next(iter(total.by_domain()))[1] for setting, total in totals.items()}
    rows = []
    for setting, own in documents.items():
        if setting.choice != "domain":
            continue
        draws = [d for s, d in documents.items() if (s.choice, s.kept) == ("random", setting.kept)]
        pooled = documents.get(Setting("pooled", RESERVED_DOMAIN, setting.kept))
        compared = _compared(own, draws, pooled)
        number = domains.index(setting.chosen_for)
        inside = own.index.get_level_values(0) == number
        for where, here in {"own": inside, "elsewhere": ~inside}.items():
            if not here.any():
                continue
            found = {"chosen_for": setting.chosen_for, "kept": setting.kept, "where": where}
            for name in ("rise", "versus_pooled", "versus_random"):
                found |= difference_columns(compared[here], name, resampling)
            tokens = own[here].tokens.sum()
            each = [draw[here].difference.sum() / tokens for draw in draws]
            found |= {"random_rise": np.mean(each), "random_least": min(each)}
            found |= {"random_most": max(each), "random_draws": len(each)}
            rows.append(found | counts(own[here], resampling))
    return pd.DataFrame(rows)


def _compared(
    own: pd.DataFrame, draws: Sequence[pd.DataFrame], pooled: pd.DataFrame | None
) -> pd.DataFrame:
    """Sums per document of the rise and of its differences from those of other choices."""
    random = sum(draw["difference"] for draw in draws) / len(draws)
    return own.assign(
        rise=own["difference"],
        versus_pooled=np.nan if pooled is None else own["difference"] - pooled["difference"],
        versus_random=own["difference"] - random,
    )


def choice_table(
    text: Sequence[Unpruned], sizes: Sequence[int], chosen_for: Sequence[str], criterion: Criterion
) -> pd.DataFrame:
    """The experts that are kept, and the share of the routing that went to them.

    Returns:
        One row per domain ("all" for all the text), size, layer and documents to choose on: the
        two halves, and all, as a pruned model would be made. n_routed, (token, slot) pairs of these
        documents; coverage, the share of them that went to experts that are kept;
        coverage_other_half, the same on the other half; agreement, the share of the experts that
        the other half keeps too.
    """
    uses = [half.use for half in text]
    rows = []
    for domain, count in product(chosen_for, sizes):
        parts = [use[domain] for use in (*uses, both(*uses))]
        kept = [chosen(part, count, criterion) for part in parts]
        for number, selected_on in enumerate(_SELECTED_ON):
            for layer, experts in kept[number].items():
                row = {"chosen_for": domain, "kept": count, "selected_on": selected_on}
                row |= {"layer": layer.index, "experts": " ".join(map(str, experts))}
                row |= {"n_routed": int(parts[number][layer].frequency.sum())}
                row |= {"coverage": coverage(parts[number][layer], experts)}
                if number < len(uses):
                    other = 1 - number
                    shared = set(experts) & set(kept[other][layer])
                    row |= {"coverage_other_half": coverage(parts[other][layer], experts)}
                    row |= {"agreement": len(shared) / len(experts)}
                rows.append(row)
    return pd.DataFrame(rows)
