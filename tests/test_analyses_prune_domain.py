import copy

import numpy as np
import pandas as pd
import pytest
import torch

import deviants_zoo
import models_zoo
import moescope
from moescope.analyses.prune_domain.analysis import prune_domain, pruned_losses
from moescope.analyses.prune_domain.choice import (
    chosen,
    coverage,
    possible_counts,
    pruned,
    random_choice,
    size_of_share,
)
from moescope.analyses.prune_domain.copy import pruned_copy, standing_in
from moescope.analyses.prune_domain.findings import findings
from moescope.analyses.prune_domain.options import PruneDomainOptions
from moescope.analyses.prune_domain.saving import saving_table
from moescope.analyses.prune_domain.text import halves
from moescope.analyses.prune_domain.use import read
from moescope.corpora.packing import Packing
from moescope.errors import CorpusError, ModelError, OptionError
from moescope.evaluate.paired import compare
from moescope.measures.saliency import Saliency
from moescope.models.load import load
from moescope.models.observe import observe
from moescope.reports.registry import chapter
from moescope.surgery.experts import keep_experts

HALF = models_zoo.VOCABULARY // 2
PACKING = Packing(length=12, rows=16)


def documents(number, low, high, seed):
    random = np.random.default_rng(seed)
    return [random.integers(low, high, random.integers(5, 20)).tolist() for _ in range(number)]


def text(number=36, packing=PACKING):
    """Domains that share no token."""
    given = {
        "lower": documents(number, 3, HALF, 0),
        "upper": documents(number, HALF, models_zoo.VOCABULARY, 1),
    }
    return moescope.Corpus.from_token_ids(given, packing)


@torch.no_grad()
def planted():
    """Tokens of "lower" go to experts 0 to 3 alone, those of "upper" to experts 4 to 7.

    Which of the four says the token's remainder by 4; the expert has the model predict tokens of
    the same domain and remainder. The router is so sure of the domain that what its softmax gives
    to the other side is lost in rounding.
    """
    model = load(models_zoo.build("mixtral"))
    tokens = torch.arange(models_zoo.VOCABULARY)
    upper, remainder = (tokens >= HALF).long(), tokens % 4
    embedding = model.model.get_input_embeddings().weight.zero_()
    head = model.model.get_output_embeddings().weight.zero_()
    embedding[:, 0] = 10.0 - 20 * upper
    embedding[tokens, 1 + remainder] = 5.0
    head[tokens, 5 + 4 * upper + remainder] = 1.0
    for layer in model.layers:
        layer.decoder_layer.self_attn.o_proj.weight.zero_()
        layer.router_weight.zero_()
        layer.router_weight[:, 0] = torch.tensor([6.0] * 4 + [-6.0] * 4)
        layer.router_weight[:, 1:5] = torch.eye(4).repeat(2, 1)
        for expert in range(layer.num_experts):
            weights = layer.expert_weights(expert)
            for side, sign in enumerate((1.0, -1.0)):  # one neuron fires, whatever the token
                weights.gate[side] = weights.up[side] = sign * torch.eye(models_zoo.HIDDEN)[0]
            weights.down.zero_()[5 + expert, :2] = 0.2
    return model


def kinds(number):
    """Documents of one domain and one remainder each."""
    random = np.random.default_rng(0)
    sides = {"lower": np.arange(3, HALF), "upper": np.arange(HALF, models_zoo.VOCABULARY)}
    given = {
        domain: [
            random.choice(tokens[tokens % 4 == n % 4], random.integers(5, 20)).tolist()
            for n in range(number)
        ]
        for domain, tokens in sides.items()
    }
    return moescope.Corpus.from_token_ids(given, PACKING)


@pytest.fixture(scope="module")
def planted_result():
    options = PruneDomainOptions(counts=(4,), random=3, bootstrap=100)
    return pruned_losses(planted(), kinds(36), options)


@pytest.fixture(scope="module")
def model():
    return load(models_zoo.build("qwen2_moe"))


