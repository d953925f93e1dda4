"""Adapters between experts of any layers, substitutes, and losses of chosen documents."""

import dataclasses
import math
import shutil
import weakref

import numpy as np
import pytest
import torch

import captures_zoo
import moescope
from evaluate_zoo import every_prediction, scaled_blocks, small_corpus
from models_zoo import HIDDEN, build
from moescope import interventions as change
from moescope.alignment.controls import same_output_space
from moescope.alignment.options import FitOptions, SolverOptions
from moescope.analyses import fits as fits_module
from moescope.analyses.align.tokens import Tokens
from moescope.analyses.fit_records import FitFolder
from moescope.analyses.fits import Fits, Source, Target
from moescope.analyses.material import Material
from moescope.errors import AlignmentError, CorpusError, MoEScopeError, OptionError
from moescope.models.observe import observe

QUICK = FitOptions(
    form="low_rank", rank=4, controls=False, solver=SolverOptions(steps=20, batch_tokens=64)
)
SOURCE = Source(0, 1)
REAL, RANDOM, NEAR = Target(1, 3), Target(1, 3, random=2), Target(0, 5)


@pytest.fixture(scope="module")
def model():
    return captures_zoo.model("mixtral")


@pytest.fixture(scope="module")
def material(tmp_path_factory, model):
    run = tmp_path_factory.mktemp("fits")
    corpus = captures_zoo.corpus(documents=120, rows=64)
    options = {"record": ("routing", "inputs"), "tokens": 0, "tokens_per_expert": 400}
    captures_zoo.record(run, model, corpus, **options)
    return Material(run, model, corpus)


@pytest.fixture(scope="module")
def fits(material):
    return Fits.of(material, QUICK, held_out_share=0.3)


@pytest.fixture(scope="module")
def fitted(fits):
    return fits.between(SOURCE, [REAL, RANDOM, NEAR])


def fvu(predicted, samples, mean):
    return float((predicted - samples.outputs).square().sum()) / float(
        (samples.outputs - mean).square().sum()
    )


def test_errors_are_those_of_the_adapters_on_documents_that_trained_nothing(model, fits, fitted):
    train, held_out = fits.samples(SOURCE)
    assert not set(train.documents.tolist()) & set(held_out.documents.tolist())
    assert fits.tokens.held_out[held_out.documents].all()
    rest, inner = fits.inner(SOURCE)
    assert len(rest) + len(inner) == len(train)
    layer = model.layer(0)
    torch.testing.assert_close(train.outputs, layer.expert_outputs(train.inputs, [1])[0])
    real = model.layer(1).expert_weights(3)
    experts = {
        REAL: real,
        RANDOM: same_output_space(real, 0, str(REAL))[2],
        NEAR: layer.expert_weights(5),
    }
    for target, expert in experts.items():
        found = fitted[target]
        assert (found.source, found.target) == (SOURCE, target)
        adapter = found.adapter
        expected = fvu(expert(adapter(held_out.inputs)), held_out, train.outputs.mean(0))
        assert found.row["fvu"] == pytest.approx(expected, rel=1e-4)
        expected = fvu(expert(adapter(inner.inputs)), inner, rest.outputs.mean(0))
        assert found.inner_fvu == pytest.approx(expected, rel=1e-4)
        assert found.row["n_val"] == len(held_out)
    assert len({found.inner_fvu for found in fitted.values()}) == 3


def test_what_is_chosen_by_is_the_error_of_what_is_kept(model, fits, monkeypatch):
    """Where a fit lost to the constant adapter, not the least of its curve."""
    real_fit = fits_module.fit_pairs

    def losing(*args, **kwargs):
        found = real_fit(*args, **kwargs)
        for result in found.values():
            result.adapter.gain.zero_()
        return found

    monkeypatch.setattr(fits_module, "fit_pairs", losing)
    target = Target(1, 6)
    found = fits.between(SOURCE, [target])[target]
    rest, inner = fits.inner(SOURCE)
    constant = model.layer(1).expert_weights(6)(found.adapter.shift[None])
    expected = fvu(constant, inner, rest.outputs.mean(0))
    assert found.inner_fvu == pytest.approx(expected, rel=1e-5)


