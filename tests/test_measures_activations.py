import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from moescope.measures.activations import (
    Activity,
    corrected,
    largest_differences,
    quantiles,
    same_index,
    selectivity,
    shuffled_labels,
)


def activity_of(units, values, emitted=None, *, number=3, threshold=0.5):
    found = Activity(number, values.shape[1], threshold)
    found.add(units, values, values if emitted is None else emitted)
    return found


def test_sums_by_hand():
    values = torch.tensor([[1.0, -0.4], [-2.0, 0.0], [0.5, 3.0]])
    found = activity_of(torch.tensor([0, 2, 2]), values, torch.tensor([[0.0, 1], [1, 1], [0, 0]]))
    assert found.tokens.tolist() == [1, 0, 2]
    assert found.active.tolist() == [1, 0, 2]  # 0.5 is not above the threshold
    assert found.emitting.tolist() == [1, 0, 2]
    torch.testing.assert_close(
        found.sums, torch.tensor([[1, 0.4], [0, 0], [2.5, 3]], dtype=torch.float64)
    )
    assert found.firing.tolist() == [2, 1]
    assert found.emitted.tolist() == [1, 2]
    expected = values.abs().numpy().std(0)
    assert found.spread == pytest.approx(expected, rel=1e-6)


def test_batches_add_up():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 4, generator=generator)
    units = torch.randint(3, (50,), generator=generator)
    whole = activity_of(units, values)
    parts = Activity(3, 4, 0.5)
    for some in torch.arange(50).split(7):
        parts.add(units[some], values[some], values[some])
    for name in ("tokens", "active", "sums", "squares", "firing", "emitted", "histogram"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_quantiles_are_those_of_the_values():
    values = torch.randn(4_000, 5, generator=torch.Generator().manual_seed(0)) * 3
    found = quantiles(activity_of(torch.zeros(4_000).long(), values).histogram, [0.05, 0.5, 0.95])
    expected = np.quantile(values.abs().numpy(), [0.05, 0.5, 0.95])
    assert found == pytest.approx(expected.tolist(), rel=0.015)


def test_quantiles_of_zeros_and_of_nothing():
    zeros = activity_of(torch.zeros(9).long(), torch.zeros(9, 2))
    assert quantiles(zeros.histogram, [0.5]) == [0]
    assert np.isnan(quantiles(Activity(1, 2, 0.5).histogram, [0.5])).all()


def documents(random, number, neurons=1, domains=2):
    """Sums, tokens and domains of documents that do not differ by domain."""
    tokens = random.integers(5, 40, number).astype(float)
    means = random.gamma(2.0, size=(number, neurons))
    return means * tokens[:, None], tokens, np.arange(number) % domains


def test_difference_and_its_error_by_hand(monkeypatch):
    monkeypatch.setattr("moescope.measures.activations.FEWEST_SELECTIVE", 2)
    sums, tokens = np.array([[6.0], [1.0], [2.0], [8.0]]), np.array([2.0, 1.0, 2.0, 4.0])
    labels = np.array([[0, 0, 1, 1], [0, 1, 0, 1]])
    found = selectivity(sums, tokens, np.array([0.5]), labels)
    # Means 7/3 and 10/6; residuals 4/3, -4/3 and -4/3, 4/3, each side's squares times 2/(2 - 1).
    assert found.difference[0] == pytest.approx([2 / 3 / 0.5, -2 / 3 / 0.5])
    error = np.sqrt(2 * 2 * (4 / 3) ** 2 * (1 / 3**2 + 1 / 6**2))
    other = np.sqrt(2 * (2 * 2**2 / 4**2 + 2 * (4 / 5) ** 2 / 5**2))  # means 2, 9/5
    studentised = np.array([2 / 3 / error, 1 / 5 / other])
    assert found.total == pytest.approx(studentised * error / 0.5)


def test_a_neuron_of_one_domain_has_the_least_p():
    random = np.random.default_rng(0)
    sums, tokens, domain_of = documents(random, 60, neurons=3)
    sums[:, 1] = tokens * (domain_of == 1)
    labels = shuffled_labels(domain_of, 199, seed=0)
    found = selectivity(sums, tokens, np.ones(3), labels)
    p = corrected(found.z, found.largest_z)
    assert found.p_value[1, 1] == p[1, 1] == 1 / 200
    assert p[[0, 2]].min() > 0.05
    assert found.difference[1].tolist() == pytest.approx([-1, 1])
    assert (p >= found.p_value - 1e-12).all()


def test_p_is_uniform_where_labels_mean_nothing():
    p = []
    for seed in range(1_000):
        random = np.random.default_rng(seed)
        sums, tokens, domain_of = documents(random, 16)
        found = selectivity(sums, tokens, np.ones(1), shuffled_labels(domain_of, 19, seed))
        p.append(found.p_value[0, 0])
    counts = np.bincount(np.rint(np.array(p) * 20).astype(int), minlength=21)[1:]
    assert chisquare(counts).pvalue > 0.001


def test_p_corrected_is_uniform_over_all_neurons_and_domains():
    smallest = []
    for seed in range(1_000):
        random = np.random.default_rng(seed)
        sums, tokens, domain_of = documents(random, 24, neurons=4, domains=3)
        sums[:, 1] = sums[:, 0]  # one neuron twice
        found = selectivity(sums, tokens, np.ones(4), shuffled_labels(domain_of, 19, seed))
        smallest.append(corrected(found.z, found.largest_z).min())
    counts = np.bincount(np.rint(np.array(smallest) * 20).astype(int), minlength=21)[1:]
    assert chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("fewer", ["tokens", "documents"])
def test_a_domain_of_which_less_is_seen_is_not_selective_for_that(fewer):
    """Its means are noisier than those of as many shuffled documents of all domains."""
    neuron, layer = [], []
    for seed in range(300):
        random = np.random.default_rng(seed)
        domain_of = np.repeat(np.arange(4), 40)
        tokens = random.integers(20, 80, 160)
        if fewer == "tokens":
            tokens[domain_of == 0] = random.integers(1, 5, 40)
        spread = np.where((domain_of > 0) & (fewer == "documents"), 0.5, 1)  # means of four
        means = 5 + random.normal(size=(160, 4)) * spread[:, None]
        means += 3 * random.normal(size=(160, 4)) / np.sqrt(tokens)[:, None]
        labels = shuffled_labels(domain_of, 99, seed)
        found = selectivity(means * tokens[:, None], tokens.astype(float), np.ones(4), labels)
        neuron.append(corrected(found.z, found.largest_z).min())
        layer.append((found.evidence >= found.evidence[0] - 1e-9).mean())
    for p in (neuron, layer):
        assert (np.array(p) <= 0.05).mean() < 0.08  # 2.4 standard deviations above 0.05


def test_a_domain_of_few_documents_is_not_tested():
    sums, tokens, domain_of = documents(np.random.default_rng(0), 40)
    sums[:, 0] = tokens * (domain_of == 1)
    tokens[np.flatnonzero(domain_of)[7:]] = 0
    sums[tokens == 0] = 0
    found = selectivity(sums, tokens, np.ones(1), shuffled_labels(domain_of, 99, 0))
    assert (found.p_value == 1).all()
    assert found.difference[0].tolist() == pytest.approx([-1, 1])


def test_chunks_of_neurons_change_nothing(monkeypatch):
    sums, tokens, domain_of = documents(np.random.default_rng(0), 30, neurons=7)
    labels = shuffled_labels(domain_of, 50, seed=0)
    whole = selectivity(sums, tokens, np.ones(7), labels)
    monkeypatch.setattr("moescope.measures.activations._CELLS_AT_ONCE", 51 * 2 * 3)
    for one, other in zip(selectivity(sums, tokens, np.ones(7), labels), whole, strict=True):
        np.testing.assert_allclose(one, other)


def test_sides_without_tokens_or_spread_differ_by_nothing():
    labels = np.array([[0, 0, 1], [0, 1, 0]])
    sums, tokens = np.array([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]), np.array([1.0, 1.0, 0.0])
    found = selectivity(sums, tokens, np.array([1.0, 0.0]), labels)
    assert (found.difference == 0).all()


def test_differences_with_documents_left_out():
    sums, tokens, domain_of = documents(np.random.default_rng(0), 12, neurons=3, domains=3)
    kept = np.ones((2, 12))
    kept[1, 4] = 0
    found = largest_differences(sums, tokens, np.ones(3), domain_of, kept)
    some = np.arange(12) != 4
    for value, rows in zip(found, (slice(None), some), strict=True):
        expected = selectivity(sums[rows], tokens[rows], np.ones(3), domain_of[None, rows])
        assert value == pytest.approx(expected.total[0])


def test_equal_experts_agree_number_by_number():
    matrix = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    found = same_index([matrix, 3 * matrix, matrix], draws=99, seed=0)
    assert found.same == pytest.approx(1, abs=1e-6)
    unit = matrix / matrix.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).numpy()
    expected = cosines[~np.eye(20, dtype=bool)].mean()
    assert found.other == pytest.approx(expected, abs=1e-6)
    assert found.paired.max() < 0.5
    assert found.paired.mean() == pytest.approx(0, abs=0.1)


def test_experts_with_their_neurons_in_another_order_do_not():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 16, generator=generator)
    found = same_index([matrix, matrix[torch.randperm(40, generator=generator)]], draws=199, seed=0)
    same = found.same[0, 1]
    assert 0.02 < (found.paired >= same).mean() < 0.98
