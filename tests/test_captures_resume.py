import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import captures_zoo as zoo
from moescope.captures import compact, record, recorder, shards
from moescope.captures.partial import PARTIAL, Partial
from moescope.captures.read import Capture
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Packing
from moescope.errors import CaptureError, MoEScopeError
from moescope.models.load import load


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Last bits depend on the number of threads; the process that is killed has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return zoo.model()


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    return zoo.contents(zoo.record(tmp_path_factory.mktemp("run"), model).folder)


def interrupt(monkeypatch, owner, name, after, *, before_it_runs):
    """Let the call number `after` of a function end the program."""
    original, calls = getattr(owner, name), 0

    def interrupted(*arguments, **options):
        nonlocal calls
        calls += 1
        if before_it_runs and calls == after:
            raise KeyboardInterrupt
        result = original(*arguments, **options)
        if calls == after:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)


MOMENTS = [
    (record, "_forward", 1),
    (record, "_forward", 5),
    (recorder, "write_shard", 1),
    (recorder, "write_shard", 5),
    (recorder, "write_shard", 8),
    (Partial, "commit", 1),
    (Partial, "commit", 3),
    (compact, "write_shard", 1),
    (compact, "write_shard", 2),
    (Partial, "finish", 1),
]


@pytest.mark.parametrize("before_it_runs", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name", "after"), MOMENTS, ids=lambda value: str(value)[-30:])
def test_interrupted_anywhere_it_ends_with_the_same_bytes(
    model, undisturbed, tmp_path, monkeypatch, owner, name, after, before_it_runs
):
    with monkeypatch.context() as patched:
        interrupt(patched, owner, name, after, before_it_runs=before_it_runs)
        with pytest.raises(KeyboardInterrupt):
            zoo.record(tmp_path, model)
    if (name, before_it_runs) != ("finish", False):
        with pytest.raises(CaptureError, match=r"holds (an unfinished|no) capture"):
            Capture(tmp_path)
    zoo.record(tmp_path, model)
    assert zoo.contents(tmp_path / "capture") == undisturbed


def test_it_does_not_begin_again(model, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt(patched, Partial, "commit", 3, before_it_runs=False)
        with pytest.raises(KeyboardInterrupt):
            zoo.record(tmp_path, model)
    progress = json.loads((tmp_path / "capture" / PARTIAL / "progress.json").read_text())
    done, rows = progress["groups"][-1]["rows"], []
    forward = record._forward

    def counted(plan, batch, to):
        rows.append(batch.first_row)
        forward(plan, batch, to)

    monkeypatch.setattr(record, "_forward", counted)
    zoo.record(tmp_path, model)
    assert rows[0] == done > 0


def test_interrupted_many_times_with_files_of_candidates(model, undisturbed, tmp_path, monkeypatch):
    """Thresholds are found anew after each interruption; the sample does not notice."""
    monkeypatch.setattr(recorder, "SPILL_BYTES", 1)
    for _ in range(4):
        with monkeypatch.context() as patched:
            interrupt(patched, Partial, "commit", 1, before_it_runs=False)
            with pytest.raises(KeyboardInterrupt):
                zoo.record(tmp_path, model)
    zoo.record(tmp_path, model)
    assert zoo.contents(tmp_path / "capture") == undisturbed


def test_samples_in_several_shards_do_not_depend_on_the_files_of_candidates(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(compact, "SHARD_BYTES", 10_000)
    one = zoo.record(tmp_path / "one", model, tokens_per_expert=200)
    monkeypatch.setattr(recorder, "SPILL_BYTES", 1)
    two = zoo.record(tmp_path / "two", model, tokens_per_expert=200)
    names = [entry["file"] for entry in one.manifest["shards"] if entry["kind"] == "sample"]
    assert "sample-001-00002.safetensors" in names
    assert zoo.contents(one.folder) == zoo.contents(two.folder)


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import captures_zoo as zoo
from moescope.captures import recorder
write, calls = recorder.write_shard, 0
def killed(*arguments, **options):
    global calls
    calls += 1
    if calls == 6:
        folder = arguments[0]
        (folder / f".{arguments[1]}.partial").write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments, **options)
recorder.write_shard = killed
zoo.record(sys.argv[2])
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_then_the_same_bytes(model, undisturbed, tmp_path):
    """In a process of its own; half a shard is left under its temporary name."""
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    assert list((tmp_path / "capture").rglob(".*.partial"))
    zoo.record(tmp_path, model)
    assert zoo.contents(tmp_path / "capture") == undisturbed


def test_a_full_disk_is_said_so_and_what_is_done_is_kept(model, undisturbed, tmp_path, monkeypatch):
    write, calls = Path.write_bytes, 0

    def full(path, data):
        nonlocal calls
        calls += 1
        if calls == 4:
            write(path, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(MoEScopeError, match=r"disk is full.*safetensors was not written"):
            zoo.record(tmp_path, model)
    zoo.record(tmp_path, model)
    assert zoo.contents(tmp_path / "capture") == undisturbed


def test_a_complete_capture_is_opened_without_reading_the_corpus(model, tmp_path, monkeypatch):
    zoo.record(tmp_path, model)
    monkeypatch.setattr(Corpus, "batches", None)
    (tmp_path / "capture" / PARTIAL).mkdir()  # as if killed between manifest and tidying up
    again = zoo.record(tmp_path, model)
    assert again.num_tokens > 0
    assert not (tmp_path / "capture" / PARTIAL).exists()


CHANGES = [
    ({"tokens": 61}, "options.tokens: 60 in the folder, 61 asked for"),
    ({"record": ("inputs",)}, "options.record"),
    ({"layers": (1,)}, "options.layers"),
    ({"dtype": "float16"}, "options.dtype: 'float32' in the folder, 'float16' asked for"),
    ({"the_corpus": zoo.corpus(rows=4)}, "corpus.packing.rows: 3 in the folder, 4 asked for"),
    ({"the_corpus": zoo.corpus(seed=5)}, "corpus.sources.long.sha256"),
    ({"the_model": zoo.model(seed=1)}, "model.fingerprint"),
]


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "unfinished"])
def test_other_options_are_refused_with_what_differs(model, tmp_path, monkeypatch, complete):
    if complete:
        zoo.record(tmp_path, model)
    else:
        with monkeypatch.context() as patched:
            interrupt(patched, Partial, "commit", 1, before_it_runs=False)
            with pytest.raises(KeyboardInterrupt):
                zoo.record(tmp_path, model)
    before = zoo.contents(tmp_path)
    for changes, message in CHANGES:
        with pytest.raises(CaptureError, match="made with other options") as caught:
            zoo.record(tmp_path, **({"the_model": model} | changes))
        assert message in str(caught.value)
    assert zoo.contents(tmp_path) == before


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "unfinished"])
def test_another_text_under_the_same_name_is_refused(tmp_path, monkeypatch, complete):
    path, tiny = tmp_path / "text.jsonl", load("tiny")
    texts = [f"{number} is a number, and so is {number + 1}." for number in range(9)]

    def again():
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        corpus = Corpus.from_sources({"mine": f"{path}:text"}, Packing(length=12, rows=1))
        zoo.record(tmp_path, tiny, corpus, record=("inputs",))

    with monkeypatch.context() as patched:
        if not complete:
            interrupt(patched, Partial, "commit", 1, before_it_runs=False)
        with nullcontext() if complete else pytest.raises(KeyboardInterrupt):
            again()
    texts[5] = texts[5].upper()
    with pytest.raises(CaptureError, match=r"another text.*corpus\.sources\.mine\.sha256"):
        again()
    texts[5] = texts[5].lower()
    again()


