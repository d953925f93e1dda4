import json
from importlib.resources import files
from pathlib import Path
from runpy import run_path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import moescope
from moescope.analyses.registry import find
from moescope.cli import main
from moescope.config import build, read_yaml
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Packing
from moescope.corpora.questions import Questions
from moescope.corpora.sources import parse
from moescope.errors import OptionError
from moescope.evaluate.answers import compare_answers
from moescope.models.ported.deepseek import DeepseekConfig, DeepseekForCausalLM, register
from moescope.reproduction import reproduce
from moescope.reproduction.file import CORRECTED, read
from moescope.reproduction.findings import FEWEST_VALUES, table_findings
from moescope.reproduction.published import PublishedTable, comparison
from moescope.reproduction.run import CLAIMS, RESULT
from moescope.runs import Run

FILES = sorted(Path(__file__).parents[1].glob("reproduce/*.yaml"))
TABLE_1 = next(file for file in FILES if file.name == "moe_align_table1.yaml")
TABLE_2 = next(file for file in FILES if file.name == "moe_align_table2.yaml")
TOPK = next(file for file in FILES if file.name == "moe_lens_topk.yaml")
PAIRS = {"source_experts": [0, 4], "target_experts": [4, 8]}
THIN = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
MIXTRAL = (MixtralForCausalLM, MixtralConfig, {"intermediate_size": 16}, (8, 2))
# As in the published configurations: class, experts, experts per token, what goes beside them.
MODELS = {
    "Qwen/Qwen1.5-MoE-A2.7B": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
        (60, 4),
    ),
    "allenai/OLMoE-1B-7B-0924": (
        OlmoeForCausalLM,
        OlmoeConfig,
        {"intermediate_size": 16},
        (64, 8),
    ),
    "deepseek-ai/deepseek-moe-16b-base": (
        DeepseekForCausalLM,
        DeepseekConfig,
        {"moe_intermediate_size": 16, "intermediate_size": 48, "first_k_dense_replace": 1},
        (64, 6),
    ),
    "mistralai/Mixtral-8x7B-v0.1": MIXTRAL,
    "mistralai/Mixtral-8x22B-v0.1": MIXTRAL,
    "switch-base-8-mnli": (  # google/switch-base-8, fine-tuned
        SwitchTransformersForConditionalGeneration,
        SwitchTransformersConfig,
        {
            "num_hidden_layers": 12,
            "num_decoder_layers": 4,
            "num_sparse_encoder_layers": 6,
            "num_sparse_decoder_layers": 2,
            "num_experts": 8,
            "d_ff": 16,
            "d_kv": 8,
            "initializer_factor": 1.0,
            "decoder_start_token_id": 0,
        },
        (8, None),  # one by construction, which its configuration does not say
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each published model's class and its numbers of experts, thin and with random weights."""
    register()
    tokenizer = moescope.load("tiny").tokenizer
    folders = {}
    for name, (model, config, sizes, experts) in MODELS.items():
        folders[name] = tmp_path_factory.mktemp("shrunken")
        filled = config(**(THIN | sizes), vocab_size=len(tokenizer))
        assert (filled.num_experts, getattr(filled, "num_experts_per_tok", None)) == experts
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model(filled).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def shrunken(models):
    return models["Qwen/Qwen1.5-MoE-A2.7B"]


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
    asked = read(TABLE_1)
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
        "row", "column", "measure", "published", "measured", "ratio", "comparable", "why", "n"
    ]  # fmt: skip
    assert found.ratio[0] == 1.5
    assert found.comparable.tolist() == ["yes", "no", "no"]
    assert found.why.tolist()[1:] == ["not measured", "not measured"]
    other = comparison(published, ours({(0, 0): 3.0}), ("another model: x",))
    assert other.why.tolist() == ["another model: x", *["another model: x; not measured"] * 2]


def test_rows_of_another_measure_and_rows_known_to_differ():
    published = published_table(
        {0: {0: 2.0}, 1: {0: 1.0}}, other_columns={1: "median"}, unlike={0: "half of the text"}
    )
    table = ours({(0, 0): 3.0, (1, 0): 5.0}).assign(median=7.0)
    found = comparison(published, table, ("another model: x",))
    assert found.measured.tolist() == [3.0, 7.0]
    assert found.measure.tolist() == ["error", "median"]
    assert found.why.tolist() == ["another model: x; half of the text", "another model: x"]
    assert set(comparison(published, table, ()).comparable) == {"no", "yes"}


