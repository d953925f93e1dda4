import json

import pytest
import torch

import models_zoo
from captures_zoo import contents
from evaluate_zoo import random_documents
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Packing
from moescope.decoding.lens import divergence
from moescope.decoding.training import TrainingOptions, fit
from moescope.decoding.training_states import States, StateSource, belongs
from moescope.decoding.translators import Translators
from moescope.errors import CorpusError, ModelError, OptionError
from moescope.models.load import load
from moescope.models.readout import Readout

HIDDEN = models_zoo.HIDDEN


def text(documents=60, **packing):
    given = {"first": random_documents(documents, 0), "second": random_documents(documents, 1)}
    return Corpus.from_token_ids(given, Packing(length=32, rows=8, **packing))


@pytest.fixture(scope="module")
def model():
    return load(models_zoo.build("qwen2_moe"))


def some_translators(fingerprint="f" * 64):
    torch.manual_seed(0)
    return Translators(
        weights={layer: torch.randn(4, 4) for layer in (1, 3)},
        biases={layer: torch.randn(4) for layer in (1, 3)},
        model_fingerprint=fingerprint,
        training={"tokens": 7, "options": {"seed": 0}},
    )


def test_a_translator_is_an_affine_map():
    translators = some_translators()
    states = torch.randn(5, 4)
    expected = [h + translators.weights[3] @ h + translators.biases[3] for h in states]
    torch.testing.assert_close(translators(3, states), torch.stack(expected))
    assert translators(3, states.bfloat16()).dtype == torch.float32
    with pytest.raises(OptionError, match=r"one of \[1, 3\]"):
        translators(2, states)


def test_the_identity_is_exact_in_every_dtype(model):
    identity = Translators.identity(model, [0, 1])
    states = torch.randn(5, HIDDEN).bfloat16()
    assert torch.equal(identity(1, states).bfloat16(), states)


def test_they_are_read_as_they_were_saved(tmp_path):
    saved = some_translators()
    assert not Translators.present(tmp_path / "there")
    saved.save(tmp_path / "there")
    found = Translators.load(tmp_path / "there")
    assert found.layers == [1, 3]
    for layer in found.layers:
        assert torch.equal(found.weights[layer], saved.weights[layer])
        assert torch.equal(found.biases[layer], saved.biases[layer])
    assert found.training == saved.training
    told = json.loads((tmp_path / "there/translators.json").read_text())
    assert set(told["libraries"]) >= {"torch", "moescope"}
    before = contents(tmp_path / "there")
    saved.save(tmp_path / "there")
    assert contents(tmp_path / "there") == before


def test_a_save_that_is_cut_off_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    some_translators().save(tmp_path)

    def cut_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("moescope.decoding.translators.write_json", cut_off)
    with pytest.raises(KeyboardInterrupt):
        some_translators().save(tmp_path)
    assert not Translators.present(tmp_path)
    with pytest.raises(ModelError, match="holds no translators"):
        Translators.load(tmp_path)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    some_translators().save(tmp_path)
    tensors, told = tmp_path / "translators.safetensors", tmp_path / "translators.json"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(ModelError, match="altered"):
        Translators.load(tmp_path)
    tensors.unlink()
    with pytest.raises(ModelError, match="cannot read"):
        Translators.load(tmp_path)
    told.write_text('{"schema": "something else"}')
    with pytest.raises(ModelError, match="another format"):
        Translators.load(tmp_path)
    told.write_text("[]")
    with pytest.raises(ModelError, match="another format"):
        Translators.load(tmp_path)


def test_numbers_that_are_not_finite_are_refused():
    bias = torch.tensor([0.0, torch.nan])
    with pytest.raises(ModelError, match="layer 2 holds numbers that are not finite"):
        Translators(
            weights={2: torch.zeros(2, 2)}, biases={2: bias}, model_fingerprint="", training={}
        )


def test_another_model_is_refused(model):
    Translators.identity(model, [0]).require_model(model)
    other = load(models_zoo.build("qwen2_moe", seed=1))
    with pytest.raises(ModelError, match="not those of the model"):
        Translators.identity(model, [0]).require_model(other)


def test_parts_are_disjoint_and_of_the_promised_sizes():
    documents = torch.arange(1000)
    parts = [belongs(documents, part, 0) for part in ("training", "choice", "held_out")]
    assert [int(part.sum()) for part in parts] == [700, 100, 200]
    assert torch.equal(sum(part.int() for part in parts), torch.ones(1000).int())
    assert not torch.equal(parts[2], belongs(documents, "held_out", 1))
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(belongs(shuffled, "held_out", 0), parts[2][shuffled])
    repeated = torch.tensor([5, 5, 3])
    assert torch.equal(belongs(repeated, "held_out", 0), parts[2][repeated])