@pytest.fixture(scope="module")
def result(model):
    return pruned_losses(model, text(), PruneDomainOptions(counts=(3, 5), random=2, bootstrap=100))


def only(table, **wanted):
    for name, value in wanted.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


@pytest.mark.parametrize("domain", ["lower", "upper"])
def test_a_domains_own_half_of_the_experts_costs_nothing_there_and_much_elsewhere(
    planted_result, domain
):
    against = planted_result.tables["against"]
    own = only(against, chosen_for=domain, where="own")
    assert abs(own.rise) < 1e-7
    elsewhere = only(against, chosen_for=domain, where="elsewhere")
    assert elsewhere.rise_low > 3
    assert own.random_least > 0.5
    assert own.versus_random_high < -0.5
    assert own.versus_random == pytest.approx(-own.random_rise)
    assert own.versus_pooled_high < -0.5
    said = " ".join(finding.text for finding in planted_result.findings)
    assert "better on it than random ones" in said
    assert "one of 4 equal choices is by chance 1 time in 4) in 2 of 2 comparisons" in said


def test_planted_experts_are_chosen(planted_result):
    choice = planted_result.tables["choice"]
    for domain, experts in {"lower": "0 1 2 3", "upper": "4 5 6 7"}.items():
        rows = choice[choice.chosen_for == domain]
        assert set(rows.experts) == {experts}
        assert set(rows.coverage) == {1.0}


def test_equal_experts_cost_nothing_where_weights_are_renormalised(result):
    equal = load(models_zoo.build("mixtral"))
    with torch.no_grad():
        for layer in equal.layers:
            for expert in range(1, layer.num_experts):
                for name, tensor in layer.expert_tensors(expert).items():
                    tensor.copy_(layer.expert_tensors(0)[name])
    options = PruneDomainOptions(counts=(2,), random=2, bootstrap=50)
    found = pruned_losses(equal, text(8), options)
    assert found.table.difference.abs().max() < 1e-5
    assert result.table.difference.abs().max() > 0.1


def masks(choice, **wanted):
    """Numbers of the experts that stay, by layer, as the table says them."""
    for name, value in wanted.items():
        choice = choice[choice[name] == value]
    return {row.layer: [int(e) for e in row.experts.split()] for row in choice.itertuples()}


def nll(model, batch):
    """(domain, loss) of every prediction that counts, straight from the definition."""
    for r, row in enumerate(batch.input_ids):
        length = int(batch.attention_mask[r].sum())
        logs = model.model(row[None, :length]).logits[0].double().log_softmax(-1)
        for p in range(1, length - 1):
            if batch.documents[r, p] == batch.documents[r, p + 1]:
                yield int(batch.domains[r, p]), -logs[p, row[p + 1]].item()


@torch.no_grad()
@pytest.mark.parametrize("chosen_for", ["lower", "upper", "all"])
def test_each_half_is_read_with_the_experts_of_the_other(model, result, chosen_for):
    parts = halves(text(), None, seed=0)
    losses = {0: [], 1: []}
    for part, selected_on in zip(parts, ("second half", "first half"), strict=True):
        stay = masks(
            result.tables["choice"], chosen_for=chosen_for, kept=3, selected_on=selected_on
        )
        with pruned({layer: stay[layer.index] for layer in model.layers}):
            for batch in part:
                for domain, loss in nll(model, batch):
                    losses[domain].append(loss)
    choice = "pooled" if chosen_for == "all" else "domain"
    for number, domain in enumerate(("lower", "upper")):
        row = only(result.table, choice=choice, chosen_for=chosen_for, kept=3, domain=domain)
        assert row.loss == pytest.approx(np.mean(losses[number]), rel=1e-5)
        assert row.n_tokens == len(losses[number])


