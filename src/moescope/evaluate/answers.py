"""How well a model answers questions, and what interventions do to its answers."""

import math
from collections.abc import Iterator

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from scipy.special import ndtri
from scipy.stats import binomtest
from torch import Tensor

from moescope.corpora.corpus import RESERVED_DOMAIN
from moescope.corpora.questions import NO_TARGET, QuestionBatch, Questions
from moescope.errors import CorpusError
from moescope.evaluate.paired import BASELINE, Interventions, check_interventions
from moescope.evaluate.predictions import Targets, evaluating, losses
from moescope.evaluate.totals import Resampling, Totals, difference_columns, mean_columns
from moescope.measures.bootstrap import FEWEST_UNITS
from moescope.models.view import MoEModel
from moescope.progress import track

_NORMAL = float(ndtri(0.975))


def compare_answers(
    model: MoEModel,
    questions: Questions,
    interventions: Interventions,
    *,
    bootstrap: int = 1_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Answers with and without each intervention, on the same questions.

    One pass: each batch goes through the model as it is and then through every changed one.

    Args:
        model: Decoder-only or encoder-decoder; it is put into evaluation mode meanwhile.
        questions: The questions.
        interventions: What to compare with; each is entered once per batch.
        bootstrap: Resamples of questions behind each 95% interval of a loss.
        seed: Seed of the resamples.

    Returns:
        One row per intervention, the first of them "baseline": intervention, and the columns of
        `answer_columns`.

    Raises:
        CorpusError: The questions are text, and the model has no tokenizer; or one is longer than
            the model can read.
        OptionError: An intervention is called "baseline", or is itself a context manager.
    """
    check_interventions(interventions)
    totals = {name: Totals([RESERVED_DOMAIN]) for name in (BASELINE, *interventions)}
    with evaluating(model):
        for batch in track(answer_batches(model, questions), "answers: batches"):
            totals[BASELINE].add(*answered(model, batch))
            for name, intervention in interventions.items():
                with intervention():
                    totals[name].add(*answered(model, batch))
    found = {name: per_question(total) for name, total in totals.items()}
    resampling = Resampling(resamples=bootstrap, seed=seed)
    return pd.DataFrame(
        {"intervention": name} | answer_columns(changed, found[BASELINE], resampling)
        for name, changed in found.items()
    )


def answer_batches(model: MoEModel, questions: Questions) -> Iterator[QuestionBatch]:
    """Questions as a model reads them.

    Raises:
        CorpusError: The questions are text, and the model has no tokenizer; or one is longer than
            the model can read.
    """
    most = model.context_length
    for batch in questions.batches(model.tokenizer, decoder_start=decoder_start(model)):
        for read in (batch.attention_mask, batch.targets):
            if most is not None and read.shape[1] > most:
                raise CorpusError(
                    f"a question with its answer is longer than the model {model.name!r} can read",
                    got=f"{read.shape[1]:,} tokens among questions {batch.first + 1} to "
                    f"{batch.first + len(read)}",
                    expected=f"at most {most:,}",
                    remedy="Leave the longest questions out",
                )
        yield batch


def decoder_start(model: MoEModel) -> int | None:
    """The token that the decoder of an encoder-decoder begins with; None without one."""
    config = model.model.config
    return int(config.decoder_start_token_id) if config.is_encoder_decoder else None


def answered(model: MoEModel, batch: QuestionBatch) -> tuple[Targets, dict[str, Tensor]]:
    """Run a batch: at each token of an answer its loss in nats, and whether arg-max is wrong."""
    logits = answer_logits(model, batch)
    targets = answer_targets(batch, logits.device)
    return targets, {"loss": losses(logits, targets), "wrong": wrong(logits, targets)}


def answer_logits(model: MoEModel, batch: QuestionBatch) -> Float[Tensor, "positions vocabulary"]:
    """Logits at all positions of what the (decoder of the) model reads."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.decoder_input_ids is not None:
        inputs["decoder_input_ids"] = batch.decoder_input_ids
    placed = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    logits: Tensor = model.model(**placed, use_cache=False).logits
    return logits.flatten(0, 1)


def answer_targets(batch: QuestionBatch, device: torch.device) -> Targets:
    """The tokens of the answers, each with the number of its question."""
    rows, positions = (batch.targets != NO_TARGET).nonzero(as_tuple=True)
    return Targets(
        positions=(rows * batch.targets.shape[1] + positions).to(device),
        ids=batch.targets[rows, positions].to(device),
        documents=batch.first + rows,
        domains=torch.zeros_like(rows),
    )


def wrong(
    logits: Float[Tensor, "positions vocabulary"], targets: Targets
) -> Bool[Tensor, " counted"]:
    """Whether another token than the target is the most probable one."""
    chosen: Int64[Tensor, " counted"] = logits[targets.positions].argmax(-1)
    return chosen != targets.ids


def per_question(total: Totals) -> pd.DataFrame:
    """One row per question: loss of the whole answer in nats, and whether it is exact.

    Exact: the most probable token is the right one at every position of the answer, given what
    stands before it. So greedy decoding would give this answer.
    """
    _, sums = next(total.by_domain())
    return pd.DataFrame({"loss": sums["loss"], "exact": sums["wrong"] == 0})


def answer_columns(
    changed: pd.DataFrame, baseline: pd.DataFrame, resampling: Resampling
) -> dict[str, object]:
    """What a change does to the answers; questions are the units of all intervals.

    Args:
        changed: `per_question` of the changed model.
        baseline: The same of the model as it is.
        resampling: How intervals of losses are drawn.

    Returns:
        accuracy, the share of exact answers, with 95% limits (Wilson 1927); accuracy_difference
        from the baseline with 95% limits of paired shares (Agresti and Min 2005); loss, the mean
        over questions of the loss of the whole answer, and loss_difference, with bootstrap limits
        (NaN under 30 questions); n_questions, status, seed.
    """
    questions = len(changed)
    exact, before = changed["exact"], baseline["exact"]
    share = binomtest(int(exact.sum()), questions).proportion_ci(method="wilson")
    frame = pd.DataFrame({"tokens": 1.0, "loss": changed["loss"]})
    frame["loss_difference"] = changed["loss"] - baseline["loss"]
    return {
        "accuracy": float(exact.mean()),
        "accuracy_low": float(share.low),
        "accuracy_high": float(share.high),
        **_share_difference(int((exact & ~before).sum()), int((~exact & before).sum()), questions),
        **mean_columns(frame, ["loss"], resampling),
        **difference_columns(frame, "loss_difference", resampling),
        "n_questions": questions,
        "status": "ok" if questions >= FEWEST_UNITS else "few_questions",
        "seed": resampling.seed,
    }


def _share_difference(gained: int, lost: int, number: int) -> dict[str, float]:
    """Difference of two shares of the same units, with 95% limits that hold for rare changes too.

    The normal interval after adding a half to each of the four cells: also where nothing changed,
    so few units are seen to be few.
    """
    total = number + 2
    middle = (gained - lost) / total
    reach = _NORMAL * math.sqrt((gained + lost + 1) / total - middle**2) / math.sqrt(total)
    return {
        "accuracy_difference": (gained - lost) / number,
        "accuracy_difference_low": middle - reach,
        "accuracy_difference_high": middle + reach,
    }
