"""What a lens decodes: parts that add up, by hand and by the model's own states."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import deviants_zoo
import families_zoo
import models_zoo
from moescope.decoding import lens as decoding
from moescope.decoding.columns import Column, columns_of, watch
from moescope.decoding.endings import endings
from moescope.decoding.lens import decoded
from moescope.errors import ModelError
from moescope.models.discover import moe_layers
from moescope.models.observe import observe
from moescope.models.readout import Readout
from moescope.models.view import MoEModel

BUILDERS = {
    **{family: partial(families_zoo.build, family) for family in families_zoo.FAMILIES},
    **deviants_zoo.DEVIANTS,
}
# Added as it is, times a constant, normed, beside a shared expert, with and without capacity.
ADDED_UP = [
    ("afmoe", torch.float32),
    ("deepseek_v3", torch.bfloat16),
    ("flex_olmo", torch.bfloat16),
    ("granitemoeshared", torch.float32),
    ("llama4_text", torch.float32),
    ("nemotron_h", torch.float32),
]
MORE = ["beam", "cohere2_moe", "gemma4_text", "inkling_text", "longcat_flash", "minimax"]


def unproven(model):
    """As `load` has it, without the proof of the blocks, which other tests are about."""
    return MoEModel(model=model, tokenizer=None, layers=moe_layers(model), name="zoo")


def ids(rows=3, length=7):
    return torch.randint(97, (rows, length), generator=torch.manual_seed(1))


def watched(model, positions=None):
    readout = Readout.of(model)
    everywhere = torch.arange(ids().numel()) if positions is None else positions
    last, layers = watch(readout, endings(model), ids(), torch.ones_like(ids()), everywhere)
    return readout, last, layers


def columns(states):
    with torch.no_grad():
        return dict(states.columns())


@pytest.fixture(scope="module")
def model():
    return unproven(models_zoo.build("qwen2_moe"))


@pytest.mark.parametrize(("family", "dtype"), ADDED_UP, ids=str)
def test_all_experts_together_are_the_output_of_the_layer(family, dtype):
    _, _, layers = watched(unproven(BUILDERS[family]().to(dtype)))
    assert layers
    for states in layers:
        found = columns(states)
        every = found[Column("top", states.experts.shape[1])]
        error = (every - found[Column("output")]).norm() / found[Column("output")].norm()
        assert error < (1e-6 if dtype == torch.float32 else 5e-3)
        assert set(found) == set(columns_of(states.ending.layer))


@pytest.mark.parametrize("family", MORE)
def test_no_parts_where_the_layer_does_more_with_its_block(family):
    _, _, layers = watched(unproven(BUILDERS[family]()))
    for states in layers:
        assert list(columns(states)) == [Column("output"), Column("residual")]


@pytest.mark.parametrize("family", ["deepseek_v4", "hy_v4"])
def test_refuses_several_streams(family):
    with pytest.raises(ModelError, match="several streams"):
        endings(unproven(BUILDERS[family]()))


def test_refuses_a_decoder_without_experts():
    model = unproven(deviants_zoo.switch())
    encoder = [layer for layer in model.layers if layer.stack == "encoder"]
    with pytest.raises(ModelError, match="no sparse layer in its decoder"):
        endings(replace(model, layers=encoder))


def test_parts_by_hand(model):
    """Expert by expert and token by token, from the weights."""
    _, _, (states, _) = watched(model)
    layer, seen = model.layers[0], []
    with observe([layer], seen.append, residual=True), torch.no_grad():
        model.forward(ids())
    found, one = columns(states), seen[0]
    for token in (0, 8, 20):
        x, r = one.input[token], one.residual[token]
        pairs = zip(one.routing.weights[token], one.routing.experts[token].tolist(), strict=True)
        terms = [w * layer.expert_weights(e)(x[None])[0] for w, e in sorted(pairs, reverse=True)]
        shared = layer.shared_output(x[None])[0]
        expected = {
            Column("residual"): r,
            Column("shared"): r + shared,
            Column("top", 1): r + shared + terms[0],
            Column("top", 2): r + shared + terms[0] + terms[1],
            Column("added", 1): r + terms[0],
            Column("added", 2): r + terms[1],
            Column("alone", 1): terms[0],
            Column("alone", 2): terms[1],
        }
        for column, state in expected.items():
            torch.testing.assert_close(found[column][token], state, rtol=1e-4, atol=1e-5)


def test_layer_outputs_decode_as_transformers_has_them(model):
    readout, last, layers = watched(model)
    network = model.model
    with torch.no_grad():
        output = network(ids(), output_hidden_states=True)
        parts = {
            part.number: part
            for part in decoded(readout, last, layers)
            if part.column.kind == "output"
        }
        final = output.logits.flatten(0, 1).log_softmax(-1)
        middle = network.lm_head(network.model.norm(output.hidden_states[1])).flatten(0, 1)
    own = parts[0].log_probabilities
    torch.testing.assert_close(own, middle.log_softmax(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts[1].log_probabilities, final, rtol=1e-4, atol=1e-5)
    assert parts[1].divergence.max() < 1e-6
    assert parts[1].agreement.all()
    kl = [sum(p.exp() * (p - q)) for p, q in zip(final, middle.log_softmax(-1), strict=True)]
    torch.testing.assert_close(parts[0].divergence, torch.stack(kl), rtol=1e-4, atol=1e-5)
    same = final.argmax(1) == middle.argmax(1)
    assert parts[0].agreement.tolist() == same.float().tolist()
    targets = ids().flatten()
    torch.testing.assert_close(
        parts[0].loss(targets), torch.nn.functional.cross_entropy(middle, targets, reduction="none")
    )


def test_chunks_change_nothing(model, monkeypatch):
    positions = torch.tensor([1, 4, 5, 9, 15, 16, 20])
    readout, last, layers = watched(model, positions)

    def divergences():
        found = {}
        for part in decoded(readout, last, layers):
            found.setdefault((part.number, part.column), []).append(part.divergence)
        return {key: torch.cat(values) for key, values in found.items()}, found

    whole, _ = divergences()
    monkeypatch.setattr(decoding, "_VALUES_AT_ONCE", 3 * readout.vocabulary)
    pieces, parts = divergences()
    assert {len(values) for values in parts.values()} == {3}
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)


def test_positions_are_those_asked_for(model):
    _, last, layers = watched(model)
    chosen = torch.tensor([2, 11])
    _, some_last, some = watched(model, chosen)
    torch.testing.assert_close(some_last, last[chosen])
    torch.testing.assert_close(
        columns(some[1]), {column: states[chosen] for column, states in columns(layers[1]).items()}
    )


def test_slots_without_an_expert_are_no_column():
    """One token per expert and row finds capacity."""
    model = unproven(deviants_zoo.switch(expert_capacity=1))
    _, _, layers = watched(model)
    used = torch.stack([states.used(Column("alone", 1)) for states in layers])
    assert 0 < used.sum() < used.numel()
    found = columns(layers[0])
    nothing = ~layers[0].used(Column("alone", 1))
    residual = found[Column("residual")]
    torch.testing.assert_close(found[Column("top", 1)][nothing], residual[nothing])


def test_an_expert_that_writes_a_token_shows_it():
    """Its outputs are multiples of one token's unembedding; half of them positive."""
    model = unproven(models_zoo.build("olmoe"))
    layer, token, planted = model.layers[0], 41, 3
    direction = model.model.lm_head.weight[token] / model.model.model.norm.weight
    with torch.no_grad():
        layer.expert_tensors(planted)["down_proj"].copy_(direction[:, None])
    readout, last, layers = watched(model)
    shown = 0
    for part in decoded(readout, last, layers):
        if part.number == 0 and part.column.kind == "alone":
            state = columns(part.states)[part.column]
            own = part.states.experts[:, part.column.rank - 1] == planted
            named = part.log_probabilities.argmax(1) == token
            torch.testing.assert_close(named[own], (state @ direction > 0)[own])
            assert named[~own].float().mean() < 0.1
            shown += int(named[own].sum())
    assert shown >= 2
