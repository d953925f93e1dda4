"""Tables of `reroute`."""

from collections.abc import Mapping

import pandas as pd

from moescope.analyses.clusters.losses import judged, loss_columns, paired_columns
from moescope.analyses.fits import Fits, Source
from moescope.analyses.likeness import Likeness, expert_parameters
from moescope.analyses.losses import by_domain
from moescope.analyses.reroute.ways import ANY_LAYER, RANDOM, Setting, Way
from moescope.evaluate.totals import Resampling


def reroute_table(
    fits: Fits,
    ways: Mapping[Setting, Way],
    totals: Mapping[Setting, pd.DataFrame],
    used: Mapping[Source, int],
    resampling: Resampling,
) -> pd.DataFrame:
    """One row per way, budget, threshold, draw and domain.

    rerouted and skipped are shares of the (token, slot) pairs of the held-out documents, as the
    model as it is routes them. saved_parameters, those of the experts that are not resident;
    extra_parameters, those of adapters or maps; of_parameters, resident ones and extra ones over
    those of all experts.

    Args:
        fits: The model.
        ways: What was done.
        totals: What it cost.
        used: Tokens of the held-out documents that used each expert.
        resampling: Of the intervals.
    """
    whole, slots = expert_parameters(fits.material.model, list(used)), max(sum(used.values()), 1)
    rows = []
    for setting, sums in totals.items():
        way = ways[setting]
        absent = [*way.rerouted, *way.skipped]
        saved = expert_parameters(fits.material.model, absent)
        about = setting._asdict() | {
            "of_experts": setting.resident / len(used),
            "rerouted": sum(used[expert] for expert in way.rerouted) / slots,
            "skipped": sum(used[expert] for expert in way.skipped) / slots,
            "saved_parameters": saved,
            "extra_parameters": way.parameters,
            "of_parameters": (whole - saved + way.parameters) / whole,
        }
        for domain, documents in by_domain(sums).items():
            rows.append(about | {"domain": domain} | loss_columns(documents, resampling))
    return pd.DataFrame(rows)


def against_table(
    totals: Mapping[Setting, pd.DataFrame], threshold: float, resampling: Resampling
) -> pd.DataFrame:
    """By how much the loss with rerouting to any layer lies above that of each other way.

    Paired by document, on all domains; random residents are one, the mean of their draws.

    Args:
        totals: Of all settings.
        threshold: Which of the thresholds is compared.
        resampling: Of the intervals.
    """
    rows = []
    for setting, own in totals.items():
        if (setting.way, setting.threshold) != (ANY_LAYER, threshold):
            continue
        for way in dict.fromkeys(s.way for s in totals if s.way != ANY_LAYER):
            others = [d for s, d in totals.items() if s[:2] == (way, setting.resident)]
            if others:
                row = {"resident": setting.resident, "versus": way, "draws": len(others)}
                each = [other["difference"].sum() / own["tokens"].sum() for other in others]
                row |= {"least": min(each), "most": max(each)} if way == RANDOM else {}
                rows.append(row | paired_columns(own, others, resampling))
    return judged(pd.DataFrame(rows))


def route_table(likeness: Likeness, ways: Mapping[Setting, Way], threshold: float) -> pd.DataFrame:
    """Where the tokens of experts that are not resident go, unless they are skipped.

    inner_fvu, of the end of the route in the place of the expert, inside the training documents;
    fvu, the same on the held-out ones, beside that of a linear map.
    """
    index = {expert: i for i, expert in enumerate(likeness.experts)}
    rows = []
    for setting, way in ways.items():
        if (setting.way, setting.threshold) != (ANY_LAYER, threshold):
            continue
        for source, target in way.routes.items():
            i, j = index[source], index[target]
            rows.append(
                {
                    "resident": setting.resident,
                    "layer": source.layer,
                    "expert": source.expert,
                    "to_layer": target.layer,
                    "to_expert": target.expert,
                    "inner_fvu": likeness.inner_fvu[i, j],
                    "fvu": likeness.fvu[i, j],
                    "linear_fvu": likeness.linear_fvu[i],
                }
            )
    columns = ["resident", "layer", "expert", "to_layer", "to_expert"]
    return pd.DataFrame(rows, columns=[*columns, "inner_fvu", "fvu", "linear_fvu"])
