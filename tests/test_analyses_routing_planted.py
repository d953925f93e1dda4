"""Routing made by hand: what was planted is found, and nothing else."""

import numpy as np
import pytest

import moescope
from moescope.captures.read import Capture
from moescope.corpora.corpus import RESERVED_DOMAIN
from routing_zoo import chosen, write_capture

EXPERTS, DOCUMENTS, LENGTH = 6, 40, 50
QUICK = {"permutations": 19, "bootstrap": 50}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Two layers, two of six experts per token, forty documents of fifty tokens.

    In layer 3, experts 0 and 1 always come together and the others at random; who has 2 there has
    5 in layer 7. Vocabulary index 4 goes to expert 3 always, others never. Logits of domain b lie
    8 higher for expert 0.
    """
    random = np.random.default_rng(0)
    documents = np.repeat(np.arange(DOCUMENTS), LENGTH)
    tokens = random.integers(5, 9, size=len(documents))
    first = chosen(np.ones((len(documents), 4)), 2, random) + 2
    first[random.random(len(documents)) < 0.3] = (0, 1)
    typical = random.random(len(documents)) < 0.05
    tokens[typical] = 4
    first[typical] = (3, 4)
    spare = (first == 3).any(1) & ~typical
    first[spare] = (4, 5)
    second = chosen(np.ones((len(documents), 5)), 2, random)
    follows = (first == 2).any(1)
    second[follows] = (5, 0)
    logits = random.normal(size=(2, len(documents), EXPERTS))
    logits[:, documents % 2 == 1, 0] += 8
    folder = tmp_path_factory.mktemp("planted")
    routing = {3: (first, logits[0]), 7: (second, logits[1])}
    write_capture(folder, routing, documents, tokens=tokens, shard_tokens=2 * LENGTH)
    return moescope.routing(folder, **QUICK), first, second, tokens, folder


def test_experts_that_come_together_are_found(planted):
    result, first, *_ = planted
    table = result.tables["coactivation"].query("layer == 3").set_index(["expert", "other"])
    both = ((first == 0).any(1) & (first == 1).any(1)).sum()
    row = table.loc[(0, 1)]
    assert row.tokens == both
    assert row.share == 1
    assert row.low > 1.5
    assert row.n_tokens == (first == 0).any(1).sum()
    assert table.loc[(0, 4)].tokens == 0
    assert table.loc[(0, 4)].lift == 0
    assert len(table) == EXPERTS * (EXPERTS - 1)


def test_expected_company_keeps_the_sums(planted):
    result, *_ = planted
    table = result.tables["coactivation"].query("layer == 3")
    sums = table.groupby("expert")[["share", "expected"]].sum()
    assert sums.share.to_numpy() == pytest.approx(1)  # with two per token, one other
    assert sums.expected.to_numpy() == pytest.approx(1, abs=1e-3)


def test_paths_to_the_next_layer_are_found(planted):
    result, first, second, *_ = planted
    table = result.tables["transitions"].set_index(["expert", "next_expert"])
    assert set(table.layer) == {3}
    assert set(table.next_layer) == {7}
    here, there = (first == 2).any(1), (second == 5).any(1)
    row = table.loc[(2, 5)]
    assert row.share == 1
    assert row.expected == pytest.approx(there.mean())
    assert row.lift == pytest.approx(1 / there.mean())
    assert row.low > 2
    assert row.tokens == (here & there).sum()


def test_the_typical_token_is_found_with_its_place(planted):
    result, first, _, tokens, folder = planted
    table = result.tables["tokens"].query("layer == 3")
    best = table[(table.expert == 3) & (table["rank"] == 1)].iloc[0]
    assert best.token_id == 4
    assert best.token == "'4'"
    assert best.share == 1
    assert best.n_tokens == (tokens == 4).sum()
    assert best.lift == pytest.approx(1 / (first == 3).any(1).mean())
    documents = Capture(folder).documents.numpy()
    places = np.flatnonzero(tokens == 4)
    _, firsts = np.unique(documents[places], return_index=True)
    for number, place in enumerate(places[firsts][:3], start=1):
        same = np.flatnonzero(documents == documents[place])
        words = [
            f"[{tokens[i]}]" if i == place else str(tokens[i]) for i in same if abs(i - place) <= 8
        ]
        expected = " ".join(words).replace(" [", "[").replace("] ", "]")
        assert best[f"context_{number}"] == expected


def test_rare_tokens_are_not_typical(planted):
    *_, folder = planted
    result = moescope.routing(folder, least_count=10_000, **QUICK)
    assert result.tables["tokens"].empty


def test_components_part_the_domains(planted):
    result, *_ = planted
    points = result.tables["pca"].query("layer == 3")
    assert points.domain.value_counts().to_dict() == {"a": 200, "b": 200}
    sides = points.groupby("domain").pc1
    assert sides.max().min() < sides.min().max()  # no overlap
    logits = result.tables["logits"]
    assert (logits.p_value == 1 / 20).all()
    assert (logits.between_domains > 0.4).all()
    assert (logits.null_p95 < 0.1).all()


def test_the_sample_carries_its_own_labels(planted):
    result, *_, folder = planted
    capture = Capture(folder)
    points = result.tables["pca"].query("layer == 7")
    documents = capture.documents[points.token.tolist()].numpy()
    assert (points.document == documents).all()
    assert (points.domain == np.array(["a", "b"])[documents % 2]).all()


def test_concentration_by_domain(tmp_path):
    """Domain a uses two experts alike, b eight of eight."""
    documents = np.repeat(np.arange(80), 16)
    tokens = np.arange(len(documents))
    experts = np.where(documents % 2 == 0, tokens % 2, tokens % 8)[:, None]
    write_capture(tmp_path, {0: (experts, np.zeros((len(documents), 8)))}, documents)
    result = moescope.routing(tmp_path, **QUICK)
    table = result.tables["concentration"].set_index("domain")
    assert table.loc["a"].experts_for_half == 1
    assert table.loc["b"].experts_for_half == 4
    assert table.entropy_bits[["a", "b"]].tolist() == [1, 3]
    assert table.busiest_k_share[["a", "b"]].tolist() == [1 / 2, 1 / 8]
    every = table.loc[RESERVED_DOMAIN]
    assert every.busiest_k_share == pytest.approx((1 / 2 + 1 / 8) / 2)
    assert every.n_tokens == len(documents)
    assert result.tables["coactivation"].empty  # one expert per token


def test_a_group_of_documents_without_capacity(tmp_path):
    """All tokens of some documents are dropped in one layer, of others in the next."""
    random = np.random.default_rng(2)
    documents = np.repeat(np.arange(64), 10)
    here, there = random.integers(0, 3, size=(2, len(documents), 1))
    here[documents % 32 == 5], there[documents % 32 == 6] = -1, -1  # 32 groups, turn by turn
    logits = np.zeros((len(documents), 3))
    write_capture(tmp_path, {0: (here, logits), 1: (there, logits)}, documents, domains=("a",))
    table = moescope.routing(tmp_path, **QUICK).tables["transitions"]
    row = table.set_index(["expert", "next_expert"]).loc[(2, 1)]
    assert row.tokens == ((here == 2) & (there == 1)).sum()
    assert row.expected == pytest.approx((there == 1).mean())
    assert row.low < row.lift < row.high
    assert len(table) == 9


def test_of_many_experts_only_pairs_far_from_chance_are_told(tmp_path):
    random = np.random.default_rng(3)
    documents = np.repeat(np.arange(64), 10)
    experts = chosen(np.ones((len(documents), 80)), 4, random)
    routing = {0: (experts, np.zeros((len(documents), 80)))}
    write_capture(tmp_path, routing, documents, shard_tokens=200)
    result = moescope.routing(tmp_path, **QUICK)
    table = result.tables["coactivation"]
    assert set(table.groupby("expert").size()) == {64}
    measured = table[table.low.notna()]
    pairs = {frozenset(pair) for pair in measured[["expert", "other"]].itertuples(index=False)}
    (said,) = [found for found in result.findings if "share a token" in found.text]
    assert said.numbers["pairs"] == len(pairs)
    assert len(pairs) > (measured.expert < measured.other).sum()  # some stand in one row alone
    assert "one in twenty" not in said.text


def test_more_documents_than_are_kept_apart(tmp_path):
    """Shares are of all tokens; intervals and shuffles of some documents."""
    random = np.random.default_rng(1)
    documents = np.repeat(np.arange(200), 20)
    experts = chosen(random.random((200, 6)).repeat(20, 0), 2, random)
    write_capture(tmp_path, {0: (experts, np.zeros((len(documents), 6)))}, documents)
    every = moescope.routing(tmp_path, **QUICK)
    some = moescope.routing(tmp_path, documents=40, **QUICK)
    assert some.table.share.tolist() == every.table.share.tolist()
    assert (some.table.n_documents == every.table.n_documents).all()
    assert ((some.table.low <= some.table.share) & (some.table.share <= some.table.high)).all()
    widths = [(result.table.high - result.table.low).mean() for result in (every, some)]
    assert widths[1] > 1.2 * widths[0]
    assert some.tables["divergence"].n_documents.tolist() == [80]