def test_documents_that_losses_are_measured_on_have_no_part_in_the_choice(model):
    """Other words in one half of the documents change nothing of what is chosen on the other."""
    given = {"lower": documents(10, 3, HALF, 0), "upper": documents(10, 3, HALF, 1)}
    packing = Packing(length=12, rows=4, shuffle=0)  # running numbers are places in the lists

    def parts(of):
        return halves(moescope.Corpus.from_token_ids(of, packing), None, seed=0)

    second = set(torch.cat([batch.documents.flatten() for batch in parts(given)[1]]).tolist())
    first = torch.cat([batch.documents.flatten() for batch in parts(given)[0]])
    corpus = moescope.Corpus.from_token_ids(given, packing)
    names = {}
    for batch in corpus.batches(None):
        names |= batch.document_names
    outside = {names[n] for n in names if n in second}
    changed = {
        domain: [
            [models_zoo.VOCABULARY + 2 - i for i in ids] if f"{domain}:{n}" in outside else ids
            for n, ids in enumerate(given[domain])
        ]
        for domain in given
    }
    assert changed != given
    assert not second & set(first[first >= 0].tolist())
    before, after = (
        [read(model, part, ["lower", "upper"], "reap").use for part in parts(of)]
        for of in (given, changed)
    )
    for domain in ("lower", "upper", "all"):
        for layer in model.layers:
            one, other = before[0][domain][layer], after[0][domain][layer]
            assert torch.equal(one.frequency, other.frequency)
            assert torch.equal(one.reap, other.reap)
            moved = before[1][domain][layer].frequency - after[1][domain][layer].frequency
            assert moved.any()


@pytest.mark.parametrize("seed", range(5))
def test_halves_share_no_document_and_hardly_lose_a_row(seed):
    whole = list(text().batches(None))
    parts = halves(text(), None, seed)
    found = [torch.cat([batch.documents.flatten() for batch in part]) for part in parts]
    one, other = (set(part[part >= 0].tolist()) for part in found)
    assert not one & other
    assert abs(len(one) - len(other)) <= 6
    rows = sum(len(batch.input_ids) for batch in whole)
    assert rows - sum(len(batch.input_ids) for part in parts for batch in part) <= 4
    again = halves(text(), None, seed)
    for part, same in zip(parts, again, strict=True):
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(part, same, strict=True))
    unpacked = Packing(length=24, rows=4, packed=False)
    kept = [batch.documents for part in halves(text(10, unpacked), None, seed) for batch in part]
    assert sum(map(len, kept)) == 20


def test_the_split_depends_on_the_seed():
    first = [halves(text(), None, seed)[0][0].input_ids for seed in (0, 1)]
    assert not torch.equal(*first)


def test_domains_that_cannot_be_split_are_refused(model):
    given = {"many": documents(9, 3, 90, 0), "single": documents(1, 3, 90, 1)}
    corpus = moescope.Corpus.from_token_ids(given, PACKING)
    with pytest.raises(CorpusError, match="'single' cannot be split.* 1 documents"):
        pruned_losses(model, corpus, PruneDomainOptions())
    with pytest.raises(CorpusError, match="cannot be split"):
        pruned_losses(model, text().limited(12), PruneDomainOptions())


@pytest.mark.parametrize("build", [lambda: models_zoo.build("qwen2_moe"), deviants_zoo.llama4])
@torch.no_grad()
def test_use_of_the_experts_is_that_of_the_definition(build):
    model = load(build())
    given = {"a": documents(4, 3, 90, 0), "b": documents(4, 3, 90, 1)}
    corpus = moescope.Corpus.from_token_ids(given, PACKING)
    batches = list(corpus.batches(None))
    found = read(model, batches, corpus.domains, "reap").use
    layer = model.layers[-1]
    count, total = np.zeros((2, layer.num_experts)), np.zeros((2, layer.num_experts))
    for batch in batches:
        seen = []
        with observe([layer], seen.append):
            model.forward(batch.input_ids, batch.attention_mask)
        (one,) = seen
        for token in batch.kept.flatten().nonzero()[:, 0].tolist():
            domain = int(batch.domains.flatten()[token])
            pairs = zip(one.routing.experts[token], one.routing.weights[token], strict=True)
            for expert, weight in pairs:
                x = one.input[token : token + 1]
                if layer.weighs_inputs:
                    norm = layer.expert_outputs(x * weight, [int(expert)]).norm()
                else:
                    norm = weight * layer.expert_outputs(x, [int(expert)]).norm()
                count[domain, expert] += 1
                total[domain, expert] += float(norm)
    for number, domain in enumerate(("a", "b")):
        assert found[domain][layer].frequency.tolist() == count[number].tolist()
        expected = total[number] / np.maximum(count[number], 1)
        np.testing.assert_allclose(found[domain][layer].reap, expected, rtol=1e-4)
    np.testing.assert_array_equal(found["all"][layer].frequency, count.sum(0))


