"""Failures planted in routing made by hand: each is named, and a healthy router is not."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import tensor

import moescope
from captures_zoo import corpus
from deviants_zoo import switch
from moescope.analyses.health.analysis import health
from moescope.analyses.health.loss import marks
from moescope.analyses.registry import find
from moescope.captures.shards import write_shard
from moescope.errors import OptionError
from moescope.measures.expert_runs import Passages
from moescope.reports.registry import chapter
from routing_zoo import chosen, write_capture

EXPERTS, DOCUMENTS, LENGTH = 6, 80, 50
QUICK = {"permutations": 199, "bootstrap": 50, "shown_tokens": 30}
OWNER = np.repeat(np.arange(DOCUMENTS), LENGTH)


def write(run, routing, documents=OWNER, *, tokens=None, loss=None, **options):
    """A capture by hand, in whole documents per shard, with losses if there are any."""
    write_capture(run, routing, documents, tokens=tokens, shard_tokens=10 * LENGTH, **options)
    if loss is None:
        return run
    path = run / "capture" / "manifest.json"
    manifest = json.loads(path.read_text())
    for number, entry in enumerate(manifest["shards"]):
        content = load_file(run / "capture" / entry["file"])
        part = slice(entry["first_token"], entry["first_token"] + entry["tokens"])
        content["token_loss"] = tensor(loss[part], dtype=content["layer.0.weights"].dtype)
        about = {name: entry[name] for name in ("kind", "first_token", "tokens")}
        manifest["shards"][number] = write_shard(run / "capture", entry["file"], content, **about)
    manifest["options"]["record"].append("token_loss")
    path.write_text(json.dumps(manifest))
    return run


def healthy_layer(tokens, random):
    """Each word likes an expert, and so does each kind of text: three of the six."""
    liked = np.zeros((len(tokens), EXPERTS))
    liked[np.arange(len(tokens)), tokens % EXPERTS] = 1.5
    liked += np.where((np.arange(EXPERTS) < 3) == (OWNER % 2 == 0)[:, None], 0.6, 0)
    logits = liked + 0.5 * random.normal(size=liked.shape)
    return chosen(np.exp(logits), 2, random), logits


@pytest.fixture(scope="module")
def text():
    """Documents that prefer words of their own, and losses of no meaning."""
    random = np.random.default_rng(0)
    taste = random.dirichlet(np.full(2 * EXPERTS, 2.0), size=DOCUMENTS)
    tokens = np.concatenate(
        [random.choice(2 * EXPERTS, LENGTH, p=taste[i]) for i in range(DOCUMENTS)]
    )
    return tokens, random.exponential(size=len(tokens))


@pytest.fixture(scope="module")
def healthy(text, tmp_path_factory):
    tokens, loss = text
    random = np.random.default_rng(7)
    routing = {layer: healthy_layer(tokens, random) for layer in range(10)}
    run = write(tmp_path_factory.mktemp("healthy"), routing, tokens=tokens, loss=loss)
    return health(run, **QUICK)


def states(result, check, layer=0):
    return result.table.query("layer == @layer and check == @check").iloc[0]


def test_a_healthy_router_shows_no_sign_in_any_of_ten_layers(healthy):
    assert set(healthy.table.state) == {"no sign"}
    assert len(healthy.table) == 10 * 7


@pytest.mark.parametrize("check", ["unbalanced use", "neighbours alike", "worst tokens apart"])
def test_chance_alone_is_rarely_low(healthy, check):
    """Of ten layers, p before correction is under 1/10 in one on average; five are too many."""
    p_values = healthy.table.query("check == @check").p_corrected
    assert (p_values < 1).sum() < 5


def test_a_router_of_two_experts_is_unbalanced_blind_and_has_dead_experts(text, tmp_path):
    tokens, loss = text
    logits = np.tile([5.0, 4.0, 0, 0, 0, 0], (len(tokens), 1))
    run = write(
        tmp_path, {0: (np.tile([0, 1], (len(tokens), 1)), logits)}, tokens=tokens, loss=loss
    )
    result = health(run, **QUICK)
    unbalanced = states(result, "unbalanced use")
    assert unbalanced.value == pytest.approx(2)
    assert "experts 0, 1 above and experts 2, 3, 4, 5 below K/E" in unbalanced.verdict
    blind = states(result, "blind to the token")
    assert blind.value == 0
    assert blind.verdict.startswith("sign: ")
    assert "the 2 busiest take 100.0% of the routing" in blind.verdict
    assert "experts 2, 3, 4, 5 never used in 4,000 tokens" in states(result, "dead experts").verdict
    assert states(result, "blind to the domain").state == "sign"
    assert states(result, "undecided router").state == "no sign"
    assert states(result, "worst tokens apart").state == "no sign"
    rates = result.tables["layers"].iloc[0]
    assert [rates.switch_rate, rates.switch_shuffled, rates.switch_independent] == [0, 0, 0]


def test_a_dead_expert_is_named_and_bounded(text, tmp_path):
    tokens, loss = text
    random = np.random.default_rng(1)
    weights = np.exp(healthy_layer(tokens, random)[1])
    weights[:, 4] = 1e-9
    routing = {0: (chosen(weights, 2, random), np.log(weights))}
    result = health(write(tmp_path, routing, tokens=tokens, loss=loss), **QUICK)
    verdict = states(result, "dead experts")
    assert verdict.value == 1
    assert verdict.verdict.startswith("sign: expert 4 never used in 4,000 tokens")
    table = result.tables["experts"].set_index("expert")
    assert table.loc[4].low == 0
    assert 3 / 4_000 <= table.loc[4].high < 3 / 500  # of independent tokens, fewer than there are
    assert (table.drop(4).low > table.loc[4].high).all()


def test_an_undecided_router_does_not_tell_experts_apart(text, tmp_path):
    tokens, _ = text
    random = np.random.default_rng(2)
    logits = 1e-3 * random.normal(size=(len(tokens), EXPERTS))  # no ties
    routing = {0: (np.argsort(-logits, 1)[:, :2], logits)}
    result = health(write(tmp_path, routing, tokens=tokens), **QUICK)
    assert states(result, "undecided router").state == "sign"
    assert states(result, "undecided router").value == pytest.approx(1, abs=1e-5)
    assert states(result, "blind to the token").state == "sign"
    assert states(result, "blind to the domain").state == "sign"
    assert states(result, "unbalanced use").state == "no sign"
    assert states(result, "neighbours alike").state == "no sign"
    assert (result.tables["layers"].negative_margins == 0).all()


def test_what_few_tokens_do_not_show_is_not_called_a_failure(tmp_path):
    """Few tokens of many words; and documents that have one expert each, so that few are many."""
    random = np.random.default_rng(3)
    some = np.arange(len(OWNER)) % LENGTH < 4
    tokens = random.integers(0, 200, len(OWNER))[some]
    faint = random.normal(size=(len(tokens), EXPERTS))
    taste = 4 * random.normal(size=(DOCUMENTS, EXPERTS))[OWNER[some]]
    routing = {i: (chosen(np.exp(x), 2, random), x) for i, x in enumerate((faint, taste))}
    result = health(write(tmp_path, routing, OWNER[some], tokens=tokens), **QUICK)
    for layer, check in enumerate(("blind to the token", "blind to the domain")):
        row = states(result, check, layer)
        assert row.p_corrected > 0.05
        assert row.verdict.startswith("cannot tell: not shown")
        assert "may have been missed" in row.verdict


def test_entropies_on_both_sides_of_rounding_cannot_tell(text, tmp_path):
    tokens, _ = text
    logits = np.zeros((len(tokens), EXPERTS))
    logits[OWNER % 20 == 0, 0] = 1.5
    logits += 1e-3 * np.random.default_rng(2).normal(size=logits.shape)
    run = write(tmp_path, {0: (np.argsort(-logits, 1)[:, :2], logits)}, tokens=tokens)
    row = states(health(run, **QUICK), "undecided router")
    assert row.low < 1 - 1 / 256 <= row.high
    assert row.verdict.startswith("cannot tell: ")


@pytest.mark.parametrize("block", [5, LENGTH])
def test_planted_runs_are_recovered(tmp_path, block):
    """An expert for `block` tokens, another one for the next."""
    experts = (np.arange(len(OWNER)) // block % EXPERTS)[:, None]
    result = health(write(tmp_path, {0: (experts, np.eye(EXPERTS)[experts[:, 0]])}), **QUICK)
    assert result.tables["runs"].mean_run.to_numpy() == pytest.approx(block)
    rates = result.tables["layers"].iloc[0]
    assert rates.switch_rate == pytest.approx((LENGTH // block - 1) / (LENGTH - 1))
    if block == LENGTH:  # shuffling a passage of one expert changes nothing
        assert states(result, "neighbours alike").state == "no sign"
        assert rates.switch_shuffled == 0
    else:
        assert "stays for the next token" in states(result, "neighbours alike").verdict


def test_independent_tokens_switch_by_the_formula(healthy, tmp_path):
    random = np.random.default_rng(4)
    weights = np.tile([8.0, 4, 2, 1, 1, 1], (len(OWNER), 1))
    experts = chosen(weights, 2, random)
    result = health(write(tmp_path, {0: (experts, np.log(weights))}), **QUICK)
    share = np.bincount(experts.ravel(), minlength=EXPERTS) / len(OWNER)
    rates = result.tables["layers"].iloc[0]
    assert rates.switch_independent == pytest.approx(1 - (share**2).sum() / 2)
    assert rates.switch_rate == pytest.approx(rates.switch_independent, abs=0.02)
    runs = result.tables["runs"]
    assert runs.independent.to_numpy() == pytest.approx(1 / (1 - share))
    # Passages end: their runs are a little shorter than those of endless text.
    assert runs.mean_run.to_numpy() == pytest.approx(runs.shuffled.to_numpy(), rel=0.06)
    assert "unbalanced use" in set(result.table.query("state == 'sign'").check)


def test_worst_tokens_of_their_own_experts_are_found(text, tmp_path):
    tokens, _ = text
    random = np.random.default_rng(5)
    experts, logits = healthy_layer(tokens, random)
    loss = (experts == 5).any(1) + random.random(len(tokens))
    logits[:, 5] += 3 * (experts == 5).any(1)
    result = health(write(tmp_path, {0: (experts, logits)}, tokens=tokens, loss=loss), **QUICK)
    assert states(result, "worst tokens apart").state == "sign"
    entropy = result.tables["loss"].iloc[0]
    assert entropy.high < 0
    assert entropy.n_tokens == DOCUMENTS * LENGTH // 10


def test_marks_are_the_ends_of_each_passage():
    loss = np.arange(25.0)
    loss[3] = np.nan
    found = marks(loss, Passages.of(np.repeat([0, 1], [11, 14])))
    assert np.flatnonzero(found == -1).tolist() == [0, 11]
    assert np.flatnonzero(found == 1).tolist() == [10, 24]
    assert not marks(loss[:9], Passages.of(np.zeros(9, dtype=int))).any()


def test_few_documents_and_one_domain_cannot_tell(text, tmp_path):
    tokens, loss = text
    random = np.random.default_rng(6)
    experts, logits = healthy_layer(tokens, random)
    some = slice(0, 20 * LENGTH)
    few = write(tmp_path / "few", {0: (experts[some], logits[some])}, OWNER[some], loss=loss[some])
    result = health(few, **QUICK)
    assert set(result.table.verdict) == {"cannot tell: too few documents: 20, not 30"}
    one = write(tmp_path / "one", {0: (experts, logits)}, tokens=tokens, domains=("a",))
    result = health(one, **QUICK)
    for check in ("unbalanced use", "blind to the domain"):
        assert states(result, check).verdict.startswith("cannot tell: 1 kinds of text have 30")
    assert states(result, "blind to the token").state == "no sign"


def test_without_losses_the_row_is_left_out_with_a_reason(text, tmp_path):
    tokens, _ = text
    layer = healthy_layer(tokens, np.random.default_rng(6))
    result = health(write(tmp_path, {0: layer}, tokens=tokens), **QUICK)
    assert "worst tokens apart" not in set(result.table.check)
    assert "loss" not in result.tables
    assert any("No loss was recorded" in finding.text for finding in result.findings)


def test_where_every_token_uses_every_expert_there_is_nothing_to_tell(tmp_path):
    everything = np.tile(np.arange(2), (len(OWNER), 1))
    result = health(write(tmp_path, {0: (everything, np.zeros((len(OWNER), 2)))}), **QUICK)
    assert set(result.table.verdict) == {"cannot tell: every token uses every expert"}
    drawn(result, ["health-verdicts", "health-along"])


def test_the_text_that_is_shown_is_that_of_the_capture(text, tmp_path):
    tokens, _ = text
    layer = healthy_layer(tokens, np.random.default_rng(6))
    run = write(tmp_path, {0: layer}, tokens=tokens)
    along = health(run, document=3, **QUICK).tables["along"]
    first = 3 * LENGTH
    expected = [
        (place, expert, str(tokens[first + place]))
        for place in range(QUICK["shown_tokens"])
        for expert in sorted(layer[0][first + place])
    ]
    assert (
        list(along[["position", "expert", "token"]].itertuples(index=False, name=None)) == expected
    )
    with pytest.raises(OptionError, match="document"):
        health(run, document=DOCUMENTS)


def test_both_stacks_of_an_encoder_decoder(tmp_path):
    model = moescope.load(switch())
    the_corpus = corpus(documents=40)
    moescope.capture(model, the_corpus, tmp_path, record=("routing",))
    result = health(tmp_path, model=model, **QUICK)
    assert set(result.table["stack"]) == {"encoder", "decoder"}
    assert "worst tokens apart" not in set(result.table.check)
    names = [f"health-{name}" for name in ("verdicts", "switches", "runs", "margins", "along")]
    drawn(result, [f"{name}-{stack}" for stack in result.table["stack"].unique() for name in names])


def drawn(result, expected):
    found = chapter("health").draw(result)
    for figure in found:
        assert figure.specification()["datasets"]
        assert figure.title.endswith("?")
        assert min(len(figure.how_to_read), len(figure.limits)) > 40
    assert [figure.name for figure in found] == expected


def test_every_table_is_drawn_and_every_curve_read(healthy):
    tables = {name: table[table["layer"] < 2] for name, table in healthy.tables.items()}
    two = dataclasses.replace(healthy, tables=tables)
    drawn(two, [f"health-{n}" for n in ("verdicts", "switches", "runs", "margins", "along")])
    for curve in find("health").curves:
        read = curve.read(healthy)
        assert read.layer.tolist() == list(range(10))
        assert (read.low <= read.value).all()
        assert (read.value <= read.high).all()


def test_more_tests_than_shuffles_can_carry_are_not_told(text, tmp_path):
    tokens, loss = text
    layer = healthy_layer(tokens, np.random.default_rng(6))
    run = write(tmp_path, {0: layer, 1: layer}, tokens=tokens, loss=loss)
    result = health(run, **QUICK | {"permutations": 30})
    unknown = result.table.query("state == 'cannot tell'")
    assert set(unknown.check) == {"unbalanced use", "worst tokens apart"}
    assert set(unknown.verdict) == {
        "cannot tell: too few shuffles for 2 tests: raise --permutations"
    }


def test_options_have_bounds(tmp_path):
    with pytest.raises(OptionError, match="shifts"):
        health(tmp_path, shifts=3)
    assert dataclasses.asdict(find("health").options())["shifts"] == 20