@pytest.mark.parametrize("change", ["altered", "shortened"])
def test_a_text_that_changed_meanwhile_is_noticed(model, tmp_path, monkeypatch, change):
    given = {"a": [[5 + n % 7] * 20 for n in range(30)]}
    corpus = Corpus.from_token_ids(given, Packing(length=12, rows=2))
    monkeypatch.setattr(Corpus, "description", corpus.description)
    with monkeypatch.context() as patched:
        interrupt(patched, Partial, "commit", 2, before_it_runs=False)
        with pytest.raises(KeyboardInterrupt):
            zoo.record(tmp_path, model, corpus)
    if change == "altered":
        given["a"][3][2] += 1  # the description stays: nothing else tells
    else:
        del given["a"][2:]
    with pytest.raises(CaptureError, match="the corpus changed since"):
        zoo.record(tmp_path, model, corpus)


def test_an_altered_shard_is_noticed_before_going_on(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt(patched, Partial, "commit", 3, before_it_runs=False)
        with pytest.raises(KeyboardInterrupt):
            zoo.record(tmp_path, model)
    candidates = next((tmp_path / "capture" / PARTIAL).glob("candidates-*"))
    candidates.write_bytes(candidates.read_bytes()[:-1])
    with pytest.raises(CaptureError, match=f"{candidates.name} is truncated"):
        zoo.record(tmp_path, model)


def test_groups_end_at_the_latest_at_the_byte_limit(model, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "SHARD_BYTES", 1)
    recorded = zoo.record(tmp_path, model, shard_tokens=10**9)
    shards_of_tokens = [e for e in recorded.manifest["shards"] if e["kind"] == "tokens"]
    assert len(shards_of_tokens) == len(list(zoo.corpus().batches(None)))
    assert shards.SHARD_BYTES == 1 << 27
