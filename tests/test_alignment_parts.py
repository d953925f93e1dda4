"""The parts of a fit, each against a hand-computed case or an independent reference."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn
from torch.nn import functional

from alignment_zoo import documents, expert, normalised, samples
from moescope.alignment import score
from moescope.alignment.constant import constant_adapters
from moescope.alignment.controls import (
    all_random,
    hidden_rotation,
    linear_map,
    project_on_outputs,
    rotation_for,
    same_output_space,
)
from moescope.alignment.domains import Domain
from moescope.alignment.fit import fit
from moescope.alignment.published import initial_adapter, train_as_published
from moescope.alignment.randomness import generator
from moescope.alignment.samples import Samples
from moescope.alignment.score import Errors, score_of
from moescope.alignment.solver import Clock
from moescope.alignment.stack import ExpertStack, same_shape
from moescope.alignment.whitening import Whitening
from moescope.experts.weights import ExpertWeights


class PublishedAdapter(nn.Module):
    """The study's adapter, written with modules."""

    def __init__(self, hidden):
        super().__init__()
        self.linear = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x):
        return self.norm(self.linear(x))


def test_published_loop_equals_the_straightforward_one():
    source, targets = expert(seed=1), [expert(seed=3), expert(seed=4)]
    x = normalised(300)
    train = Samples(x, source(x))
    adapters, printed = train_as_published(train, targets, seed=5)
    for i, target in enumerate(targets):
        torch.manual_seed(5)
        module = PublishedAdapter(16)
        optimiser = torch.optim.Adam(module.parameters(), lr=1e-3)
        for _ in range(10):
            optimiser.zero_grad()
            moved = module(x)
            given = (functional.silu(moved @ target.gate.T) * (moved @ target.up.T)) @ target.down.T
            loss = functional.mse_loss(given, train.outputs)
            loss.backward()
            optimiser.step()
        assert float(printed[i]) == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(adapters.weight[i], module.linear.weight, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(adapters.shift[i], module.norm.bias, atol=1e-6, rtol=1e-5)


def test_published_protocol_prints_the_training_error_of_the_tenth_pass():
    source, target = expert(seed=1), expert(seed=3)
    train, held_out = samples(source, normalised(600))
    published = fit(train, held_out, target, source=source, protocol="published", seed=5)
    converged = fit(train, held_out, target, source=source, controls=False, seed=5)
    _, printed = train_as_published(train, [target], seed=5)
    assert published.published_mse == converged.published_mse == float(printed[0])
    assert (published.steps, published.converged, published.protocol) == (10, False, "published")
    assert math.isfinite(published.fvu_self)
    assert published.fvu > converged.fvu


def test_output_floor_by_hand():
    """Outputs in a plane, a target that emits one line of it: the other direction is the floor."""
    target = ExpertWeights(
        None,
        torch.ones(1, 3),
        torch.tensor([[2.0], [0.0], [0.0]]),
        down_bias=torch.tensor([0.0, 5.0, 0.0]),
    )
    y = torch.tensor([[1.0, 4.0, 0.0], [-3.0, 6.0, 0.0]])
    assert project_on_outputs(y, target).tolist() == [[1.0, 5.0, 0.0], [-3.0, 5.0, 0.0]]


def test_no_floor_where_the_target_reaches_everything():
    y = normalised(20)
    torch.testing.assert_close(project_on_outputs(y, expert(16, 24)), y, atol=1e-5, rtol=1e-4)


def test_constant_adapter_reaches_the_mean_where_it_can():
    """down has rank 1: the best constant is the projection of the mean on its column."""
    column = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    target = ExpertWeights(None, torch.eye(4)[:1], column, "relu")
    y = torch.tensor([[4.0, 0.0, 1.0, 0.0], [2.0, 2.0, 1.0, 0.0]])  # mean (3, 1, 1, 0)
    inputs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    domain = Domain.of(inputs, 0.01, generator(0, "test"))
    stack = ExpertStack.of([target], y.device)
    adapter = constant_adapters(y, stack, [domain]).adapter(0)
    expected = torch.tensor([[2.0, 2.0, 0.0, 0.0]])  # (3 + 1) / 2 along the column
    torch.testing.assert_close(target(adapter(torch.randn(1, 4))), expected, atol=0.02, rtol=0)


def test_hidden_rotation_is_undone_by_the_rotation():
    source, x = expert(seed=1), normalised(50)
    rotation = rotation_for(16, 0, "source")
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(16), atol=1e-5, rtol=0)
    turned = hidden_rotation(source, rotation)
    torch.testing.assert_close(turned(x @ rotation.T), source(x), atol=1e-4, rtol=1e-4)