def test_a_pair_is_fitted_once_and_its_numbers_do_not_depend_on_its_company(
    material, fitted, monkeypatch
):
    again = Fits.of(material, QUICK, held_out_share=0.3)
    asked = []
    real_fit = fits_module.fit_pairs

    def noting(train, held_out, targets, **kwargs):
        asked.append(sorted(targets))
        return real_fit(train, held_out, targets, **kwargs)

    monkeypatch.setattr(fits_module, "fit_pairs", noting)
    read = again.between(SOURCE, [NEAR, REAL])
    assert not asked
    assert read[REAL].row == pytest.approx(fitted[REAL].row, nan_ok=True)
    for name, tensor in read[REAL].adapter.tensors().items():
        assert torch.equal(tensor, fitted[REAL].adapter.tensors()[name])
    again.between(SOURCE, [REAL, Target(1, 0)])
    assert asked == [["L1E0"]]
    other = Fits.of(material, QUICK, held_out_share=0.25)
    alone = other.between(SOURCE, [REAL])[REAL]
    assert asked[1:] == [["L1E3"]]
    assert alone.row["fvu"] != fitted[REAL].row["fvu"]


CONTROLS = dataclasses.replace(QUICK, controls=True)
THREE = [REAL, Target(1, 0), NEAR]


@pytest.fixture(scope="module")
def controlled(material):
    return Fits.of(material, CONTROLS).between(SOURCE, THREE)


def test_random_experts_are_kept_one_by_one(controlled):
    for found in controlled.values():
        down, everything = found.random["same output space"], found.random["all random"]
        assert np.mean(down) == pytest.approx(found.row["fvu_random_down"], rel=1e-6)
        assert np.mean(everything) == pytest.approx(found.row["fvu_random_all"], rel=1e-6)
        spread = np.std([*down, *everything], ddof=1)
        assert spread == pytest.approx(found.row["fvu_random_sd"], rel=1e-6)
    assert controlled[REAL].random["all random"] == controlled[NEAR].random["all random"]


