import pytest

import deviants_zoo
import moescope
from moescope.analyses.registry import find
from moescope.config import build
from moescope.errors import CaptureError, OptionError
from moescope.models.load import load
from moescope.scheduler import plan

CONFIG = {
    "packing": {"max_tokens": 8_000},
    "capture": {"tokens": 2_048, "tokens_per_expert": 500},
    "analyses": {"routing": {"permutations": 20}},
}


@pytest.fixture(scope="module")
def tiny():
    return moescope.load("tiny")


def test_a_study_captures_what_is_needed_and_resumes(tiny, tmp_path, monkeypatch):
    planned = plan(tiny, tmp_path, CONFIG)
    assert dict(planned.steps) == {"capture": "to do", "routing": "to do"}
    assert planned.record == ("routing",)
    assert not any(tmp_path.iterdir())

    run = moescope.study(tiny, tmp_path, CONFIG)
    assert run.results() == ["routing"]
    capture = moescope.Capture(run)
    assert capture.recorded == ["routing"]
    assert dict(plan(tiny, tmp_path, CONFIG).steps) == {"capture": "done", "routing": "done"}
    used = sum(path.stat().st_size for path in run.capture_folder.iterdir())
    assert used <= 1.2 * planned.disk_bytes

    before = (run.results_folder / "routing.json").stat().st_mtime_ns
    moescope.study(tiny, tmp_path, CONFIG)
    assert (run.results_folder / "routing.json").stat().st_mtime_ns == before
    other = CONFIG | {"analyses": {"routing": {"permutations": 21}}}
    moescope.study(tiny, tmp_path, other)
    assert (run.results_folder / "routing.json").stat().st_mtime_ns > before


def test_the_union_of_needs_is_recorded(tiny, tmp_path):
    config = CONFIG | {"analyses": {"routing": {}, "align": {"source": 1, "target": 2}}}
    planned = plan(tiny, tmp_path, config)
    assert planned.record == ("inputs", "routing")
    assert set(planned.seconds) == {"capture", "align"}
    # Half the sources, half the time; the other direction costs the same.
    half = config["analyses"]["align"] | {"source_experts": (0, 1, 2, 3)}
    entry = find("align")
    works = [
        entry.work(tiny, build(entry.options, o, "align"))
        for o in (half, {"source": 2, "target": 1})
    ]
    assert works[1] == 2 * works[0]
    assert "align: to do, about" in str(planned)


def test_a_capture_of_another_text_is_not_replaced(tiny, tmp_path):
    moescope.study(tiny, tmp_path, CONFIG)
    with pytest.raises(CaptureError, match="max_tokens"):
        moescope.study(tiny, tmp_path, CONFIG | {"packing": {"max_tokens": 9_000}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"analysis": {}}, "Did you mean 'analyses'"),
        ({"analyses": {"alin": {}}}, "Did you mean 'align'"),
        ({"analyses": {"align": {"source": 1}}}, "pairs of layers.*1 and 0 layers"),
        ({"capture": {"tokens": -1}}, "too small"),
    ],
)
def test_a_bad_study_is_refused_before_anything_is_computed(tiny, tmp_path, config, message):
    with pytest.raises(OptionError, match=message):
        moescope.study(tiny, tmp_path, config)
    assert not any(tmp_path.iterdir())


def test_losses_are_not_asked_of_an_encoder_decoder(tiny, tmp_path):
    tokenizer = tiny.tokenizer
    model = load(deviants_zoo.switch(vocab_size=len(tokenizer)), tokenizer=tokenizer)
    config = CONFIG | {"packing": {"max_tokens": 2_000}, "analyses": {"health": {}}}
    planned = plan(model, tmp_path, config)
    assert planned.record == ("routing",)
    assert planned.seconds["capture"] > 0
    assert plan(tiny, tmp_path, config).record == ("routing", "token_loss")