def test_findings_say_what_stands_out_and_agree_only_with_enough_values():
    values = {row: {column: 1.0 + row + column / 9 for column in range(4)} for row in range(3)}
    values[2] = {column: 100.0 * (1 + column) for column in range(4)}
    published = published_table(values)
    measured = {(r, c): -value for r, cells in values.items() for c, value in cells.items()}
    table = comparison(published, ours(measured), ())
    assert len(table) >= FEWEST_VALUES
    counts, outstanding, agreement = table_findings(published, table, "m")
    assert "12 published values 12 were measured here, and 12" in counts.text
    assert agreement.numbers["rank_correlation"] == pytest.approx(-1)
    assert outstanding.numbers["published_largest"] == "2"
    means = [1 + 1 / 6, 2 + 1 / 6]
    assert outstanding.numbers["published_times"] == pytest.approx(250 / np.median(means))
    assert outstanding.numbers["measured_largest"] == "0"
    few = table_findings(published, table[: FEWEST_VALUES - 1], "m")[-1]
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
    refused("published is about an analysis", analyses={"routing": {}})
    refused("corrected is about an analysis", corrected=content["corrected"] | {"analyses": {}})
    refused("claims is about an analysis", claims={"topk": "It rises."})
    refused("there are none", published=None, claims={"align": "E0 is distinct."})
    refused("nothing is said", published=None, corrected=None)
    assert not (tmp_path / "run").exists()


def test_an_unknown_column_suggests_the_nearest():
    published = published_table({0: {0: 1.0}}, column="eror")
    with pytest.raises(OptionError, match="Did you mean 'error'"):
        comparison(published, ours({(0, 0): 1.0}), ())


def test_an_unknown_table_suggests_the_nearest(run):
    published = published_table({0: {0: 1.0}}, table="pairs")
    with pytest.raises(OptionError, match="unknown table of align"):
        published.ours(run.result("align"))


# Little text and few resamples: what is asked for stays the same.
QUICK = {
    "align": PAIRS | {"controls": False},
    "routing": {"permutations": 5, "bootstrap": 5},
    "topk": {"bootstrap": 5},
    "ensemble": {"bootstrap": 5},
    "lens": {"bootstrap": 5, "tokens": 200},
    "swap-blocks": {"questions": "banking77", "most_questions": 40, "bootstrap": 5},
    "swap-experts": {"questions": "banking77", "most_questions": 40, "bootstrap": 5},
    "outputs": {"bootstrap": 5, "permutations": 5, "matched": 3},
    "neurons": {"bootstrap": 5, "permutations": 5},
    "weights": {"permutations": 5, "null_pairs": 2, "matched": 3, "matched_across": 3},
}


def made_small(file, folder):
    content = read_yaml(file)
    tokens = 4_000 if file == TABLE_1 else 600
    for part in (content, content.get(CORRECTED) or {}):
        if part:
            part["packing"] |= {"length": 32, "max_tokens": tokens}
            part["analyses"] = {
                name: (options or {}) | QUICK.get(name, {})
                for name, options in part["analyses"].items()
            }
    path = folder / file.name
    path.write_text(yaml.safe_dump(content), "utf-8")
    return path


@pytest.fixture(scope="module")
def local_text(tmp_path_factory):
    """One text for all domains: every document is a part of an article."""
    lines = files("moescope.corpora").joinpath("builtin/encyclopedia.jsonl").read_text("utf-8")
    words = " ".join(json.loads(line)["text"] for line in lines.splitlines()[:4]).split()
    path = tmp_path_factory.mktemp("text") / "pieces.txt"
    path.write_text("\n".join(" ".join(words[i : i + 60]) for i in range(0, 900, 60)), "utf-8")
    return f"{path}:lines"


@pytest.fixture(scope="module")
def runs(models, local_text, tmp_path_factory):
    """What each file gives on a shrunken model and a local text, computed when asked for."""
    done = {}

    def run_of(file):
        if file not in done:
            asked = read(file)
            folder = tmp_path_factory.mktemp("out")
            done[file] = reproduce(
                made_small(file, folder),
                folder / "run",
                model=str(models[asked.model]),
                corpus=dict.fromkeys(asked.corpus, local_text),
            )
        return done[file]

    return run_of


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_runs_on_the_shrunken_class_of_its_model(file, runs):
    asked, run = read(file), runs(file)
    result = run.result(RESULT)
    assert set(asked.analyses) <= set(run.results())
    if asked.published is not None:
        assert len(result.table) == len(asked.published.frame())
        assert result.table.measured.notna().any()
        assert set(result.table.comparable) == {"no"}
        assert (CORRECTED in result.tables) == (asked.corrected is not None)
    if asked.claims:
        claims = result.tables[CLAIMS if asked.published else RESULT]
        assert claims.set_index("analysis").published.to_dict() == asked.claims
        assert claims.why.str.contains("another model: ").all()
        first = run.result(claims.analysis[0]).findings[0].text
        assert claims.found[0].startswith(first)
        assert any(first in finding.text for finding in result.findings)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_says_that_it_was_not_run_and_names_sources_that_can_be_read(file):
    asked = read(file)
    assert "Status: not run here" in file.read_text("utf-8")
    assert asked.model in MODELS
    for spec in asked.corpus.values():
        if spec.startswith("hf:"):
            assert parse(spec).spec == spec
    for study in filter(None, (asked, asked.corrected_study)):
        for name, options in study.analyses.items():
            build(find(name).options, options, name)


