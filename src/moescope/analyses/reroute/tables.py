"""Tables of `reroute`."""

from collections.abc import Mapping

import pandas as pd

from moescope.analyses.fits import Fits, Source
from moescope.analyses.likeness import Likeness, expert_parameters
from moescope.analyses.loss_tables import loss_columns
from moescope.analyses.losses import by_domain
from moescope.analyses.reroute.ways import ANY_LAYER, Setting, Way
from moescope.evaluate.totals import Resampling


def reroute_table(
    fits: Fits,
    ways: Mapping[Setting, Way],
    sums: Mapping[Setting, pd.DataFrame],
    used: Mapping[Source, int],
    resampling: Resampling,
) -> pd.DataFrame:
    """One row per way, budget, threshold, draw and domain.

    Experts are those that take part. n_experts, how many; of_experts, the share that is resident;
    rerouted and skipped, shares of the (token, slot) pairs that the model as it is routes to them
    in the held-out documents. saved_parameters, those of the experts that are not resident;
    extra_parameters, those of adapters or maps; of_parameters, resident ones and extra ones over
    those of all of them.

    Args:
        fits: The model.
        ways: What was done.
        sums: What it cost.
        used: Tokens of the held-out documents that used each expert.
        resampling: Of the intervals.
    """
    whole, slots = expert_parameters(fits.material.model, list(used)), max(sum(used.values()), 1)
    rows = []
    for setting, documents in sums.items():
        way = ways[setting]
        absent = [*way.rerouted, *way.skipped]
        saved = expert_parameters(fits.material.model, absent)
        about = setting._asdict() | {
            "n_experts": len(used),
            "of_experts": setting.resident / len(used),
            "rerouted": sum(used[expert] for expert in way.rerouted) / slots,
            "skipped": sum(used[expert] for expert in way.skipped) / slots,
            "saved_parameters": saved,
            "extra_parameters": way.parameters,
            "of_parameters": (whole - saved + way.parameters) / whole,
        }
        for domain, part in by_domain(documents).items():
            rows.append(about | {"domain": domain} | loss_columns(part, resampling))
    return pd.DataFrame(rows)


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
