"""What is refused or bounded before a fit: widths, ranks, protocols, few tokens."""

import math
import re
from dataclasses import replace

import pytest
import torch

from alignment_zoo import documents, expert, normalised, samples
from moescope.alignment.capacity import capacity_curve
from moescope.alignment.fit import fit
from moescope.alignment.forms import fitted_options, underdetermined
from moescope.alignment.learning import SHARES, learning_curve
from moescope.alignment.options import FitOptions, SolverOptions
from moescope.alignment.pairs import fit_pairs
from moescope.alignment.samples import Samples
from moescope.analyses.align.options import AlignOptions
from moescope.analyses.align.tokens import TARGET_ROWS, Tokens
from moescope.captures.read import Capture, Recorded
from moescope.errors import AlignmentError, OptionError

SOLVER = SolverOptions(steps=2)
OPTIONS = FitOptions(solver=SOLVER)


@pytest.fixture(scope="module")
def few():
    """77 training tokens of 24 dimensions, and 33 held-out documents."""
    return samples(expert(24, seed=1), normalised(110, 24), held_out=0.3, number=110)


@pytest.fixture(scope="module")
def tokens():
    return samples(expert(seed=1), normalised(240), number=80)


def of_16(outputs):
    """Tokens with inputs of width 16."""
    return Samples(normalised(len(outputs)), outputs)


def test_a_capacity_curve_refuses_what_does_not_fit(tokens):
    train, held_out = tokens
    with pytest.raises(AlignmentError, match="target target: the hidden size does not fit"):
        capacity_curve(train, held_out, expert(8))
    with pytest.raises(AlignmentError, match="the source: the hidden size does not fit"):
        capacity_curve(train, held_out, expert(), source=expert(8))
    broken = expert()
    broken.up[0, 0] = math.nan
    with pytest.raises(AlignmentError, match="up of target target hold NaN"):
        capacity_curve(train, held_out, broken)
    with pytest.raises(AlignmentError, match="inputs of target target hold NaN"):
        capacity_curve(train, held_out, expert(), target_inputs=torch.full((100, 16), math.nan))


@pytest.mark.parametrize("part", ["training", "held out"])
def test_a_capacity_curve_refuses_constant_outputs(tokens, part):
    train, held_out = tokens
    constant = of_16(torch.full((100, 16), 0.1))
    given = (constant, held_out) if part == "training" else (train, constant)
    with pytest.raises(AlignmentError, match="do not vary"):
        capacity_curve(*given, expert())


def test_a_capacity_curve_has_no_published_protocol(tokens):
    with pytest.raises(OptionError, match="capacity curve has no published protocol"):
        capacity_curve(*tokens, expert(), options=FitOptions(protocol="published"))
    with pytest.raises(OptionError, match="capacity curve has no published protocol"):
        AlignOptions(capacity=True, protocol="published")


def test_the_full_adapter_alone_has_no_advantage(tokens):
    capacity = capacity_curve(*tokens, expert(seed=3), ranks=(), options=OPTIONS)
    assert {point.rank for point in capacity.points} == {16}
    assert math.isnan(capacity.advantage)


def test_a_rank_above_the_hidden_size_is_the_hidden_size(tokens):
    train, held_out = tokens
    arguments = {"form": "low_rank", "solver": SOLVER, "source": expert(seed=1)}
    high = fit(train, held_out, expert(seed=3), rank=100, **arguments)
    full = fit(train, held_out, expert(seed=3), rank=16, **arguments)
    assert high.rank == high.adapter.rank == 16
    assert high.adapter_parameters == high.adapter.num_parameters
    assert str(high.row()) == str(full.row())  # NaN is not itself


