"""The shipped encoder-decoder: small, balanced, and right about as often as its card says."""

from importlib.resources import files

import pandas as pd
import pytest
import torch

import moescope
from moescope.models.conformance import conformance
from moescope.models.observe import observe

FOLDER = files("moescope") / "models" / "reference" / "tiny-switch"
QUESTIONS = files("moescope") / "corpora" / "builtin_questions" / "banking77.csv"
EVERY = 10  # of the questions of the test split, one is read
ACCURACY, NATS = 0.9058, 0.1308  # on these 308: exact answers, nats per token of the answers


@pytest.fixture(scope="module")
def model():
    return moescope.load("tiny-switch")


@pytest.fixture(scope="module")
def asked():
    return pd.read_csv(QUESTIONS, keep_default_na=False)[::EVERY]


@pytest.fixture(scope="module")
def logits_and_answers(model, asked):
    """[questions, answer length, vocabulary] with the answers so far given, and the answers."""
    questions = model.tokenizer(asked.question.tolist(), padding=True, return_tensors="pt")
    answers = model.tokenizer(asked.answer.tolist(), padding=True, return_tensors="pt").input_ids
    start = torch.full_like(answers[:, :1], model.model.config.decoder_start_token_id)
    with torch.no_grad():
        logits = model.model(
            input_ids=questions.input_ids,
            attention_mask=questions.attention_mask,
            decoder_input_ids=torch.cat([start, answers[:, :-1]], dim=1),
        ).logits
    return logits.float(), answers


def exact(logits, answers):
    return ((logits.argmax(-1) == answers) | (answers == 0)).all(1)


def test_it_is_small_and_holds_no_pickle():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(sizes.values()) <= 10_000_000
    assert set(sizes) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_its_layers_are_sparse_and_conform(model):
    stacks = [(layer.stack, layer.index, layer.num_experts, layer.top_k) for layer in model.layers]
    encoder = [("encoder", i, 8, 1) for i in range(6)]
    assert stacks == encoder + [("decoder", i, 8, 1) for i in range(3)]
    assert model.dtype == torch.bfloat16
    ids = torch.randint(18, 3_072, (4, 40), generator=torch.Generator().manual_seed(1))
    assert conformance(model, ids).passed.all()


def test_it_answers_as_often_and_as_surely_as_it_did(logits_and_answers):
    logits, answers = logits_and_answers
    assert exact(logits, answers).double().mean().item() == pytest.approx(ACCURACY, abs=0.007)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), answers.flatten(), ignore_index=0
    )
    assert loss.item() == pytest.approx(NATS, abs=0.01)


def test_what_it_generates_is_the_answer_where_every_token_is_the_likeliest(
    model, asked, logits_and_answers
):
    right = exact(*logits_and_answers)[:12].tolist()
    some = asked[:12]
    assert 6 <= sum(right) < 12
    questions = model.tokenizer(some.question.tolist(), padding=True, return_tensors="pt")
    written = model.model.generate(**questions, max_new_tokens=16, do_sample=False)
    texts = model.tokenizer.batch_decode(written, skip_special_tokens=True)
    assert [text == answer for text, answer in zip(texts, some.answer, strict=True)] == right


def test_no_expert_is_idle_and_no_token_dropped(model, asked):
    counts = {}

    def count(observation):
        layer = observation.layer
        assert (observation.routing.experts >= 0).all()
        chosen = observation.routing.experts.flatten()
        counts[layer.stack, layer.index] = torch.bincount(chosen, minlength=8)

    questions = model.tokenizer(asked.question.tolist(), padding=True, return_tensors="pt")
    with torch.no_grad(), observe(model.layers, count):
        model.forward(questions.input_ids, questions.attention_mask)
    for place in [("encoder", i) for i in range(6)]:
        shares = counts[place] / counts[place].sum()
        assert shares.min() > 0.01, place
