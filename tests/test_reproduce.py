import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import moescope
from moescope.analyses.registry import find
from moescope.cli import main
from moescope.config import build, read_yaml
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Packing
from moescope.errors import OptionError
from moescope.reproduction import (
    CORRECTED,
    FEWEST_VALUES,
    RESULT,
    PublishedTable,
    Reproduction,
    comparison,
    findings,
    reproduce,
)
from moescope.runs import Run

TABLE_1 = Path(__file__).parents[1] / "reproduce" / "moe_align_table1.yaml"
PAIRS = {"source_experts": [0, 4], "target_experts": [4, 8]}


@pytest.fixture(scope="module")
def shrunken(tmp_path_factory):
    """The published model's class and its numbers of experts, thin and with random weights."""
    tokenizer = moescope.load("tiny").tokenizer
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("shrunken")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Articles, one line a document: headings give rows that are nearly all padding."""
    lines = files("moescope.corpora").joinpath("builtin/encyclopedia.jsonl").read_text("utf-8")
    path = tmp_path_factory.mktemp("text") / "articles.txt"
    path.write_text("\n".join(json.loads(line)["text"] for line in lines.splitlines()), "utf-8")
    return {"articles": f"{path}:lines"}


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """The shipped file with fewer pairs, little text and no controls."""
    content = read_yaml(TABLE_1)
    content["packing"]["max_tokens"] = content["corrected"]["packing"]["max_tokens"] = 8_000
    for part in (content, content["corrected"]):
        del part["analyses"]["routing"]
        part["analyses"]["align"] |= PAIRS | {"controls": False}
    path = tmp_path_factory.mktemp("file") / "small.yaml"
    path.write_text(yaml.safe_dump(content), "utf-8")
    return path


@pytest.fixture(scope="module")
def run(small_file, shrunken, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "run"
    return reproduce(small_file, out, model=str(shrunken), corpus=corpus)


def test_the_shipped_file_fits_the_published_model():
    asked = build(Reproduction, read_yaml(TABLE_1), TABLE_1.name)
    model = Qwen2MoeConfig()  # its defaults are Qwen1.5-MoE-A2.7B
    sizes = (model.num_hidden_layers, model.num_experts, model.hidden_size)
    assert sizes == (24, 60, 2_048)
    assert (model.moe_intermediate_size, model.shared_expert_intermediate_size) == (1_408, 5_632)

    published = asked.published.frame()
    assert len(published) == 20
    assert (published.source_expert == 0).sum() == 4
    assert published.set_index(["source_expert", "target_expert"]).published[12, 20] == 0.010
    for study in (asked, asked.corrected_study):
        options = build(find("align").options, study.analyses["align"], "align")
        assert set(published.source_expert) <= set(options.source_experts)
        assert set(published.target_expert) <= set(options.target_experts)
        assert max(options.source_experts + options.target_experts) < model.num_experts
        assert max(study.capture.layers) < model.num_hidden_layers
        assert study.capture.tokens_per_expert >= options.max_tokens
    assert asked.analyses["align"]["protocol"] == "published"
    assert asked.packing.keep_padding
    assert not asked.corrected.packing.keep_padding
    right = build(find("align").options, asked.corrected.analyses["align"], "align")
    assert (right.protocol, right.controls) == ("converged", True)
    assert right.max_tokens * (1 - right.held_out_share) > 4 * model.hidden_size


def test_the_runners_numbers_are_those_of_align_by_hand(run, shrunken, corpus, tmp_path):
    model = moescope.load(shrunken, dtype="float16")
    packing = Packing(
        length=128, packed=False, keep_padding=True, skip_first=False, shuffle=0, max_tokens=8_000
    )
    text = Corpus.from_sources(corpus, packing)
    recorded = moescope.capture(model, text, tmp_path, layers=(1, 2), tokens=0)
    assert 0.2 < 1 - 8_000 / recorded.num_tokens < 0.6  # padding among the tokens
    by_hand = moescope.align(
        tmp_path,
        model=model,
        source=1,
        target=2,
        source_experts=(0, 4),
        target_experts=(4, 8),
        protocol="published",
        controls=False,
    ).table.set_index(["source_expert", "target_expert"])

    table = run.result(RESULT).table.set_index(["source_expert", "target_expert"])
    measured = table[table.measured.notna()]
    assert set(measured.index) == {(0, 4), (0, 8), (4, 4), (4, 8)}
    assert len(table) == 20
    np.testing.assert_array_equal(measured.measured, by_hand.published_mse[measured.index])
    np.testing.assert_array_equal(measured.n_train, by_hand.n_train[measured.index])
    np.testing.assert_allclose(measured.ratio, measured.measured / measured.published)


def test_the_study_done_right_stands_beside(run):
    result = run.result(RESULT)
    right = Run(run.path / CORRECTED).result("align")
    table = result.tables[CORRECTED]
    assert table[["source_expert", "target_expert"]].equals(
        result.table[["source_expert", "target_expert"]]
    )
    joined = table.merge(right.table, on=["source_expert", "target_expert"], suffixes=("", "_own"))
    assert len(joined) == 4
    np.testing.assert_array_equal(joined.fvu, joined.fvu_own)
    assert (right.table.protocol == "converged").all()
    assert (table.n_train.dropna() < result.table.n_train.dropna()).any()  # padding is gone


def test_another_model_or_text_is_not_comparable(run, shrunken):
    table = run.result(RESULT).table
    assert set(table.comparable) == {"no"}
    assert table.why.str.contains(f"another model: {shrunken}; another text: ").all()
    assert table.why[table.measured.isna()].str.endswith("; not measured").all()
    texts = [finding.text for finding in run.result(RESULT).findings]
    assert "4 were measured here, and 0 of these are comparable" in texts[0]
    assert any("too few" in text for text in texts)


def test_a_second_call_computes_nothing_again(
    run, small_file, shrunken, corpus, monkeypatch, capsys
):
    paths = [
        run.capture_folder / "manifest.json",
        run.results_folder / "align.json",
        run.path / CORRECTED / "results" / "align.json",
    ]
    before = [path.stat().st_mtime_ns for path in paths]
    table = run.result(RESULT).table
    monkeypatch.setattr("moescope.cli.report", lambda run: run.path / "report.html")
    options = ["--out", str(run.path), "--model", str(shrunken)]
    texts = [f"{domain}={source}" for domain, source in corpus.items()]
    assert main(["reproduce", str(small_file), *options, "--corpus", *texts]) == 0
    assert "report.html" in capsys.readouterr().out
    assert run.results() == ["align", RESULT]
    assert [path.stat().st_mtime_ns for path in paths] == before
    pd.testing.assert_frame_equal(run.result(RESULT).table, table)


def published_table(values, **changes):
    options = {"source": "a study", "note": "", "analysis": "align", "column": "error"}
    keys = {"where": {"layer": 1}, "rows": "row", "columns": "column", "beside": ("n",)}
    return PublishedTable(values=values, **(options | keys | changes))


def ours(values):
    """Our table, with lines of another layer that must not be taken."""
    right = pd.DataFrame(
        {"layer": 1, "row": row, "column": column, "error": value, "n": 7}
        for (row, column), value in values.items()
    )
    return pd.concat([right.assign(layer=2, error=-1.0), right], ignore_index=True)


def test_comparison_by_hand():
    published = published_table({0: {0: 2.0, "b": 4.0}, 1: {0: 1.0}})
    found = comparison(published, ours({(0, 0): 3.0, (0, "b"): np.nan}), ())
    assert list(found.columns) == [
        "row", "column", "published", "measured", "ratio", "comparable", "why", "n"
    ]  # fmt: skip
    assert found.ratio[0] == 1.5
    assert found.comparable.tolist() == ["yes", "no", "no"]
    assert found.why.tolist()[1:] == ["not measured", "not measured"]
    other = comparison(published, ours({(0, 0): 3.0}), ("another model: x",))
    assert other.why.tolist() == ["another model: x", *["another model: x; not measured"] * 2]


def test_findings_say_what_stands_out_and_agree_only_with_enough_values():
    asked = build(Reproduction, read_yaml(TABLE_1), TABLE_1.name)
    values = {row: {column: 1.0 + row + column / 9 for column in range(4)} for row in range(3)}
    values[2] = {column: 100.0 * (1 + column) for column in range(4)}
    published = published_table(values)
    measured = {(r, c): -value for r, cells in values.items() for c, value in cells.items()}
    described = Reproduction(
        model="m",
        published=published,
        corrected=asked.corrected,
        analyses={"align": {}},
    )
    table = comparison(published, ours(measured), ())
    assert len(table) >= FEWEST_VALUES
    counts, outstanding, agreement = findings(described, table)
    assert "12 published values 12 were measured here, and 12" in counts.text
    assert agreement.numbers["rank_correlation"] == pytest.approx(-1)
    assert outstanding.numbers["published_largest"] == "2"
    means = [1 + 1 / 6, 2 + 1 / 6]
    assert outstanding.numbers["published_times"] == pytest.approx(250 / np.median(means))
    assert outstanding.numbers["measured_largest"] == "0"
    few = findings(described, table[: FEWEST_VALUES - 1])[-1]
    assert "too few" in few.text
    assert "rank_correlation" not in few.numbers


def test_a_file_that_does_not_fit_is_refused_before_anything_is_computed(tmp_path):
    def refused(message, **changes):
        path = tmp_path / "file.yaml"
        path.write_text(yaml.safe_dump(read_yaml(TABLE_1) | changes), "utf-8")
        with pytest.raises(OptionError, match=message):
            reproduce(path, tmp_path / "run", model="/no/such/model")

    content = read_yaml(TABLE_1)
    refused("Did you mean 'column'", published=content["published"] | {"colum": "fvu"})
    refused("analyses leaves out", analyses={"routing": {}})
    refused("corrected leaves out", corrected=content["corrected"] | {"analyses": {}})
    assert not (tmp_path / "run").exists()


def test_an_unknown_column_suggests_the_nearest():
    published = published_table({0: {0: 1.0}}, column="eror")
    with pytest.raises(OptionError, match="Did you mean 'error'"):
        comparison(published, ours({(0, 0): 1.0}), ())


@pytest.mark.slow
def test_the_report_holds_both_tables(run):
    page = moescope.report(run).read_text("utf-8")
    assert "Done right: " in page
    for table in ("published", "published.corrected"):
        assert len(pd.read_csv(run.path / "tables" / f"{table}.csv")) == 20
