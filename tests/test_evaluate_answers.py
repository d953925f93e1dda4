from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm

import deviants_zoo
import models_zoo
from moescope.corpora.questions import Questions
from moescope.errors import OptionError
from moescope.evaluate.answers import answer_columns, compare_answers
from moescope.evaluate.totals import Resampling
from moescope.interventions.choice import set_top_k
from moescope.models.load import load

RESAMPLING = Resampling(resamples=200, seed=0)


def asked(number, seed=0, longest=6):
    random = np.random.default_rng(seed)
    return [
        (
            random.integers(3, 97, random.integers(1, longest)).tolist(),
            random.integers(3, 97, random.integers(1, 4)).tolist(),
        )
        for _ in range(number)
    ]


def decoder():
    return load(models_zoo.build("mixtral"))


def encoder_decoder():
    return load(deviants_zoo.switch(expert_capacity=64))


@torch.no_grad()
def one_by_one(model, pair):
    """Loss and exactness of one answer, straight from the definition, without padding."""
    question, answer = pair
    if model.model.config.is_encoder_decoder:
        decoded = torch.tensor([[0, *answer[:-1]]])
        output = model.model(input_ids=torch.tensor([question]), decoder_input_ids=decoded)
        logs = output.logits[0].double().log_softmax(-1)
    else:
        output = model.model(input_ids=torch.tensor([[*question, *answer]]))
        logs = output.logits[0, len(question) - 1 : -1].double().log_softmax(-1)
    loss = -sum(logs[p, token].item() for p, token in enumerate(answer))
    return loss, logs.argmax(-1).tolist() == answer


@pytest.mark.parametrize("build", [decoder, encoder_decoder])
def test_losses_and_exact_answers_are_those_of_the_definition(build):
    model = build()
    pairs = asked(40)
    # Some answers that the model itself would give, or nearly all would be wrong.
    pairs[:15] = [(question, greedy(model, question)) for question, _ in pairs[:15]]
    change = {"fewer": lambda: set_top_k(model.layers, 0)}
    table = compare_answers(model, Questions.from_token_ids(pairs), change).set_index(
        "intervention"
    )
    found = [one_by_one(model, pair) for pair in pairs]
    with set_top_k(model.layers, 0):
        changed = [one_by_one(model, pair) for pair in pairs]
    for name, expected in (("baseline", found), ("fewer", changed)):
        losses, exact = zip(*expected, strict=True)
        assert table.loss[name] == pytest.approx(np.mean(losses), rel=1e-5)
        assert table.accuracy[name] == np.mean(exact)
    assert table.accuracy["baseline"] >= 15 / 40
    assert table.accuracy["fewer"] < table.accuracy["baseline"]
    differences = [c - f for (c, _), (f, _) in zip(changed, found, strict=True)]
    assert table.loss_difference["fewer"] == pytest.approx(np.mean(differences), rel=1e-4)
    assert table.loss_difference_low["fewer"] < np.mean(differences)
    assert table.status.tolist() == ["ok", "ok"]


@torch.no_grad()
def greedy(model, question):
    """Two tokens, one after the other."""
    if model.model.config.is_encoder_decoder:
        decoded = [0]
        for _ in range(2):
            output = model.model(
                torch.tensor([question]), decoder_input_ids=torch.tensor([decoded])
            )
            decoded.append(int(output.logits[0, -1].argmax()))
        return decoded[1:]
    ids = list(question)
    for _ in range(2):
        ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-2:]


def test_each_question_goes_once_through_each_model():
    model = decoder()
    passes = []
    handle = model.model.register_forward_hook(lambda *_: passes.append(1))
    changes = dict.fromkeys(("one", "two"), nullcontext)
    table = compare_answers(model, Questions.from_token_ids(asked(70)), changes)
    handle.remove()
    assert len(passes) == 3 * 3  # three batches, three models
    assert (table.loss_difference == 0).all()
    with pytest.raises(OptionError, match="baseline"):
        compare_answers(model, Questions.from_token_ids(asked(3)), {"baseline": nullcontext})


def per_question(exact, losses=None):
    exact = np.asarray(exact)
    return pd.DataFrame({"loss": np.ones(len(exact)) if losses is None else losses, "exact": exact})


def test_the_difference_of_accuracies_by_hand():
    before = per_question([True] * 60 + [False] * 40)
    after = per_question([True] * 54 + [False] * 6 + [True] * 2 + [False] * 38)
    found = answer_columns(after, before, RESAMPLING)
    assert found["accuracy_difference"] == pytest.approx(-0.04)
    # Agresti and Min: 2.5 gained and 6.5 lost of 102.
    middle = (2.5 - 6.5) / 102
    error = np.sqrt((2.5 + 6.5) / 102 - middle**2) / np.sqrt(102)
    reach = norm.ppf(0.975) * error
    limits = found["accuracy_difference_low"], found["accuracy_difference_high"]
    assert limits == pytest.approx((middle - reach, middle + reach))
    assert found["accuracy_low"] < 0.56 < found["accuracy_high"]


def test_nothing_changed_on_few_questions_is_not_certain():
    few, many = (per_question([True] * number) for number in (10, 1_000))
    short, long = (answer_columns(frame, frame, RESAMPLING) for frame in (few, many))
    assert short["accuracy_difference_high"] > 0.1
    assert 0 < long["accuracy_difference_high"] < 0.003
    assert short["status"] == "few_questions"
    assert np.isnan(short["loss_difference_low"])
    assert long["loss_difference_high"] == 0


def test_intervals_of_differences_cover():
    random = np.random.default_rng(0)
    hits = {"accuracy": 0, "loss": 0}
    for _ in range(300):
        before = random.random(60) < 0.7
        after = np.where(random.random(60) < 0.15, random.random(60) < 0.5, before)
        losses = random.exponential(1, 60)
        moved = losses + random.exponential(0.5, 60)
        found = answer_columns(per_question(after, moved), per_question(before, losses), RESAMPLING)
        for name, true in (("accuracy", 0.15 * (0.5 - 0.7)), ("loss", 0.5)):
            low, high = (found[f"{name}_difference_{end}"] for end in ("low", "high"))
            hits[name] += low <= true <= high
    assert all(0.92 <= hit / 300 <= 0.985 for hit in hits.values()), hits