def test_reap_can_choose_others(model):
    found = read(model, list(text(8).batches(None)), ["lower", "upper"], "reap").use["lower"]
    by_frequency, by_reap = (chosen(found, 3, criterion) for criterion in ("frequency", "reap"))
    assert by_frequency != by_reap
    for layer, seen in found.items():
        assert set(by_reap[layer]) == set(seen.reap.topk(3).indices.tolist())
        assert coverage(seen, by_frequency[layer]) >= coverage(seen, by_reap[layer])


def use(*frequencies):
    counts = torch.tensor(frequencies)
    return Saliency(frequency=counts, ean=counts.double(), weighted_norm=counts.double())


def test_a_share_asks_for_the_fewest_experts_that_cover_it_everywhere(model):
    one, other = model.layers
    even, uneven = use(1, 1, 1, 1, 1, 1, 1, 1), use(0, 9, 6, 3, 1, 1, 0, 0)
    uses = [{"a": {one: uneven, other: uneven}, "b": {one: uneven, other: even}}]
    possible = possible_counts(model.layers)
    assert possible == [2, 3, 4, 5, 6, 7]
    sizes = {s: size_of_share(possible, uses, ["a"], s) for s in (0.4, 0.75, 0.76, 0.9, 0.99)}
    assert sizes == {0.4: 2, 0.75: 2, 0.76: 3, 0.9: 3, 0.99: 5}
    assert size_of_share(possible, uses, ["a", "b"], 0.5) == 4
    assert size_of_share(possible, uses, ["b"], 0.9) is None
    assert chosen(uses[0]["a"], 3, "frequency") == {one: [1, 2, 3], other: [1, 2, 3]}
    assert coverage(uneven, [1, 3]) == 0.6


def test_shares_become_sizes_and_those_of_all_experts_are_named(model):
    options = PruneDomainOptions(shares=(0.4, 0.999), random=1, bootstrap=50)
    found = pruned_losses(model, text(10), options)
    saving = found.tables["saving"]
    (size,) = saving.kept[saving.share == 0.4]
    choice = found.tables["choice"]
    rows = choice[(choice.kept == size) & (choice.selected_on != "all documents")]
    assert rows[rows.chosen_for != "all"].coverage.min() >= 0.4
    assert "shares of 0.999" in found.findings[-2].text
    with pytest.raises(OptionError, match="nothing can be pruned"):
        pruned_losses(model, text(10), PruneDomainOptions(shares=(0.999,)))


