import pytest

import moescope
from captures_zoo import corpus, model
from moescope.analyses.material import Material
from moescope.errors import CaptureError
from moescope.scheduler import study


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    moescope.capture(model(), corpus(), run, record=("routing",))
    return run


def rows(text):
    return [row for batch in text.batches(None) for row in batch.input_ids.tolist()]


def test_a_given_corpus_is_the_text(captured):
    text = Material(captured, corpus=corpus()).text(10_000)
    assert rows(text) == rows(corpus())


def test_the_text_ends_where_it_is_told_to(captured):
    text = Material(captured, corpus=corpus()).text(40)
    assert rows(text) == rows(corpus(max_tokens=40))
    assert 3 <= len(rows(text)) < len(rows(corpus()))


def test_a_text_that_ended_before_is_not_longer(tmp_path):
    short = corpus(max_tokens=40)
    moescope.capture(model(), short, tmp_path, record=("routing",))
    assert rows(Material(tmp_path, corpus=short).text(10_000)) == rows(short)


@pytest.mark.parametrize(
    ("other", "got"),
    [(corpus(seed=1), "other content in long, short"), (corpus(rows=2), "another packing")],
)
def test_another_corpus_is_refused(captured, other, got):
    with pytest.raises(CaptureError, match=got):
        Material(captured, corpus=other).text(10_000)


def test_a_study_hands_its_text_on(tmp_path):
    (tmp_path / "a.txt").write_text("one two three " * 400, encoding="utf-8")
    config = {
        "corpus": {"a": f"{tmp_path / 'a.txt'}:paragraphs"},
        "packing": {"length": 32, "max_tokens": 200},
        "analyses": {"topk": {"k": (1,), "bootstrap": 10}},
    }
    run = study(moescope.load("tiny"), tmp_path / "run", config)
    assert run.result("topk").table["n_tokens"].max() > 0
