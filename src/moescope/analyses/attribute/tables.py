"""Tables of `attribute`: per expert, per part of the model, per prompt."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int64
from scipy.stats import spearmanr

from moescope.analyses.attribute.direct import Contributions
from moescope.analyses.attribute.passes import PromptBatch
from moescope.analyses.attribute.prompts import Prompt
from moescope.evaluate.totals import Resampling, difference_columns
from moescope.interventions.functions import Expert
from moescope.measures.attribution import shuffle_p_values, shuffled_means
from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.models.view import MoEModel

MEASURES = ("contribution", "ablation_loss")
_SHOWN = 80  # characters of a prompt, from its end


def mean_columns(
    name: str, values: Float[np.ndarray, " prompts"], resampling: Resampling
) -> dict[str, float]:
    """Mean over prompts with its 95% limits, NaN under 30 of them."""
    prompts = pd.DataFrame({name: values, "tokens": 1})
    return difference_columns(prompts, name, resampling)


class Gathered:
    """Measures of every expert, as they come in.

    Args:
        columns: Column of the answer of each prompt.
        shuffled: The same with the answers shuffled between the prompts, again and again.
        resampling: How intervals are drawn.
    """

    def __init__(
        self,
        columns: Int64[np.ndarray, " prompts"],
        shuffled: Int64[np.ndarray, "draws prompts"],
        resampling: Resampling,
    ) -> None:
        self.columns = columns
        self.own: dict[str, list[np.ndarray]] = {measure: [] for measure in MEASURES}
        """By measure and expert: of each prompt with its own answer."""
        self._drawn: dict[str, list[np.ndarray]] = {measure: [] for measure in MEASURES}
        self._rows: list[dict[str, object]] = []
        self._shuffled = shuffled
        self._resampling = resampling

    def add(
        self,
        expert: Expert,
        measures: Mapping[str, Float[np.ndarray, "prompts answers"]],
        n_using: int,
    ) -> None:
        """Add an expert: its measures for every prompt with every answer, and who uses it."""
        row: dict[str, object] = {"stack": expert[0].stack, "layer": expert[0].index}
        row |= {"expert": expert[1]}
        prompts = np.arange(len(self.columns))
        for name, values in measures.items():
            own = values[prompts, self.columns]
            row |= mean_columns(name, own, self._resampling)
            row |= {f"{name}_shuffled": float(values[:, self.columns].mean())}
            self.own[name].append(own)
            self._drawn[name].append(shuffled_means(values, self._shuffled))
        self._rows.append(row | {"n_using": n_using})

    def table(self) -> pd.DataFrame:
        """One row per expert."""
        frame = pd.DataFrame(self._rows)
        for name in MEASURES:
            if not self.own[name]:
                blank = [name, f"{name}_low", f"{name}_high", f"{name}_shuffled"]
                frame[[*blank, f"{name}_p", f"{name}_p_corrected"]] = np.nan
                continue
            observed, drawn = np.array(self.own[name]).mean(1), np.array(self._drawn[name])
            p = shuffle_p_values(observed, drawn)
            frame[f"{name}_p"], frame[f"{name}_p_corrected"] = p
            if len(set(self.columns.tolist())) == 1:  # nothing to be shuffled
                frame[[f"{name}_shuffled", f"{name}_p", f"{name}_p_corrected"]] = np.nan
        prompts = len(self.columns)
        status = "ok" if prompts >= FEWEST_UNITS else "few_prompts"
        return frame.assign(n_prompts=prompts, status=status, seed=self._resampling.seed)


def agreements(gathered: Gathered, used: Bool[np.ndarray, "experts prompts"]) -> pd.DataFrame:
    """Per prompt: Spearman's rank correlation of the two measures over the experts it uses."""
    direct, ablated = (np.array(gathered.own[name]) for name in MEASURES)
    rows = []
    for prompt in range(len(gathered.columns)):
        mine = used[:, prompt]
        varied = all(len(set(values[mine, prompt])) > 1 for values in (direct, ablated))
        found = spearmanr(direct[mine, prompt], ablated[mine, prompt])[0] if varied else np.nan
        rows.append({"rank_correlation": float(found), "n_experts": int(mine.sum())})
    return pd.DataFrame(rows)


def parts_table(
    direct: Contributions, columns: Int64[np.ndarray, " prompts"], resampling: Resampling
) -> pd.DataFrame:
    """What parts of the model add to the logit of the answer, on average; they add up to it.

    Returns:
        stack, layer, part (`routed`, `shared`), of every sparse layer from which anything arrives
        directly; then `everything_else`, and `logit`, their sum.
    """
    prompts = np.arange(len(columns))
    whole = direct.whole.numpy()[prompts, columns]
    rest = whole.astype(float)
    rows = []
    for layer, added in direct.routed.items():
        parts = {"routed": added.logits.sum(1)}
        if layer in direct.shared:
            parts["shared"] = direct.shared[layer]
        for part, logits in parts.items():
            own = logits.double().numpy()[prompts, columns]
            rest = rest - own
            row = {"stack": layer.stack, "layer": layer.index, "part": part}
            rows.append(row | mean_columns("contribution", own, resampling))
    for part, own in (("everything_else", rest), ("logit", whole)):
        rows.append({"part": part} | mean_columns("contribution", own, resampling))
    return pd.DataFrame(rows).astype({"layer": "Int64"}).assign(n_prompts=len(columns))


def predictions(
    model: MoEModel, batches: Sequence[PromptBatch], prompts: Sequence[Prompt]
) -> pd.DataFrame:
    """What the model as it is says to each prompt; fills in answers that were not given."""
    rows: list[dict[str, object]] = [{} for _ in prompts]
    for batch in batches:
        logs = batch.run(model).double().log_softmax(-1).cpu()
        for number, log in zip(batch.numbers.tolist(), logs, strict=True):
            best = int(log.argmax())
            given = prompts[number].answer
            answer = best if given is None else given
            rows[number] = {
                "name": prompts[number].name,
                "prompt": _text(model, prompts[number].ids)[-_SHOWN:],
                "answer": _text(model, [answer]),
                "answer_id": answer,
                "loss": -float(log[answer]),
                "rank": int((log > log[answer]).sum()) + 1,
                "best": _text(model, [best]),
            }
    return pd.DataFrame(rows)


def _text(model: MoEModel, ids: list[int]) -> str:
    """Of tokens; their numbers where the model has no tokenizer."""
    if model.tokenizer is None:
        return " ".join(map(str, ids))
    return str(model.tokenizer.decode(ids))
