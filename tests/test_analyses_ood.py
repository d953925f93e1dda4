from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

import models_zoo
import moescope
from moescope.analyses.losses import Losses
from moescope.analyses.material import Material
from moescope.analyses.ood import fits as fits_module
from moescope.analyses.ood.analysis import ood
from moescope.analyses.ood.findings import findings
from moescope.analyses.ood.matrices import ELSEWHERE, Matrix
from moescope.analyses.ood.options import OodOptions
from moescope.analyses.ood.split import Sample, Work, halves
from moescope.corpora.packing import Packing
from moescope.errors import CaptureError, ModelError, OptionError
from moescope.evaluate.paired import compare
from moescope.experts.adapter import Adapter
from moescope.interventions import substitute
from moescope.models.load import load
from moescope.reports.registry import chapter

HALF = models_zoo.VOCABULARY // 2
PACKING = Packing(length=20, rows=32, packed=False)
PLANTED = {"source": 0, "target": 1, "source_experts": (0, 1), "target_experts": (0, 1)}


@torch.no_grad()
def planted():
    """Expert 0 of layer 1 can do the work of experts 0 and 1 of layer 0 on domain "a", not on "b".

    These two are the same. Tokens of the domains lie in spaces of their own. What all three make of
    "a" is the same; what the first two make of "b" lies where the third cannot write.
    """
    model = load(models_zoo.build("mixtral"))
    random = torch.Generator().manual_seed(0)
    embedding = model.model.get_input_embeddings().weight.zero_()
    embedding[:HALF, :8] = torch.randn(HALF, 8, generator=random)
    embedding[HALF:, 8:16] = torch.randn(len(embedding) - HALF, 8, generator=random)
    embedding[:, 31] = 3.0
    for layer in model.layers:
        layer.decoder_layer.self_attn.o_proj.weight.zero_()
        layer.router_weight.zero_()[:, 31] = torch.tensor([2.0, 1.9] + [-2.0] * 6)
        for expert in range(layer.num_experts):
            weights = layer.expert_weights(expert)
            weights.gate[:], weights.up[:], weights.down[:] = 0, 0, 0
    both = torch.randn(3, 8, 8, generator=random)
    for layer in model.layers:
        weights = layer.expert_weights(0)
        weights.gate[:8, :8], weights.up[:8, :8], weights.down[16:24, :8] = both
        weights.down.mul_(1e-3)
    other = torch.randn(3, 8, 8, generator=random)
    weights = model.layers[0].expert_weights(0)
    weights.gate[8:, 8:16], weights.up[8:, 8:16] = other[:2]
    weights.down[24:, 8:] = 1e-3 * other[2]
    twin = model.layers[0].expert_weights(1)
    twin.gate[:], twin.up[:], twin.down[:] = weights.gate, weights.up, weights.down
    return model


def text(number=34):
    random = np.random.default_rng(0)
    given = {
        "a": [random.integers(3, HALF, 20).tolist() for _ in range(number)],
        "b": [random.integers(HALF, 97, 20).tolist() for _ in range(number)],
    }
    return moescope.Corpus.from_token_ids(given, PACKING)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ood")
    model = planted()
    moescope.capture(model, text(), folder, record=("routing", "inputs"))
    return folder, model


@pytest.fixture(scope="module")
def result(run):
    folder, model = run
    return ood(folder, model=model, corpus=text(), random=1, tokens=10_000, **PLANTED)


def cell(frame, **where):
    for column, value in where.items():
        frame = frame[frame[column] == value]
    (row,) = frame.to_dict("records")
    return row


def test_what_can_be_solved_in_one_domain_only_is(result):
    def fvu(trained, tested):
        where = {"quantity": "fvu", "adapter": "real", "trained_on": trained, "tested_on": tested}
        return cell(result.table, **where)

    assert fvu("a", "a")["value_high"] < 0.2
    assert fvu("b", "b")["value_low"] > 0.9  # nothing that it writes is where it should be
    assert fvu("b", "a")["value_low"] > 0.5
    assert fvu("a", "b")["value_low"] > 0.9
    less = cell(
        result.tables["controls"], quantity="fvu", control="random", trained_on="same domain"
    )
    errors = result.table.query("quantity == 'fvu' and trained_on == tested_on")
    means = errors.groupby("adapter")["value"].mean()
    assert less["difference"] == pytest.approx(means["real"] - means["random"])
    assert "At home the target behind an adapter differs" in result.findings[1].text
    lost = cell(
        result.tables["differences"], quantity="fvu", adapter="real", trained_on="b", tested_on="a"
    )
    assert lost["difference"] == pytest.approx(fvu("b", "a")["value"] - fvu("a", "a")["value"])
    assert lost["difference_low"] > 0.4
    assert lost["p_corrected"] < 0.01