def test_random_targets_match_norms():
    target = expert(seed=1)
    for random in same_output_space(target, 0, "t"):
        assert torch.equal(random.down, target.down)
        torch.testing.assert_close(random.gate.norm(dim=1), target.gate.norm(dim=1))
        assert not torch.allclose(random.gate, target.gate)
    neurons = {
        tuple(round(float(v), 4) for v in row)
        for row in torch.stack([target.up.norm(dim=1), target.down.norm(dim=0)], 1)
    }
    for random in all_random([target], 0):
        rows = torch.stack([random.up.norm(dim=1), random.down.norm(dim=0)], 1)
        drawn = {tuple(round(float(v), 4) for v in row) for row in rows}
        near = [min(abs(a - c) + abs(b - d) for c, d in neurons) for a, b in drawn]
        assert max(near) < 1e-3
    gates = [r.gate for r in [*same_output_space(target, 0, "t"), *all_random([target], 0)]]
    assert all(not torch.equal(a, b) for i, a in enumerate(gates) for b in gates[:i])


def test_linear_map_is_ridge_with_a_penalty_chosen_inside():
    g = torch.Generator().manual_seed(0)
    x = normalised(120)
    y = x @ torch.randn(16, 16, generator=g) + 3 * torch.randn(120, 16, generator=g)
    train, inner = Samples(x[:60], y[:60]), Samples(x[60:90], y[60:90])
    predicted = linear_map(train, inner)(x[90:])
    level = float((x[:60] - x[:60].mean(0)).square().mean()) * 60
    penalties = [10 ** (e / 2) for e in range(-12, 5)]
    errors = [
        ((Ridge(p * level).fit(x[:60], y[:60]).predict(x[60:90]) - y[60:90].numpy()) ** 2).sum()
        for p in penalties
    ]
    best = penalties[int(np.argmin(errors))]
    assert penalties[0] < best < penalties[-1]
    level = float((x[:90] - x[:90].mean(0)).square().mean()) * 90
    reference = Ridge(best * level).fit(x[:90], y[:90]).predict(x[90:])
    torch.testing.assert_close(predicted, torch.from_numpy(reference).float(), atol=1e-3, rtol=1e-3)


def test_whitening_and_folding():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2_000, 16, generator=g) @ torch.randn(16, 16, generator=g)
    x = x * torch.logspace(-1, 1, 16) + 3
    white = Whitening.of(x, 0.0)(x)
    torch.testing.assert_close(torch.cov(white.T, correction=0), torch.eye(16), atol=1e-2, rtol=0)
    torch.testing.assert_close(white.mean(0), torch.zeros(16), atol=1e-2, rtol=0)
    assert Whitening.of(normalised(100), 0.0)(normalised(100)).isfinite().all()  # singular
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(1, 16, 16, generator=g), torch.randn(1, 16, generator=g)
    shrunken = Whitening.of(x, 0.01)
    plain, moved = shrunken.fold(weight, bias)
    expected = shrunken(x) @ weight[0].T + bias[0]
    torch.testing.assert_close(x @ plain[0].T + moved[0], expected, atol=1e-2, rtol=1e-3)


def test_split_keeps_documents_whole():
    everything = Samples(normalised(400), normalised(400), documents(400, 20))
    rest, aside = everything.split(0.2, generator(0, "split"))
    assert len(rest) + len(aside) == 400
    assert not set(rest.documents.tolist()) & set(aside.documents.tolist())
    assert 60 <= len(aside) <= 100
    one = Samples(normalised(100), normalised(100), torch.zeros(100, dtype=torch.int64))
    assert len(one.split(0.2, generator(0, "split"))[1]) == 20


@pytest.mark.parametrize(
    "sizes",
    [[5_000, 50, 50], [5_000, 1], [300, 300], [100] * 7 + [900], [40, 60, 90, 150, 700], [3, 2]],
)
def test_split_never_sets_a_giant_document_aside(sizes):
    of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    numbered = torch.arange(len(of))[:, None].float()
    for seed in range(50):
        rest, aside = Samples(numbered, numbered, of).split(0.2, generator(seed, "split"))
        wanted = max(1, round(0.2 * len(of)))
        assert wanted / 2 <= len(aside) <= 2 * wanted
        assert len(rest) >= len(of) / 2
        tokens = torch.cat([rest.inputs, aside.inputs])[:, 0]
        assert torch.equal(tokens.sort().values, numbered[:, 0])


