"""What the tables of `health` say in words."""

from typing import Any

import pandas as pd

from moescope.analyses.health.checks import CANNOT_TELL, CHECKS, SIGN
from moescope.runs import Finding

NO_LOSS = (
    "No loss was recorded, so best- and worst-predicted tokens are not compared: an "
    "encoder-decoder has no loss of plain text; for other models, capture token_loss too."
)


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """One sentence about each check, then about switch rates and margins."""
    rows = tables["health"]
    found = [
        _of_check(rows[rows["check"] == check]) for check in CHECKS if check in set(rows["check"])
    ]
    if "loss" not in tables:
        found.append(Finding(text=NO_LOSS))
    return [*found, *_along(tables["layers"])]


def _place(row: "pd.Series[Any]") -> str:
    return f"layer {row['layer']}" + (" of the encoder" if row["stack"] == "encoder" else "")


def _of_check(rows: pd.DataFrame) -> Finding:
    name, total = str(rows["check"].iloc[0]), len(rows)
    signs, unknown = (int((rows["state"] == state).sum()) for state in (SIGN, CANNOT_TELL))
    numbers: dict[str, float | int | str] = {
        "check": name,
        "signs": signs,
        "cannot_tell": unknown,
        "layers": total,
    }
    heading = name.capitalize()
    if signs:
        seen = rows[rows["state"] == SIGN]
        shown = seen.iloc[int((seen["value"] - seen["reference"]).abs().argmax())]
        text = f"{heading}: a sign in {signs} of {total} layers. In {_place(shown)}: " + (
            f"{shown['verdict'].partition(': ')[2]}."
        )
    elif unknown == total:
        text = f"{heading}: cannot tell; {rows['verdict'].iloc[0].partition(': ')[2]}."
    else:
        values = rows["value"].dropna()
        text = (
            f"{heading}: no sign in {total - unknown} of {total} layers "
            f"({rows['measure'].iloc[0]}: {values.min():.3g} to {values.max():.3g}; "
            f"{rows['n_documents'].max()} documents)."
        )
    if 0 < unknown < total:
        text += f" No verdict in {unknown} layers."
    return Finding(text=text, numbers=numbers)


def _along(layers: pd.DataFrame) -> list[Finding]:
    chosen = layers[layers["num_experts"] > layers["top_k"]]
    if chosen.empty:
        return []
    stays = 1 - chosen["switch_rate"]
    top = chosen.iloc[int((stays - (1 - chosen["switch_shuffled"])).argmax())]
    least = chosen.iloc[int(chosen["margin_p50"].argmin())]
    return [
        Finding(
            text=f"The next token uses other experts for {top['switch_rate']:.1%} of them in "
            f"{_place(top)}{_limits(top, 'switch', '.1%')}, {top['switch_shuffled']:.1%} in "
            f"shuffled passages and {top['switch_independent']:.1%} if tokens were independent: "
            f"the layer where neighbours are most alike ({top['n_tokens']:,} tokens of "
            f"{top['n_documents']} documents).",
            numbers={
                "layer": int(top["layer"]),
                "switch_rate": float(top["switch_rate"]),
                "switch_shuffled": float(top["switch_shuffled"]),
            },
        ),
        Finding(
            text=f"The router is least decided in {_place(least)}: half of the tokens have a "
            f"margin under {least['margin_p50']:.3g} between the last logit chosen and the "
            f"first that is not; mean {least['margin']:.3g}{_limits(least, 'margin', '.3g')}.",
            numbers={"layer": int(least["layer"]), "margin_p50": float(least["margin_p50"])},
        ),
    ]


def _limits(row: "pd.Series[Any]", name: str, number: str) -> str:
    """The 95% interval in brackets, if there is one."""
    low, high = float(row[f"{name}_low"]), float(row[f"{name}_high"])
    return f" ({low:{number}} to {high:{number}})" if low == low else ""
