"""What the tables of `tuned-lens` say in words."""

import pandas as pd

from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.runs import Finding


def findings(lenses: pd.DataFrame, gains: pd.DataFrame, course: pd.DataFrame) -> list[Finding]:
    """From measures by lens and layer, paired differences, and the course of the training."""
    overall = lenses[lenses["domain"] == RESERVED_DOMAIN]
    gained = gains[gains["domain"] == RESERVED_DOMAIN]
    gained = gained.sort_values("kl")  # the layer that gains most comes first
    found = [
        *_best(overall, gained),
        *_matrix(gained),
        *_layers(gained),
        *_constant(overall),
        *_course(course),
    ]
    if (overall["status"] == "few_documents").any():
        found.append(
            Finding(
                text=f"No intervals: too few held-out documents ({overall['n_documents'].max()})."
            )
        )
    return found


def _best(overall: pd.DataFrame, gained: pd.DataFrame) -> list[Finding]:
    """The layer that gains most on the logit lens."""
    row = gained[gained["against"] == "logit"].iloc[0]
    layer = int(row["layer"])
    if not row["kl"] < 0:
        return [Finding(text="At no layer does the tuned lens come nearer than the logit lens.")]
    kl = overall[overall["layer"] == layer].set_index("lens")
    text = (
        f"A trained affine map gains most after layer {layer}: the KL from the model's own "
        f"prediction falls from {kl['kl']['logit']:.3f} to {kl['kl']['tuned']:.3f} nats, by "
        f"{_interval(row)}, and the likeliest token is the model's for "
        f"{kl['agreement']['tuned']:.0%} instead of {kl['agreement']['logit']:.0%} of "
        f"{row['n_tokens']:,} predictions in {row['n_documents']} held-out documents."
    )
    numbers = {"layer": layer, "logit": kl["kl"]["logit"], "tuned": kl["kl"]["tuned"]}
    return [Finding(text=text, numbers=numbers | {"difference": row["kl"]})]


def _interval(row: pd.Series) -> str:
    text = f"{-row['kl']:.3f}"
    if pd.notna(row["kl_low"]):
        text += f" (95% interval {-row['kl_high']:.3f} to {-row['kl_low']:.3f})"
    return text


def _layers(gained: pd.DataFrame) -> list[Finding]:
    """At how many layers the gain is more than chance."""
    against = gained[gained["against"] == "logit"]
    if against["kl_high"].isna().all():
        return []
    better, worse = against[against["kl_high"] < 0], against[against["kl_low"] > 0]
    text = f"It is nearer than the logit lens at {len(better)} of {len(against)} layers"
    text += f", further away at {len(worse)}" if len(worse) else ""
    text += " (interval beside 0, without correction for their number)."
    same = against[against["kl"] == 0]["layer"]
    if len(same):
        text += f" Nothing was gained after layer {', '.join(map(str, same))}."
    return [Finding(text=text, numbers={"better": len(better), "layers": len(against)})]


def _constant(overall: pd.DataFrame) -> list[Finding]:
    """Where a lens is worse than a prediction that looks at nothing."""
    floor = overall[overall["lens"] == "constant"]["kl"].iloc[0]
    text = f"One constant prediction, the mean of the model's own, is {floor:.3f} nats away"
    numbers: dict[str, float] = {"constant": floor}
    for lens in ("logit", "tuned"):
        rows = overall[overall["lens"] == lens]
        behind = rows[rows["kl"] >= floor]["layer"]
        numbers[f"{lens}_behind"] = len(behind)
        after = f"no nearer after layer {', '.join(map(str, behind))}"
        text += f"; the {lens} lens is {after if len(behind) else 'nearer after every layer'}"
    return [Finding(text=text + ".", numbers=numbers)]


def _matrix(gained: pd.DataFrame) -> list[Finding]:
    """What the matrix adds to a shift."""
    rows = {other: gained[gained["against"] == other] for other in ("logit", "debiased")}
    best = rows["logit"].iloc[0]
    layer = int(best["layer"])
    if not best["kl"] < 0:
        return []
    row = rows["debiased"].set_index("layer").loc[[layer]].iloc[0]
    text = (
        f"There it is nearer by {_interval(row)} nats than a lens without a matrix, which adds the "
        "mean of what later layers add."
    )
    return [Finding(text=text, numbers={"layer": layer, "difference": row["kl"]})]


def _course(course: pd.DataFrame) -> list[Finding]:
    """How much the last stretch of the training still changed."""
    kl = course.pivot_table(index="step", columns="layer", values="kl")
    before, after = kl.iloc[-2], kl.iloc[-1]
    fall = ((before - after) / before.where(before > 0)).max()
    if pd.isna(fall):
        return []
    gain = f"by {fall:.1%} at most" if fall > 0 else "after no layer"
    text = (
        f"The last {kl.index[-1] - kl.index[-2]} of {kl.index[-1]} steps lowered the KL on the "
        f"documents of the choice {gain}."
    )
    return [Finding(text=text, numbers={"fall": fall})]