def test_divergence_is_the_definition():
    torch.manual_seed(0)
    final, own = (torch.randn(4, 9).log_softmax(-1) for _ in range(2))
    expected = (final.exp() * (final - own)).sum(-1)
    torch.testing.assert_close(divergence(final, own), expected)


def test_only_training_documents_and_kept_positions_are_seen(model):
    source = StateSource.of(model, text(20), 0)
    found = torch.cat([states.last for states in source.states("training")])
    expected = 0
    for batch in source.corpus.batches(None):
        documents = batch.documents[batch.kept]
        expected += int(belongs(documents, "training", 0).sum())
    assert len(found) == expected > 0
    with pytest.raises(CorpusError, match="held_out"):
        list(StateSource.of(model, Corpus.from_token_ids({"a": [[5, 6, 7]]}), 3).states("held_out"))


class Planted(StateSource):
    """Random last states; those after the first layer are an affine map of them, those after the
    second the same."""

    def states(self, part):
        random = torch.Generator().manual_seed({"training": 1, "choice": 2}[part])
        for _ in range(40):
            last = torch.randn(256, HIDDEN, generator=random)
            yield States(last, torch.stack([last @ turn().T + 0.5, last]))


def turn():
    return torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)))[
        0
    ]


@pytest.fixture(scope="module")
def planted(model):
    options = TrainingOptions(steps=200, checks=2, learning_rate=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moescope.decoding.training.StateSource", Planted)
        return fit(model, text(3), options)


def test_a_hidden_rotation_is_undone(model, planted):
    torch.manual_seed(5)
    last = torch.randn(500, HIDDEN)
    given = last @ turn().T + 0.5
    readout = Readout.of(model)
    with torch.no_grad():
        final, before, after = (
            readout.logits(states).log_softmax(-1) for states in (last, given, planted(0, given))
        )
    assert divergence(final, before).mean() > 1
    assert divergence(final, after).mean() < 1e-4
    assert (final.argmax(-1) == after.argmax(-1)).float().mean() > 0.98
    # The norm takes the length out, so the map is known up to a factor.
    found = torch.eye(HIDDEN) + planted.weights[0]
    cosine = torch.cosine_similarity(found.flatten(), turn().T.flatten(), dim=0)
    assert cosine > 0.999
    shift = found @ torch.full((HIDDEN,), 0.5) + planted.biases[0]
    assert shift.norm() < 0.02 * found.norm()


def test_a_layer_that_is_decoded_exactly_stays_as_it_is(planted):
    assert not planted.weights[1].any()
    assert not planted.biases[1].any()
    course = [row for row in planted.training["course"] if row["layer"] == 1]
    assert [row["kl"] for row in course] == [0, 0, 0]


def test_where_training_makes_it_worse_the_identity_stays(model):
    options = TrainingOptions(steps=2, checks=1, learning_rate=30.0)
    translators = fit(model, text(20), options)
    course = [row for row in translators.training["course"] if row["layer"] == 0]
    assert [row["kept"] for row in course] == [True, False]
    assert not translators.weights[0].any()


def test_training_is_repeatable_and_leaves_the_model_and_chance_alone(model):
    options = TrainingOptions(steps=3, checks=1)
    before, state = model.fingerprint, torch.get_rng_state()
    first, second = (fit(model, text(20), options) for _ in range(2))
    assert torch.equal(first.weights[0], second.weights[0])
    assert first.weights[0].any()
    assert model.fingerprint == before == first.model_fingerprint
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.model.parameters())


def test_only_training_documents_change_the_translators(model):
    """Other held-out documents, the same translators."""
    documents = {"a": random_documents(20, 0)}
    packing = Packing(length=32, packed=False, shuffle=0)
    changed = {"a": list(documents["a"])}
    held_out = belongs(torch.arange(20), "held_out", 0).nonzero()[:, 0].tolist()
    for number in held_out:
        changed["a"][number] = changed["a"][number][::-1]
    options = TrainingOptions(steps=3, checks=1)
    first, second = (
        fit(model, Corpus.from_token_ids(given, packing), options) for given in (documents, changed)
    )
    assert len(held_out) == 4
    assert torch.equal(first.weights[0], second.weights[0])


def test_options_that_cannot_be_are_refused():
    with pytest.raises(OptionError, match="check"):
        TrainingOptions(steps=3, checks=4)
    with pytest.raises(OptionError, match="learning_rate"):
        TrainingOptions(learning_rate=0.0)
