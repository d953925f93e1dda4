import errno
import math

import numpy as np
import pandas as pd
import pytest
from safetensors import SafetensorError

from moescope.errors import MoEScopeError
from moescope.runs import Finding, Result, Run, read_json, write_atomically, write_json, write_text


def result(value: float = 0.5) -> Result:
    return Result(
        name="routing",
        tables={
            "routing": pd.DataFrame({"layer": [0, 1], "share": [value, 0.25]}),
            "layers": pd.DataFrame({"layer": [0], "kind": ["<b>"]}),
        },
        findings=[Finding(text="a < b", numbers={"a": 1})],
        provenance={"seed": 3, "options": {"experts": (1, 2)}},
    )


def test_a_result_survives_the_round_trip(tmp_path):
    result().save(tmp_path)
    loaded = Result.load(tmp_path, "routing")
    pd.testing.assert_frame_equal(loaded.table, result().table)
    pd.testing.assert_frame_equal(loaded.tables["layers"], result().tables["layers"])
    assert loaded.findings == result().findings
    assert loaded.provenance == {"seed": 3, "options": {"experts": [1, 2]}}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"routing.parquet", "routing.layers.parquet", "routing.json"}


def test_a_result_without_its_last_file_does_not_exist(tmp_path):
    run = Run(tmp_path)
    result().save(run.results_folder)
    assert run.results() == ["routing"]
    (run.results_folder / "routing.json").unlink()
    with pytest.raises(MoEScopeError, match="no result 'routing'.*moescope routing"):
        run.result("routing")


def test_another_schema_is_refused(tmp_path):
    result().save(tmp_path)
    content = read_json(tmp_path / "routing.json") | {"schema": 99}
    write_json(tmp_path / "routing.json", content)
    with pytest.raises(MoEScopeError, match=r"Got: 99. Expected: schema 1"):
        Result.load(tmp_path, "routing")


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", None])
def test_a_damaged_table_is_named(tmp_path, content):
    result().save(tmp_path)
    path = tmp_path / "routing.layers.parquet"
    if content is None:
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.write_bytes(content)
    with pytest.raises(MoEScopeError, match=r"cannot read .*routing.layers.parquet.*Delete it"):
        Result.load(tmp_path, "routing")


def test_notebook_view_escapes_text():
    view = result()._repr_html_()
    assert "a &lt; b" in view
    assert "a < b" not in view


def test_json_holds_no_numbers_that_json_lacks(tmp_path):
    write_json(tmp_path / "a.json", {"x": math.nan, "y": np.float64(2), "z": [np.int64(1)]})
    assert read_json(tmp_path / "a.json") == {"x": None, "y": 2.0, "z": [1]}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["file", "tensors"],
)
def test_a_full_disk_is_one_clear_error(tmp_path, error):
    def fail(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(MoEScopeError, match="disk is full.*again"):
        write_atomically(tmp_path / "a.txt", fail)
    assert list(tmp_path.iterdir()) == []