def test_killed_between_two_records_it_ends_with_the_same_numbers(
    tmp_path, material, controlled, monkeypatch
):
    """Random experts are drawn from all targets of a call: those that are left are too few."""
    shutil.copytree(material.run.path / "capture", tmp_path / "capture")
    again = Material(tmp_path, material.model)
    real_write, written = FitFolder.write, []

    def killed(self, *arguments):
        if written:
            raise KeyboardInterrupt
        written.append(arguments)
        real_write(self, *arguments)

    first = Fits.of(again, CONTROLS)
    with monkeypatch.context() as patch:
        patch.setattr(FitFolder, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            first.between(SOURCE, THREE)
    assert len(written) == 1
    found = Fits.of(again, CONTROLS).between(SOURCE, THREE)
    for target, fit in found.items():
        assert fit.row == pytest.approx(controlled[target].row, nan_ok=True)
        assert fit.random == controlled[target].random
    fits = Fits.of(again, CONTROLS)
    assert fits.missing(SOURCE, THREE) == []
    assert fits.missing(SOURCE, THREE[:2]) == THREE[:2]  # of other random experts


def test_a_lost_adapter_is_fitted_again(tmp_path, material, fitted):
    shutil.copytree(material.run.path, tmp_path / "run")
    fits = Fits.of(Material(tmp_path / "run", material.model), QUICK, held_out_share=0.3)
    assert fits.missing(SOURCE, [REAL, NEAR]) == []
    for lost in (tmp_path / "run").rglob(f"{SOURCE}-to-{REAL}.safetensors"):
        lost.unlink()
    assert fits.missing(SOURCE, [REAL, NEAR]) == [REAL]
    assert fits.between(SOURCE, [REAL])[REAL].row == pytest.approx(fitted[REAL].row, nan_ok=True)
    for record in (tmp_path / "run").rglob(f"{SOURCE}-to-{REAL}.json"):
        record.write_text("{")
    with pytest.raises(AlignmentError, match="cannot read the fit"):
        fits.between(SOURCE, [REAL])


def test_inputs_of_a_layer_are_read_once_and_do_not_stay_in_memory(tmp_path, material, monkeypatch):
    shutil.copytree(material.run.path / "capture", tmp_path / "capture")
    layers, tensors, real_inputs = [], [], Tokens.target_inputs

    def noting(self, layer, experts):
        found = real_inputs(self, layer, experts)
        layers.append(layer)
        tensors.extend(map(weakref.ref, found.values()))
        return found

    monkeypatch.setattr(Tokens, "target_inputs", noting)
    fits = Fits.of(Material(tmp_path, material.model), QUICK, held_out_share=0.3)
    seen = fits.tokens.target_inputs(1, range(8))
    for target in (Target(0, 2), Target(1, 3), Target(0, 5), Target(1, 4)):
        inputs = fits.inputs(target)
        if target.layer == 1:
            assert torch.equal(inputs, seen[target.expert])
        assert torch.equal(fits.inputs(target, 7), inputs[:7])
    del seen, inputs
    assert layers == [1, 0, 1]  # the first of them is the test's own
    assert not any(tensor() is not None for tensor in tensors)
    again = Fits.of(Material(tmp_path, material.model), QUICK, held_out_share=0.3)
    assert len(again.inputs(Target(1, 3))) > 0
    assert layers == [1, 0, 1]
    (kept,) = tmp_path.rglob("inputs-L1.safetensors")
    kept.write_bytes(b"no")
    with pytest.raises(MoEScopeError, match="cannot read .*inputs-L1"):
        again.inputs(Target(1, 3))
    with pytest.raises(OptionError, match="no such expert"):
        again.inputs(Target(1, 8))


def test_an_expert_without_tokens_has_no_adapter(tmp_path, model):
    corpus = captures_zoo.corpus(documents=10)
    recorded = ("routing", "inputs")
    captures_zoo.record(tmp_path, model, corpus, record=recorded, tokens_per_expert=40)
    few = Fits.of(Material(tmp_path, model, corpus), QUICK)
    for _ in range(2):  # fitted, and read again
        found = few.between(SOURCE, [REAL])[REAL]
        assert found.adapter is None
        assert math.isnan(found.inner_fvu)
        assert found.row["status"] == "too_few_tokens"


def test_no_such_expert(fits):
    with pytest.raises(OptionError, match="no such expert"):
        fits.samples(Source(0, 8))
    with pytest.raises(OptionError, match="not a mixture-of-experts layer"):
        fits.between(SOURCE, [Target(7, 0)])


def test_the_linear_map_is_that_of_the_table(fits, fitted):
    train, held_out = fits.samples(SOURCE)
    adapter = fits.linear(SOURCE)
    error = fvu(adapter(held_out.inputs), held_out, train.outputs.mean(0))
    assert adapter.form == "linear"
    assert error == pytest.approx(fitted[REAL].row["fvu_linear"], rel=1e-4)
    assert torch.equal(fits.mean(SOURCE), train.outputs.mean(0))


def block_of_source(model, context):
    """Inputs and outputs of the first layer, and who goes to the source with which weight."""
    layer, seen = model.layer(0), []
    ids = torch.randint(3, 97, (4, 12), generator=torch.Generator().manual_seed(1))
    with context, observe([layer], seen.append), torch.no_grad():
        model.forward(ids)
    experts, weights = seen[0].routing.experts, seen[0].routing.weights
    mine = (weights * (experts == SOURCE.expert)).sum(1, keepdim=True)
    assert (mine > 0).any()
    return seen[0].input, seen[0].output, mine


@pytest.mark.parametrize("target", [REAL, RANDOM, NEAR], ids=str)
def test_a_substitute_computes_the_tokens_of_the_source(model, fits, fitted, target):
    """Weights of no model stand in as experts of the model do."""
    x, before, mine = block_of_source(model, change.scale_expert((model.layer(0), 1), 1.0))
    weights = model.layer(target.layer).expert_weights(target.expert)
    if target.random is not None:
        weights = same_output_space(weights, 0, str(target._replace(random=None)))[target.random]
    own = model.layer(0).expert_weights(SOURCE.expert)
    _, after, _ = block_of_source(model, fits.substituting(fitted[target]))
    expected = before + mine * (weights(fitted[target].adapter(x)) - own(x))
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after, rtol=1e-3, atol=1e-3)