def test_groups_keep_equal_parts():
    grouped = load(models_zoo.build("deepseek_v3"))
    assert possible_counts(grouped.layers) == [4, 6]
    for layer, kept in random_choice(grouped.layers, 4, [0]).items():
        assert kept == sorted(kept)
        assert sum(expert < layer.num_experts // 2 for expert in kept) == 2
    batches = list(text(2).batches(None))
    found = read(grouped, batches, ["lower", "upper"], "frequency").use["upper"]
    kept = chosen(found, 4, "frequency")
    for layer, experts in kept.items():
        assert sum(expert < layer.num_experts // 2 for expert in experts) == 2
    with pruned(kept), torch.no_grad():
        grouped.forward(batches[0].input_ids)
    with pytest.raises(OptionError, match="4, 6"):
        pruned_losses(grouped, text(8), PruneDomainOptions(counts=(3,)))


def test_no_layer_keeps_fewer_experts_than_a_token_uses():
    greedy = load(models_zoo.build("qwen2_moe", num_experts_per_tok=5))
    assert possible_counts(greedy.layers) == [5, 6, 7]
    with pytest.raises(OptionError, match="Expected: 5, 6, 7"):
        pruned_losses(greedy, text(8), PruneDomainOptions(counts=(4,)))


def test_counted_savings_and_losses_are_those_of_a_pruned_checkpoint(model, result):
    smaller = load(copy.deepcopy(model.model))
    stay = masks(result.tables["choice"], chosen_for="lower", kept=3, selected_on="all documents")
    keep_experts(smaller, {layer: stay[layer.index] for layer in smaller.layers})
    saving = result.tables["saving"].set_index("kept")
    parameters = sum(parameter.numel() for parameter in smaller.model.parameters())
    assert saving.parameters[3] == parameters
    assert saving.timed_as.tolist() == ["pruned copy", "pruned copy", "as it is"]
    assert saving.weight_bytes[8] - saving.weight_bytes[3] == 4 * (
        saving.parameters[8] - saving.parameters[3]
    )
    assert saving.weights_left[8] == saving.ratio[8] == 1
    rows_of_routers = sum(5 * layer.hidden_size for layer in model.layers)
    assert saving.active_parameters[8] - saving.active_parameters[3] == rows_of_routers
    masked = compare(
        model,
        text(),
        {"masked": lambda: pruned({la: stay[la.index] for la in model.layers})},
        bootstrap=50,
    )
    masked = masked[masked.intervention == "masked"].loss
    np.testing.assert_allclose(compare(smaller, text(), {}, bootstrap=50).loss, masked, rtol=1e-5)


def test_a_copy_shares_what_is_not_pruned_and_the_model_stays_as_it_is(model):
    ids = next(iter(text(4).batches(None))).input_ids
    before = model.forward(ids, head=True).logits
    smaller = pruned_copy(model, random_choice(model.layers, 3, [0]))
    held = {parameter.data_ptr() for parameter in model.model.parameters()}
    own = [p.numel() for p in smaller.model.parameters() if p.data_ptr() not in held]
    experts = sum(t.numel() for la in model.layers for t in la.expert_tensors(0).values())
    routers = sum(layer.hidden_size for layer in model.layers)
    assert sum(own) == 3 * (experts + routers)
    with standing_in(model, smaller):
        after = model.forward(ids, head=True).logits
        assert [layer.num_experts for layer in model.layers] == [3, 3]
    assert torch.equal(after, smaller.forward(ids, head=True).logits)
    assert torch.equal(before, model.forward(ids, head=True).logits)
    assert not torch.equal(before, after)


def test_where_no_copy_can_be_had_time_is_that_with_masks(model, result, monkeypatch):
    monkeypatch.setattr("moescope.analyses.prune_domain.copy._free_bytes", lambda _: 0)
    kept = {3: random_choice(model.layers, 3, [0])}
    masked = saving_table(model, kept, length=12, seed=0).set_index("kept")
    copied = result.tables["saving"].set_index("kept")
    rows_of_routers = sum(5 * layer.hidden_size for layer in model.layers)
    assert masked.timed_as.tolist() == ["masked", "as it is"]
    assert masked.parameters[3] == copied.parameters[3] + rows_of_routers
    assert masked.weight_bytes[3] == copied.weight_bytes[3] + 4 * rows_of_routers
    assert masked.active_parameters[3] == masked.active_parameters[8]
    tables = result.tables | {"saving": masked.reset_index().assign(share=0.5)}
    assert "masked but in memory; bytes by counting" in findings(tables, ())[-1].text
    assert "taken out" in result.findings[-1].text


def test_comparisons_are_differences_of_the_losses(result):
    for row in result.tables["against"].itertuples():
        if row.where == "elsewhere":
            continue
        here = {"kept": row.kept, "domain": row.chosen_for}
        own = only(result.table, choice="domain", chosen_for=row.chosen_for, **here)
        pooled = only(result.table, choice="pooled", **here)
        random = result.table[(result.table.choice == "random") & (result.table.kept == row.kept)]
        random = random[random.domain == row.chosen_for].difference
        assert row.rise == own.difference
        assert row.versus_pooled == pytest.approx(own.loss - pooled.loss)
        assert row.versus_random == pytest.approx(row.rise - random.mean())
        assert (row.random_least, row.random_most) == pytest.approx((random.min(), random.max()))


def test_findings_say_where_a_choice_for_the_domain_is_no_better(result):
    against = result.tables["against"].assign(
        versus_pooled_low=-0.1, versus_pooled_high=0.1, versus_random_low=-0.1
    )
    against = against.assign(versus_random_high=0.1)
    said = " ".join(f.text for f in findings(result.tables | {"against": against}, ()))
    assert said.count("Choosing by domain is not shown to be better here.") == 2
    lucky = against.assign(versus_random_high=-0.01, random_least=against.rise - 1)
    said = " ".join(f.text for f in findings(result.tables | {"against": lucky}, ()))
    assert said.count("Choosing by domain is not shown to be better here.") == 2
    worse = against.assign(versus_pooled_low=0.01)
    said = " ".join(f.text for f in findings(result.tables | {"against": worse}, ()))
    assert "Worse: lower with 3, upper with 3, lower with 5, upper with 5." in said


def test_domains_can_be_named_and_few_documents_give_no_verdict(model):
    options = PruneDomainOptions(domains=("upper",), counts=(3,), random=1, bootstrap=50)
    found = pruned_losses(model, text(6), options)
    assert set(found.tables["against"].chosen_for) == {"upper"}
    assert set(found.table.domain) == {"all", "lower", "upper"}
    said = " ".join(finding.text for finding in found.findings)
    assert said.count("cannot be said: no domain has 30 documents") == 2
    assert "No intervals, for lack of documents: upper." in said
    with pytest.raises(OptionError, match="Did you mean 'upper'"):
        pruned_losses(model, text(6), PruneDomainOptions(domains=("uper",)))


def test_with_one_domain_there_is_no_elsewhere(model):
    corpus = moescope.Corpus.from_token_ids({"only": documents(31, 3, 90, 0)}, PACKING)
    options = PruneDomainOptions(counts=(3,), random=1, bootstrap=50)
    found = pruned_losses(model, corpus, options)
    assert set(found.tables["against"]["where"]) == {"own"}
    assert set(found.table.choice) == {"unpruned", "domain", "random"}
    assert "one domain" in " ".join(finding.text for finding in found.findings)
    for figure in chapter("prune-domain").draw(found):
        assert figure.specification()["datasets"]


def test_figures(result):
    drawn = chapter("prune-domain").draw(result)
    assert [figure.name.removeprefix("prune-domain-") for figure in drawn] == [
        "loss",
        "better",
        "matrix",
        "saving",
    ]
    for figure in drawn:
        assert figure.specification()["datasets"]
        assert figure.title.endswith("?")


def test_it_runs_on_a_capture_and_is_saved(model, tmp_path):
    moescope.capture(model, text(8), tmp_path, record=("routing",))
    found = prune_domain(tmp_path, model=model, corpus=text(8), counts=[3], random=1, bootstrap=50)
    saved = moescope.Run(tmp_path).result("prune-domain")
    pd.testing.assert_frame_equal(saved.table, found.table)
    assert saved.provenance["options"]["counts"] == [3]


def test_encoder_decoder_models_are_refused():
    encoder_decoder = load(models_zoo.build("mixtral"))
    encoder_decoder.model.config.is_encoder_decoder = True
    with pytest.raises(ModelError, match="encoder-decoder"):
        pruned_losses(encoder_decoder, text(8), PruneDomainOptions())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": 0}, "tokens"),
        ({"random": 0}, "random"),
        ({"shares": ()}, "no size"),
        ({"shares": (1.0,)}, "share"),
    ],
)
def test_options_that_say_nothing_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        PruneDomainOptions(**options)