def test_errors_are_those_of_the_kept_adapters_over_the_variance_of_the_domain(run, result):
    folder, model = run
    capture = moescope.Capture(folder)
    half = halves(capture, 0)
    kept = folder / result.provenance["adapters"]
    layer, target = model.layers
    ratios = []
    for expert in (0, 1):
        sums = np.zeros(2)
        for tested in (0, 1):
            adapter = Adapter.load(kept / f"L0E{expert}-half{tested}-real-a.safetensors")
            recorded = capture.expert_inputs(0, expert)
            documents = capture.documents[recorded.tokens]
            own = capture.document_domains[documents] == 1
            outputs = layer.expert_weights(expert)(recorded.values.float())
            tests = own & (half[documents] == tested)
            mean = outputs[own & (half[documents] != tested)].mean(0)
            given = target.expert_weights(0)(adapter(recorded.values[tests].float()))
            sums += [
                float((given - outputs[tests]).square().sum()),
                float((outputs[tests] - mean).square().sum()),
            ]
        ratios.append(sums[0] / sums[1])
    where = {"quantity": "fvu", "adapter": "real", "trained_on": "a", "tested_on": "b"}
    assert cell(result.table, **where)["value"] == pytest.approx(np.mean(ratios), rel=1e-3)
    of_one = result.tables["pairs"]
    where = {"source": "L0E1", "adapter": "real", "trained_on": "a", "tested_on": "b"}
    assert cell(of_one, **where)["fvu"] == pytest.approx(ratios[1], rel=1e-3)


def test_losses_are_those_of_compare(run, result):
    folder, model = run
    half = halves(moescope.Capture(folder), 0)
    kept = folder / result.provenance["adapters"]
    layer, target = model.layers
    sums = np.zeros((2, 2))
    for tested in (0, 1):
        changes = {}
        for expert in (0, 1):
            adapter = Adapter.load(kept / f"L0E{expert}-half{tested}-real-b.safetensors")
            changes[str(expert)] = partial(substitute, (layer, expert), (target, 0), adapter)
        found = compare(model, text(), changes, documents=half == tested)
        for expert in (0, 1):
            row = cell(found, intervention=str(expert), domain="a")
            sums[expert] += [row["difference"] * row["n_tokens"], row["n_tokens"]]
    where = {"quantity": "loss", "adapter": "real", "trained_on": "b", "tested_on": "a"}
    row = cell(result.table, **where)
    assert row["value"] == pytest.approx((sums[:, 0] / sums[:, 1]).mean(), abs=1e-7)
    assert row["n_tokens"] == sums[0, 1]
    assert set(result.table[result.table.adapter == "zero"].trained_on) == {"none"}


def test_every_adapter_has_as_many_tokens_and_none_of_its_test(run):
    capture = moescope.Capture(run[0])
    half = halves(capture, 0)
    assert [int(((half == h) & (capture.document_domains == 0)).sum()) for h in (0, 1)] == [17, 17]
    recorded = capture.expert_inputs(0, 0)
    sample = Sample.of(capture, recorded, half, ["a", "b"], 0)
    layer = run[1].layers[0]
    work = Work.of(layer, 0, sample, tested=1, domains=["a", "b"], number=101)
    for domain in ("a", "b", "all"):
        train = work.train(domain)
        assert len(train) == 101
        assert (half[train.documents] == 0).all()
    own = capture.document_domains[work.train("all").documents]
    assert own.bincount().tolist() == [51, 50]
    assert (half[work.tests().documents] == 1).all()
    assert (capture.document_domains[work.test("b").documents] == 1).all()


