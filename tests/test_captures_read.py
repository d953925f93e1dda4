import json
import shutil

import pytest

import captures_zoo as zoo
from moescope.captures.read import Capture
from moescope.captures.shards import SCHEMA
from moescope.errors import CaptureError


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    zoo.record(folder)
    return folder


@pytest.fixture
def run(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def shard_files(run):
    return sorted((run / "capture").glob("*.safetensors"))


def test_every_kind_of_shard_is_there(run):
    kinds = {path.name.partition("-")[0] for path in shard_files(run)}
    assert kinds == {"tokens", "rows", "sample"}


@pytest.mark.parametrize("number", [0, 3, -1])
def test_a_truncated_shard_is_named(run, number):
    path = shard_files(run)[number]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CaptureError, match=f"{path.name} is truncated"):
        Capture(run)


@pytest.mark.parametrize("number", [0, 3, -1])
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_a_flipped_bit_is_named(run, number, place):
    path = shard_files(run)[number]
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(CaptureError, match=f"{path.name} was altered"):
        Capture(run)


def test_a_missing_shard_is_named(run):
    path = shard_files(run)[1]
    path.unlink()
    with pytest.raises(CaptureError, match=f"{path.name} is missing"):
        Capture(run)


def test_no_capture_an_unfinished_one_and_another_format(run, tmp_path):
    with pytest.raises(CaptureError, match="holds no capture.*Run `moescope capture`"):
        Capture(tmp_path / "nothing")
    path = run / "capture" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"schema": SCHEMA + 1}))
    with pytest.raises(CaptureError, match=f"another format. Got: {SCHEMA + 1}"):
        Capture(run)
    path.write_text(json.dumps(manifest)[:-10])
    with pytest.raises(CaptureError, match="it is not JSON"):
        Capture(run)
    path.write_text(json.dumps(manifest | {"shards": manifest["shards"][1:]}))
    with pytest.raises(CaptureError, match="do not add up"):
        Capture(run)


def test_the_digest_follows_the_content(run):
    before = Capture(run).digest
    assert before == Capture(run).digest
    path = run / "capture" / "manifest.json"
    path.write_text(path.read_text() + "\n")
    assert Capture(run).digest != before