def test_an_adapter_alone_computes_the_tokens_of_the_source(model, fits):
    expert, linear = (model.layer(0), SOURCE.expert), fits.linear(SOURCE)
    x, before, mine = block_of_source(model, change.scale_expert(expert, 1.0))
    _, after, _ = block_of_source(model, change.substitute(expert, None, linear))
    own = model.layer(0).expert_weights(SOURCE.expert)
    torch.testing.assert_close(after, before + mine * (linear(x) - own(x)), rtol=1e-4, atol=1e-4)


def test_gradients_reach_an_adapter_before_weights_of_no_model(model, fits, fitted):
    adapter, layer = fitted[RANDOM].adapter, model.layer(0)
    shift = adapter.shift.clone().requires_grad_()
    trained = moescope.Adapter(**{**adapter.tensors(), "shift": shift}, form="low_rank")
    weights = model.layer(1).expert_weights(3)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (4, 12), generator=generator)
    probe = torch.randn(4, 12, HIDDEN, generator=generator)

    def total():
        with change.substitute((layer, SOURCE.expert), weights, trained):
            return (model.forward(ids)[0] * probe).sum()

    total().backward(inputs=[shift])
    step = 1e-2 * shift.grad / shift.grad.norm()
    with torch.no_grad():
        shift.add_(step)
        more = total()
        shift.sub_(2 * step)
        less = total()
    assert float(more - less) == pytest.approx(2 * float((step * shift.grad).sum()), rel=0.02)


def test_weights_of_another_width_do_not_stand_in(model):
    narrow = moescope.load(build("mixtral", hidden_size=16)).layers[0].expert_weights(0)
    with (
        pytest.raises(OptionError, match="not of the same width"),
        change.substitute((model.layer(0), 0), narrow),
    ):
        pass
    assert narrow.hidden_size != HIDDEN


def test_losses_of_chosen_documents_are_theirs():
    model, corpus = moescope.load(build("qwen2_moe")), small_corpus()
    chosen = torch.arange(45) % 3 == 0
    scaled = {"scaled": scaled_blocks(model, 0.3)}
    table = moescope.evaluate.compare(model, corpus, scaled, documents=chosen, bootstrap=50)
    found = table.set_index(["intervention", "domain"])
    losses = {"first": [], "second": []}
    for domain, document, target, logs in every_prediction(model, corpus):
        if chosen[document]:
            losses[corpus.domains[domain]].append(-logs[target].item())
    for domain, each in losses.items():
        row = found.loc["baseline", domain]
        assert row.n_tokens == len(each) > 0
        assert row.loss == pytest.approx(np.mean(each), rel=1e-5)
    whole = moescope.evaluate.compare(model, corpus, scaled, bootstrap=50)
    assert found.loc["scaled", "all"].n_documents < whole.n_documents.max()


def test_documents_that_are_not_there_are_refused():
    model, corpus = moescope.load(build("qwen2_moe")), small_corpus()
    for documents, said in ((torch.zeros(45).bool(), "no token"), (torch.ones(9).bool(), "more")):
        with pytest.raises(CorpusError, match=said):
            moescope.evaluate.compare(model, corpus, {}, documents=documents)