def test_the_published_form_of_topk_is_the_mean_of_documents_and_the_median_for_github(runs):
    run = runs(TOPK)
    ours = run.result("topk").tables["published"].set_index(["domain", "k"])
    table = run.result(RESULT).table.set_index(["domain", "k"])
    assert table.measured.notna().all()
    assert len(table) == 6 * 6 + 4
    for (domain, k), line in table.iterrows():
        expected = ours.median_perplexity if domain == "github" else ours.mean_perplexity
        assert line.measured == expected[domain, k]
    published = read(TOPK).published.values
    rises = [cells[1] / cells[6] - 1 for cells in published.values() if 6 in cells]
    assert (min(rises), max(rises)) == pytest.approx((0.316, 1.199), abs=1e-3)


def test_means_over_layers_are_held_against_published_means(runs):
    router = runs(next(file for file in FILES if file.stem == "closer_look_mixtral_router"))
    layers = router.result("weights").tables["router"]
    layers = layers[(layers.form == "average") & (layers.matrix == "gate")]
    line = router.result(RESULT).table.set_index("matrix").loc["gate"]
    assert line.published == 0.33
    assert line.measured == pytest.approx((layers.r**2).mean())
    assert line.r == pytest.approx(layers.r.mean())
    assert len(layers) == 3

    outputs = runs(next(file for file in FILES if file.stem == "closer_look_mixtral"))
    ranks = outputs.result("outputs").tables["ranks"]
    counts = ranks[(ranks.score_rank == 8) & (ranks.norm_rank == 8)]["count"].sum()
    total = ranks[ranks.score_rank == 8]["count"].sum()
    table = outputs.result(RESULT).table
    assert len(table) == 8
    assert table.measured.iloc[-1] == pytest.approx(counts / total)


def test_topk_done_right_has_intervals_and_three_weightings(runs):
    table = runs(TOPK).result(RESULT).tables[CORRECTED]
    assert set(table.weights) == {"as_is", "same_mass", "to_one"}
    assert len(table) == 3 * 40
    one = table[(table.domain == "aime") & (table.k == 1) & (table.weights == "to_one")].iloc[0]
    right = Run(runs(TOPK).path / CORRECTED).result("topk").table
    own = right[(right.domain == "aime") & (right.k == 1) & (right.weights == "to_one")].iloc[0]
    assert (one.loss, one.difference) == (own.loss, own.difference)


def test_accuracies_of_swapped_blocks_stand_beside_the_published_ones(runs):
    run = runs(TABLE_2)
    table = run.result(RESULT).table
    assert len(table) == 21
    assert table.measured.notna().all()
    ours = run.result("swap-blocks").table.set_index(["layer", "other_layer"])
    keys = pd.MultiIndex.from_frame(table[["layer", "other_layer"]])
    np.testing.assert_array_equal(table.measured, ours.accuracy[keys])
    assert set(ours.n_questions) == {40}
    shown = run.result("swap-blocks").tables["routing"].query("shown").swap
    assert shown.unique().tolist() == ["baseline", "1-3", "1-7", "1-9"]


def test_the_fine_tuning_of_table_2_teaches_the_shrunken_model(models):
    script = run_path(str(TABLE_2.with_suffix(".py")))
    model = moescope.load(str(models["switch-base-8-mnli"]))
    rows = [
        {"hypothesis": hypothesis, "premise": "it is", "label": label}
        for label, hypothesis in enumerate(("yes", "perhaps", "no"))
    ]
    asked = script["asked"](rows * 8)
    assert asked.question[1] == "mnli hypothesis: perhaps premise: it is"
    questions = Questions(list(asked.iloc[:3].itertuples(index=False, name=None)), {})
    assert compare_answers(model, questions, {}, bootstrap=2).accuracy[0] == 0
    script["fine_tune"](model, asked, epochs=40, rate=0.003)
    assert compare_answers(model, questions, {}, bootstrap=2).accuracy[0] == 1


@pytest.mark.slow
def test_the_report_holds_both_tables(run):
    page = moescope.report(run).read_text("utf-8")
    assert "Done right: " in page
    for table in ("published", "published.corrected"):
        assert len(pd.read_csv(run.path / "tables" / f"{table}.csv")) == 20
