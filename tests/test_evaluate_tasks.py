"""Harness tasks on the model in memory, offline: against log-likelihoods computed here."""

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch

import deviants_zoo
import moescope
from moescope.errors import MoEScopeError, OptionError

QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "green"], "answer": 0},
    {"question": "Two and two make", "choices": ["windows", "four"], "answer": 1},
    {"question": "def add(a, b):\n    return a", "choices": ["+ b", "Tuesday"], "answer": 0},
    {"question": "Water is made of hydrogen and", "choices": ["oxygen", "Napoleon"], "answer": 0},
    {"question": "The opposite of hot is", "choices": ["cold", "hot hot"], "answer": 0},
    {"question": "He opened the door and", "choices": ["purple", "went in"], "answer": 1},
]
TASK = """
task: small_questions
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{file}"}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
metadata:
  version: 2.0
"""


@pytest.fixture(scope="module")
def model():
    return moescope.load("tiny", dtype="float32")


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    path = tmp_path / "tasks" / "small_questions.yaml"
    path.parent.mkdir()
    path.write_text(TASK.format(file=file), encoding="utf-8")
    return path


@contextmanager
def upside_down(model):
    """Likely tokens become unlikely ones."""
    handle = model.model.lm_head.register_forward_hook(lambda _, __, logits: -logits)
    try:
        yield
    finally:
        handle.remove()


def right_answers(model):
    """Which questions have the greatest log-likelihood at the answer, one by one."""
    right = []
    for question in QUESTIONS:
        context = model.tokenizer(question["question"])["input_ids"]
        scores = []
        for choice in question["choices"]:
            whole = model.tokenizer(f"{question['question']} {choice}")["input_ids"]
            with torch.no_grad():
                logs = model.model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(
                sum(logs[p - 1, whole[p]].item() for p in range(len(context), len(whole)))
            )
        right.append(scores.index(max(scores)) == question["answer"])
    return right


def test_a_local_task_in_a_folder_with_and_without_an_intervention(model, task):
    before = model.fingerprint
    found = moescope.evaluate.tasks(model, ["small_questions"], include_path=task.parent)
    right = right_answers(model)
    assert found.columns.tolist() == (
        "task metric filter value standard_error n num_fewshot version seed".split()
    )
    row = found.iloc[0]
    assert (row.task, row.metric, row.n, row.num_fewshot) == ("small_questions", "acc", 6, 0)
    assert row.version == "2.0"
    assert row.value == pytest.approx(sum(right) / 6)
    assert row.standard_error > 0
    with upside_down(model):
        changed = moescope.evaluate.tasks(model, ["small_questions"], include_path=task.parent)
        wrong = right_answers(model)
    assert changed.iloc[0].value == pytest.approx(sum(wrong) / 6)
    assert sum(wrong) < sum(right)
    assert model.fingerprint == before


def test_a_task_file_with_solved_examples_and_a_limit(model, task):
    text = task.read_text(encoding="utf-8") + "fewshot_split: test\n"
    task.write_text(text, encoding="utf-8")
    state = torch.get_rng_state()
    found = moescope.evaluate.tasks(model, [task], num_fewshot=2, limit=3, seed=4)
    assert (found.n[0], found.num_fewshot[0], found.seed[0]) == (3, 2, 4)
    again = moescope.evaluate.tasks(model, [str(task)], num_fewshot=2, limit=3, seed=4)
    assert again.equals(found)
    assert torch.equal(torch.get_rng_state(), state)


def test_tasks_that_generate(model, task):
    text = task.read_text(encoding="utf-8").replace("multiple_choice", "generate_until")
    text = text.replace('doc_to_target: "{{answer}}"', 'doc_to_target: "{{choices[answer]}}"')
    text = text.replace('doc_to_choice: "{{choices}}"', "generation_kwargs: {max_gen_toks: 4}")
    task.write_text(text.replace("metric: acc", "metric: exact_match"), encoding="utf-8")
    found = moescope.evaluate.tasks(model, [task], limit=2)
    assert (found.metric[0], found.n[0]) == ("exact_match", 2)


def test_an_encoder_decoder(model, task):
    switch = moescope.load(deviants_zoo.switch(vocab_size=4096), tokenizer=model.tokenizer)
    found = moescope.evaluate.tasks(switch, [task])
    scores = []
    for question in QUESTIONS:
        context = model.tokenizer(question["question"], return_tensors="pt")["input_ids"]
        for choice in question["choices"]:
            answer = model.tokenizer(f" {choice}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scores.append(
                    -switch.model(input_ids=context, labels=answer).loss * answer.shape[1]
                )
    best = torch.stack(scores).view(-1, 2).argmax(1)
    expected = (best == torch.tensor([question["answer"] for question in QUESTIONS])).float().mean()
    assert found.value[0] == pytest.approx(expected.item())


def test_an_unknown_task_has_a_suggestion(model, task, monkeypatch):
    from lm_eval import tasks

    def few(include_path, include_defaults=True):
        """In place of the harness's own tasks, which take half a minute to read."""
        return OneTask()

    monkeypatch.setattr(tasks, "TaskManager", few)
    with pytest.raises(OptionError, match="Did you mean 'small_questions'"):
        moescope.evaluate.tasks(model, ["small_question"], include_path=task.parent)


class OneTask:
    task_index = MappingProxyType({"small_questions": None})
    all_tasks = ("small_questions",)


def test_without_a_tokenizer(model, task):
    with pytest.raises(OptionError, match="without a tokenizer"):
        moescope.evaluate.tasks(replace(model, tokenizer=None), [task])


def test_without_the_extra(model, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MoEScopeError, match=r"pip install 'moescope\[tasks\]'"):
        moescope.evaluate.tasks(model, ["hellaswag"])