def test_it_goes_on_where_it_was_interrupted(run, result, monkeypatch):
    folder, model = run

    def fail(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(fits_module, "fit_pairs", fail)
    monkeypatch.setattr(Losses, "_measured", fail)
    again = ood(folder, model=model, corpus=text(), random=1, tokens=10_000, **PLANTED)
    pd.testing.assert_frame_equal(again.table, result.table)
    with pytest.raises(AssertionError, match="computed again"):
        ood(folder, model=model, corpus=text(), random=1, max_train=80, **PLANTED)


def sums(documents=40, sources=("x", "y"), seed=0, *, adapters=0.0, worse=1.0):
    """Errors by document, each document in one half; adapters may differ for no reason."""
    random = np.random.default_rng(seed)
    rows = []
    for source in sources:
        for half in (0, 1):
            for trained in ("a", "b", "all"):
                made = 1 + adapters * random.normal()
                for tested in ("a", "b"):
                    here = np.arange(half, documents, 2) + 1_000 * (tested == "b")
                    own = made * (1 + worse * (trained != tested))
                    rows.append(
                        pd.DataFrame({"document": here})
                        .assign(source=source, half=half, trained_on=trained, tested_on=tested)
                        .assign(tokens=5, error=own * random.gamma(20.0, 1 / 20, len(here)))
                        .assign(total=random.gamma(20.0, 1 / 20, len(here)))
                    )
    return pd.concat(rows, ignore_index=True)


def test_cells_are_means_over_sources_of_ratios():
    frame = sums()
    matrix = Matrix.of(frame, ["a", "b"], "error", "total")
    here = frame[(frame.trained_on == "b") & (frame.tested_on == "a")].groupby("source")
    ratios = here["error"].sum() / here["total"].sum()
    assert matrix.cells["b", "a"][0] == pytest.approx(ratios.mean())
    rest = [own[own["document"] % 32 != 5] for _, own in here]
    expected = [own["error"].sum() / own["total"].sum() for own in rest]
    assert matrix.cells["b", "a"][6] == pytest.approx(np.mean(expected))
    alone = here.get_group("y").query("half == 1")
    expected = alone["error"].sum() / alone["total"].sum()
    assert matrix.cells["b", "a"][-1] == pytest.approx(expected)
    assert len(matrix.cells["b", "a"]) == 1 + 32 + 4
    elsewhere = cell(pd.DataFrame(matrix.differences()), trained_on=ELSEWHERE, tested_on="all")
    both = [matrix.cells["b", "a"][0] - matrix.cells["a", "a"][0]]
    both += [matrix.cells["a", "b"][0] - matrix.cells["b", "b"][0]]
    assert elsewhere["difference"] == pytest.approx(np.mean(both))
    assert elsewhere["n_documents"] == 80


def test_domains_that_are_equal_are_not_told_apart():
    """Two adapters of one domain differ: documents alone would tell half of the domains apart."""
    found = []
    for seed in range(60):
        frame = sums(seed=seed, sources=("x", "y", "z"), adapters=0.1, worse=0.0)
        rows = pd.DataFrame(Matrix.of(frame, ["a", "b"], "error", "total").differences())
        found.append(cell(rows, trained_on="b", tested_on="a"))
    assert np.sum([row["p_value"] <= 0.05 for row in found]) <= 6
    inside = [row["difference_low"] <= 0 <= row["difference_high"] for row in found]
    assert np.sum(inside) >= 54
    frame = sums(seed=1, sources=("x", "y", "z"), adapters=0.1, worse=1.0)
    rows = pd.DataFrame(Matrix.of(frame, ["a", "b"], "error", "total").differences())
    assert cell(rows, trained_on="b", tested_on="a")["p_corrected"] <= 0.05


def test_few_documents_give_no_intervals():
    matrix = Matrix.of(sums(documents=20), ["a", "b"], "error", "total")
    rows = pd.DataFrame(matrix.values())
    assert rows.value_low.isna().all()
    assert set(rows.status) == {"few_documents"}
    assert pd.DataFrame(matrix.differences()).p_corrected.isna().all()


def test_findings_and_figures(result):
    said = " ".join(finding.text for finding in result.findings)
    assert "linear map" in said
    assert "random expert" in said
    assert "Put into the model" in said
    tables = dict(result.tables)
    tables["differences"] = tables["differences"].assign(p_corrected=1.0)
    assert "0 are worse and 0 better" in findings(tables)[0].text
    drawn = chapter("ood").draw(result)
    assert [figure.name for figure in drawn] == ["ood-fvu", "ood-differences", "ood-loss"]
    for figure in drawn:
        assert figure.specification()["datasets"]
        assert figure.title.endswith("?")


def test_the_target_is_chosen_and_sources_need_tokens(run, result):
    folder, model = run
    assert set(result.tables["pairs"].targets) == {"0"}
    with pytest.raises(CaptureError, match="too few tokens"):
        ood(folder, model=model, corpus=text(), source=0, target=1, source_experts=(5,))
    with pytest.raises(OptionError, match="hold none of"):
        ood(folder, model=model, corpus=text(), random=1, **PLANTED | {"tokens": 2})
    found = ood(folder, model=model, corpus=text(), random=1, losses=False, **PLANTED)
    assert set(found.table.quantity) == {"fvu"}
    assert len(chapter("ood").draw(found)) == 2


def test_no_expert_stands_in_for_itself(run):
    folder, model = run
    options = {
        **PLANTED,
        "source_experts": (0,),
        "target": 0,
        "random": 1,
        "losses": False,
        "max_train": 64,
    }
    found = ood(folder, model=model, corpus=text(), **options)
    assert set(found.tables["pairs"].targets) == {"1"}
    with pytest.raises(OptionError, match="but itself"):
        ood(folder, model=model, corpus=text(), **{**options, "target_experts": (0,)})


def test_encoder_decoder_models_are_refused(run, monkeypatch):
    folder, model = run
    monkeypatch.setattr(Material, "model", model)
    monkeypatch.setattr(model.model.config, "is_encoder_decoder", True)
    with pytest.raises(ModelError, match="encoder-decoder"):
        ood(folder, model=model, corpus=text())


def test_refusals(run, tmp_path):
    folder, model = run
    with pytest.raises(OptionError, match="unknown domain"):
        ood(folder, model=model, corpus=text(), domains=("a", "c"))
    one = moescope.Corpus.from_token_ids({"only": [[5, 6, 7] * 6] * 80}, PACKING)
    moescope.capture(model, one, tmp_path, record=("routing", "inputs"))
    with pytest.raises(CaptureError, match="one domain"):
        ood(tmp_path, model=model, corpus=one)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"sources": 0}, "sources"), ({"source": 1}, "together"), ({"domains": ("a",)}, "one domain")],
)
def test_options_that_say_nothing_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        OodOptions(**options)