def test_split_takes_small_documents_whole_before_tokens_of_a_giant():
    of = torch.repeat_interleave(torch.arange(3), torch.tensor([5_000, 50, 50]))
    everything = Samples(normalised(5_100), normalised(5_100), of)
    rest, aside = everything.split(0.2, generator(0, "split"))
    assert rest.documents.unique().tolist() == [0]
    assert aside.documents.bincount().tolist() == [920, 50, 50]


def test_stack_equals_each_expert():
    plain = ExpertWeights(None, torch.randn(5, 16), torch.randn(16, 5), "gelu")
    experts = [expert(seed=1), plain, expert(seed=2), expert(16, 8)]
    assert same_shape(experts) == [[0, 2], [1], [3]]
    stack = ExpertStack.of([experts[0], experts[2]], torch.device("cpu"))
    x = torch.randn(2, 7, 16)
    expected = torch.stack([experts[0](x[0]), experts[2](x[1])])
    torch.testing.assert_close(stack(x), expected, atol=1e-4, rtol=1e-4)


def errors(*, pair, linear, ceiling, random, number=40):
    """Every document has the same FVUs, up to a little noise in the pair's."""
    ones = np.ones(number)
    noise = 1 + 0.05 * np.random.default_rng(0).standard_normal(number)
    return Errors(
        total=ones,
        pair=pair * ones * noise / noise.mean(),
        linear=linear * ones,
        ceiling=ceiling * ones,
        random=np.array([[[value] * number for value in kind] for kind in random]),
    )


def test_score_by_hand():
    even = [[0.8] * 5, [0.9] * 5]  # the first kind is the stronger one
    above = score_of(errors(pair=0.4, linear=0.9, ceiling=0.2, random=even), 0)
    assert above.value == pytest.approx((0.8 - 0.4) / (0.8 - 0.2))
    assert above.low < above.value < above.high
    linear = score_of(errors(pair=0.4, linear=0.5, ceiling=0.2, random=even), 0)
    assert linear.value == pytest.approx((0.5 - 0.4) / (0.5 - 0.2))
    one = score_of(errors(pair=1.2, linear=2.0, ceiling=0.2, random=[[3.0] * 5] * 2), 0)
    assert one.value == pytest.approx(-0.2 / 0.8)


def test_score_interval_holds_the_spread_of_the_random_targets():
    uneven = [[0.6, 0.7, 0.8, 0.9, 1.0], [0.7, 0.8, 0.9, 1.0, 1.1]]
    narrow, wide = (
        score_of(errors(pair=0.4, linear=2.0, ceiling=0.2, random=random), 0)
        for random in ([[0.8] * 5] * 2, uneven)
    )
    assert wide.value == pytest.approx(narrow.value)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_a_null_drawn_below_the_ceiling_does_not_turn_the_sign():
    """A pair worse than a null of 0.15 is no evidence, though the ceiling is 0.2."""
    totals = np.array([[1.0, 0.4, 2.0, 0.2, 0.15]])  # total, pair, linear, ceiling, random
    shares = score._Shares.of(totals, 1)
    assert shares.score(shares.random.mean(2))[0] == pytest.approx(-0.25 / 0.05)


def test_no_score_where_null_and_ceiling_meet():
    near = score_of(errors(pair=0.4, linear=0.24, ceiling=0.2, random=[[0.8] * 5] * 2), 0)
    assert math.isnan(near.value)
    few = score_of(errors(pair=0.4, linear=0.5, ceiling=0.2, random=[[0.8] * 5] * 2, number=29), 0)
    assert math.isfinite(few.value)
    assert math.isnan(few.low)


def test_the_schedule_follows_steps_or_time_whichever_is_further():
    assert Clock(100, None).share(25) == 0.25
    assert Clock(100, 1e-9).share(0) == 1.0
    assert Clock(100, 1e9).share(100) == 1.0


def test_the_published_start_is_that_of_a_linear_layer_and_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    weight, bias = initial_adapter(24, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        layer = torch.nn.Linear(24, 24)
    assert torch.equal(weight, layer.weight)
    assert torch.equal(bias, layer.bias)
