import json
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import pandas as pd
import pytest

from moescope.__main__ import main as command
from moescope.cli import commands, main
from moescope.runs import Run

SMALL = ["--packing.max-tokens", "12000", "--tokens", "4096"]
ALIGN = ["--source", "1", "--target", "2", "--source-experts", "0,1", "--target-experts", "0,1"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert main(["capture", "tiny", "--out", str(folder), *SMALL]) == 0
    return folder


def test_inspect_shows_every_layer_and_its_conformance(capsys):
    assert main(["inspect", "tiny", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [layer["layer"] for layer in shown["layers"]] == [0, 1, 2, 3, 4, 5]
    assert all(layer["passed"] and layer["relative_error"] <= 1e-5 for layer in shown["layers"])
    assert main(["inspect", "tiny"]) == 0
    assert "qwen2_moe" in capsys.readouterr().out


def test_evaluate_shows_losses_by_domain(capsys):
    corpus = ["--packing.max-tokens", "3000"]
    assert main(["evaluate", "tiny", *corpus, "--json"]) == 0
    losses = {row["domain"]: row for row in json.loads(capsys.readouterr().out)["losses"]}
    assert set(losses) == {"all", "encyclopedia", "maths", "code", "french"}
    assert all(0 < row["loss"] < 8 and row["n_tokens"] > 0 for row in losses.values())
    assert main(["evaluate", "tiny", *corpus, "--model-dtype", "float32"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_analyses_run_from_the_command_line_and_a_report_follows(run_folder, capsys):
    assert main(["routing", str(run_folder), "--permutations", "50", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {"findings", "tables", "provenance"} <= shown.keys()
    assert main(["align", str(run_folder), *ALIGN, "--protocol", "published"]) == 0
    assert main(["report", str(run_folder)]) == 0
    assert Run(run_folder).results() == ["align", "routing"]
    assert (run_folder / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "tinny"], "tiny"),
        (["inspect", "/no/such/folder"], "/no/such/folder"),
        (["report", "/no/such/run"], "no"),
        (["routing", "/no/such/run"], "capture"),
        (["capture", "tiny", "--out", "unused", "--corpus", "wiki"], "DOMAIN=SOURCE"),
        (["capture", "tiny", "--out", "unused", "--corpus", "wiki=missing.txt"], "missing.txt"),
    ],
)
def test_a_bad_request_is_one_clear_line_and_not_zero(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("moescope: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["aling"], ["routing", "run", "--permutation", "3"]])
def test_unknown_words_suggest_the_nearest(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert {"aling": "align"}.get(arguments[0], "--permutations") in shown.out + shown.err


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(run_folder, capsys):
    quick = ["--experts-per-layer", "2", "--steps", "5", "--max-tokens", "300"]
    plans = []
    for of in (str(run_folder), "tiny"):
        assert main(["atlas", of, "--dry-run", *quick, "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0]["counts"] == plans[1]["counts"]
    assert plans[0]["counts"]["pairs"] == 12 * 10
    assert plans[0]["seconds"].keys() == {"0", "1", "8"}
    assert main(["atlas", "tiny", "--dry-run", *quick]) == 0
    assert "Atlas of tiny: 12 imitated experts, 120 pairs" in capsys.readouterr().out
    assert "atlas" not in Run(run_folder).results()


def test_a_dry_run_of_neither_a_run_nor_a_model_says_so(tmp_path, capsys):
    assert main(["atlas", str(tmp_path / "none"), "--dry-run"]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


@pytest.mark.parametrize("words", [["swap", "blocks"], ["swap-blocks"]])
def test_a_command_may_be_two_words(words, tmp_path, capsys):
    assert main([*words, str(tmp_path)]) == 1
    assert "holds no capture" in capsys.readouterr().err


def test_the_version_needs_nothing_of_what_commands_need(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moescope", "--version"])
    monkeypatch.setitem(sys.modules, "moescope.cli", None)  # importing it would fail
    assert command() == 0
    assert capsys.readouterr().out == f"moescope {version('moescope')}\n"


def test_every_command_has_help(capsys):
    for name in commands():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert name in capsys.readouterr().out


@pytest.mark.slow
def test_align_killed_half_way_ends_as_if_undisturbed(run_folder, tmp_path):
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    for folder in (disturbed, undisturbed):
        shutil.copytree(run_folder / "capture", folder / "capture")
    command = [sys.executable, "-m", "moescope", "align", str(disturbed), *ALIGN]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(disturbed.glob("results/align/*/L*.align.parquet")):
        assert time.monotonic() < deadline
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Run(disturbed).results() == []
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert main(["align", str(undisturbed), *ALIGN]) == 0
    one, other = (Run(folder).result("align") for folder in (disturbed, undisturbed))
    pd.testing.assert_frame_equal(one.table, other.table)
    assert one.findings == other.findings
    adapters = one.provenance["adapters"]
    assert adapters == other.provenance["adapters"]
    for path in (disturbed / adapters).glob("*.safetensors"):
        assert path.read_bytes() == (undisturbed / adapters / path.name).read_bytes()