@pytest.mark.parametrize(
    ("form", "rank", "first_enough"),
    [
        ("layer_norm", 16, 64 * 4),
        ("linear", 16, 64 * 4),
        ("orthogonal", 16, 64 * 4),
        ("low_rank", 10, 80),
        ("low_rank", 60, 64 * 4),  # never more freedom than the full matrix
        ("low_rank", 0, 0),
        ("scale", 16, 0),
        ("identity", 16, 0),
    ],
)
def test_forms_need_tokens_for_their_freedom(form, rank, first_enough):
    options = FitOptions(form=form, rank=rank)
    assert not underdetermined(options, first_enough, 64)
    if first_enough:
        assert underdetermined(options, first_enough - 1, 64)


def test_the_delta_in_place_of_a_matrix_is_determined():
    fitted = fitted_options(OPTIONS, 200, 64)
    assert (fitted.form, fitted.rank) == ("low_rank", 25)
    assert not underdetermined(fitted, 200, 64)
    published = replace(OPTIONS, protocol="published")
    assert fitted_options(published, 200, 64) == published
    assert underdetermined(published, 200, 64)


@pytest.mark.parametrize(
    ("form", "rank", "fitted", "status"),
    [
        ("layer_norm", 16, "low_rank", "underdetermined"),
        ("linear", 16, "linear", "underdetermined"),
        ("orthogonal", 16, "orthogonal", "underdetermined"),
        ("low_rank", 12, "low_rank", "underdetermined"),
        ("low_rank", 4, "low_rank", "ok"),
        ("scale", 16, "scale", "ok"),
        ("identity", 16, "identity", "ok"),
    ],
)
def test_the_status_is_that_of_the_form(few, form, rank, fitted, status):
    source = expert(24, seed=1)
    solver = SolverOptions(steps=20)  # fewer leave no room between ceiling and null
    found = fit(*few, source, source=source, form=form, rank=rank, solver=solver)
    assert (found.n_train, found.n_documents) == (77, 33)
    assert (found.form, found.status) == (fitted, status)


def test_the_published_protocol_has_one_form():
    for options in (FitOptions, AlignOptions):
        options(protocol="published")
        with pytest.raises(OptionError, match="no other form of adapter. Got: linear"):
            options(protocol="published", form="linear")


def test_no_targets_give_no_results(tokens):
    assert fit_pairs(*tokens, {}) == {}
    assert learning_curve(*tokens, {}) == []


def test_a_learning_curve_takes_its_shares(tokens):
    options = FitOptions(protocol="published", controls=False)
    rows = learning_curve(*tokens, {"other": expert(seed=3)}, options=options)
    assert [row["n_train"] for row in rows] == [
        len(tokens[0]) // share // 3 * 3 for share in (*SHARES, 1)
    ]


class _Numbered(Capture):
    """A capture of which every token is recorded, its number as input."""

    def __init__(self, documents):
        self.documents = documents

    def expert_samples(self, layer, experts):
        tokens = torch.arange(len(self.documents))
        values = tokens[:, None].expand(-1, 2).float()
        return dict.fromkeys(experts, Recorded(tokens, values))


def test_inputs_of_a_target_are_drawn_from_all_training_documents():
    number = 4 * TARGET_ROWS
    capture = _Numbered(documents(number, 8))
    held_out = torch.arange(8) == 5
    tokens = Tokens(capture=capture, held_out=held_out, most=10, seed=0)
    inputs = tokens.target_inputs(1, [3, 4])
    rows = inputs[3][:, 0].long()
    assert len(rows) == len(rows.unique()) == TARGET_ROWS
    assert set(capture.documents[rows].tolist()) == {0, 1, 2, 3, 4, 6, 7}
    assert torch.equal(inputs[3], tokens.target_inputs(1, [3])[3])
    other = replace(tokens, seed=1).target_inputs(1, [3])[3]
    assert not torch.equal(inputs[3], other)


def test_an_alignment_needs_tokens():
    with pytest.raises(OptionError, match=re.escape("max_tokens leaves no tokens. Got: 0.")):
        AlignOptions(max_tokens=0)
