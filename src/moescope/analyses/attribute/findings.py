"""What the tables of `attribute` say in words."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from moescope.analyses.attribute.tables import mean_columns
from moescope.evaluate.totals import Resampling
from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.runs import Finding

_CLEAR = 0.05


def findings(tables: Mapping[str, pd.DataFrame], resampling: Resampling) -> list[Finding]:
    """From the tables by name."""
    experts, prompts = tables["attribute"], tables["prompts"]
    found = [_predictions(prompts, resampling)]
    if "parts" in tables:
        found += [_direct(experts), _parts(tables["parts"])]
    found.append(_ablation(experts))
    if "control_loss" in experts:
        found.append(_controls(experts))
    if experts["ablation_loss_p"].notna().any():
        found.append(_shuffled(experts))
    if "rank_correlation" in prompts:
        found += _agreement(prompts, resampling)
    if len(prompts) < FEWEST_UNITS and len(prompts) > 1:
        found.append(Finding(text=f"No intervals: too few prompts ({len(prompts)})."))
    return found


def _predictions(prompts: pd.DataFrame, resampling: Resampling) -> Finding:
    if len(prompts) == 1:
        row = prompts.iloc[0]
        text = (
            f"The model gives {row['answer']!r} a probability of {np.exp(-row['loss']):.3g}, rank "
            f"{row['rank']}; its most probable token is {row['best']!r}."
        )
        return Finding(text=text, numbers={"loss": row["loss"], "rank": row["rank"]})
    loss = mean_columns("loss", prompts["loss"].to_numpy(), resampling)
    first = float((prompts["rank"] == 1).mean())
    text = (
        f"Over {len(prompts)} prompts with {prompts['answer_id'].nunique()} different answers the "
        f"loss of the answer is {_said(loss, 'loss', '.3f')} nats; in {first:.0%} of them the "
        "answer is the most probable token."
    )
    return Finding(text=text, numbers={"loss": loss["loss"], "first": first})


def _direct(experts: pd.DataFrame) -> Finding:
    top = experts.iloc[experts["contribution"].argmax()]
    text = (
        f"By itself, {_name(top)} adds most to the logit of the answer: "
        f"{_said(top, 'contribution', '+.3f')}{_to_others(top, 'contribution')}."
    )
    return Finding(text=text, numbers=_numbers(top, "contribution"))


def _parts(parts: pd.DataFrame) -> Finding:
    sums = parts.groupby("part")["contribution"].sum()
    shared = f", shared experts {sums['shared']:+.3f}" if "shared" in sums else ""
    text = (
        f"Of the logit of the answer, {sums['logit']:+.3f} above the mean over the vocabulary, all "
        f"routed experts together give {sums['routed']:+.3f}{shared}, everything else "
        f"{sums['everything_else']:+.3f} (scale of the final norm fixed)."
    )
    return Finding(text=text, numbers={str(part): value for part, value in sums.items()})


def _ablation(experts: pd.DataFrame) -> Finding:
    top = experts.iloc[experts["ablation_loss"].argmax()]
    text = (
        f"Without {_name(top)} the loss of the answer rises most: by "
        f"{_said(top, 'ablation_loss', '+.3f')} nats{_to_others(top, 'ablation_loss')}; without "
        f"the median expert by {experts['ablation_loss'].median():+.3f}."
    )
    return Finding(text=text, numbers=_numbers(top, "ablation_loss"))


def _shuffled(experts: pd.DataFrame) -> Finding:
    said, numbers = [], {}
    for measure, name in (("contribution", "direct contribution"), ("ablation_loss", "ablation")):
        p = experts[f"{measure}_p_corrected"]
        if p.notna().any():
            clear = numbers[f"clear_{measure}"] = int((p <= _CLEAR).sum())
            said.append(f"{clear} of {len(p)} experts by {name}")
    text = (
        f"More for its own answer than for the answers of other prompts: {', '.join(said)} "
        "(shuffled answers, p <= 0.05 corrected for all experts)."
    )
    return Finding(text=text, numbers=numbers)


def _controls(experts: pd.DataFrame) -> Finding:
    top = experts.iloc[experts["ablation_loss"].argmax()]
    most = experts.iloc[(experts["ablation_loss"] - experts["control_loss"]).argmax()]
    text = (
        f"At {top['n_controls']} places of the captured text the same ablation raises the loss by "
        f"{_said(top, 'control_loss', '+.3f')} nats. "
    )
    if most.name == top.name:
        text += "Of no expert is the difference larger."
    else:
        text += (
            f"The difference is largest for {_name(most)}: "
            f"{_said(most, 'ablation_loss', '+.3f')} against {_said(most, 'control_loss', '+.3f')}."
        )
    return Finding(text=text, numbers={"control_loss": top["control_loss"]})


def _agreement(prompts: pd.DataFrame, resampling: Resampling) -> list[Finding]:
    found = prompts["rank_correlation"].dropna().to_numpy()
    if not len(found):
        return []
    mean = mean_columns("rank_correlation", found, resampling)
    said = _said(mean, "rank_correlation", ".2f")
    text = (
        f"The two measures order the experts that a prompt uses with a rank correlation of {said}"
    )
    text += f", mean over {len(found)} prompts." if len(found) > 1 else "."
    return [Finding(text=text, numbers={"rank_correlation": mean["rank_correlation"]})]


def _name(row: pd.Series) -> str:
    stack = "" if row["stack"] == "decoder" else "encoder "
    return f"expert {row['expert']} of {stack}layer {row['layer']}"


def _numbers(row: pd.Series, measure: str) -> dict[str, float | int | str]:
    return {
        "layer": int(row["layer"]),
        "expert": int(row["expert"]),
        measure: float(row[measure]),
    }


def _to_others(row: pd.Series, measure: str) -> str:
    """The same with shuffled answers, if there are several."""
    other = row[f"{measure}_shuffled"]
    return f", for the answers of other prompts {other:+.3f}" if np.isfinite(other) else ""


def _said(row: Mapping[str, float] | pd.Series, name: str, form: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    interval = f" (95% interval {low:{form}} to {high:{form}})" if np.isfinite(low) else ""
    return f"{row[name]:{form}}{interval}"
