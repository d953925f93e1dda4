import pytest
import torch

import captures_zoo as zoo
import deviants_zoo
import models_zoo
from moescope.captures import read, recorder
from moescope.captures.partial import PARTIAL
from moescope.captures.read import Capture
from moescope.captures.registry import RECORDABLE, BlockTensor, register, token_loss
from moescope.captures.sampling import expert_keys, priorities
from moescope.captures.shards import read_tensor
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Packing
from moescope.errors import CaptureError, OptionError
from moescope.interventions.choice import set_top_k
from moescope.models.load import load
from moescope.progress import track

WIDE = ("inputs", "residual", "shared_output")


@pytest.fixture(scope="module")
def model():
    return zoo.model()


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    return zoo.record(tmp_path_factory.mktemp("run"), model)


@pytest.fixture(scope="module")
def expected(model):
    return zoo.seen(model, zoo.corpus())


def test_every_kept_token_has_its_place(done):
    batches = list(zoo.corpus().batches(None))
    kept = torch.cat([batch.kept for batch in batches])
    rows, positions = kept.nonzero(as_tuple=True)
    assert done.num_tokens == int(kept.sum())
    assert torch.equal(done.rows, rows)
    assert torch.equal(done.positions, positions)
    for name, source in {
        "token_ids": "input_ids", "documents": "documents", "domain_of": "domains"
    }.items():  # fmt: skip
        values = torch.cat([getattr(batch, source) for batch in batches])
        assert torch.equal(getattr(done, name), values[kept])
    names = {number: name for batch in batches for number, name in batch.document_names.items()}
    assert done.document_names == list(names.values())
    assert done.domains == ["long", "short"]
    assert (done.positions > 0).all()
    assert len(done.manifest["shards"]) > 6


def test_padding_and_first_positions_never_enter(done):
    """Without masks there would be this many positions."""
    batches = list(zoo.corpus().batches(None))
    padding = sum(int((batch.attention_mask == 0).sum()) for batch in batches)
    rows = sum(len(batch.input_ids) for batch in batches)
    assert padding > 0
    assert done.num_tokens == 12 * rows - padding - rows
    assert (done.documents >= 0).all()
    assert (done.domain_of >= 0).all()


def test_kept_padding_fills_the_experts_it_is_routed_to(tmp_path):
    """Without attention all padding is the same vector, and its two experts get all of it."""
    model = zoo.model()
    inside = model.model.model.layers[0]
    torch.nn.init.zeros_(inside.self_attn.o_proj.weight)
    vector = inside.post_attention_layernorm(model.model.get_input_embeddings().weight[0])
    wanted = set((model.layer(0).router_weight @ vector).topk(models_zoo.TOP_K).indices.tolist())

    options = {"packed": False, "skip_first": False}
    text = zoo.record(tmp_path / "text", model, zoo.corpus(**options), tokens_per_expert=10**6)
    kept = zoo.record(
        tmp_path / "kept",
        model,
        zoo.corpus(keep_padding=True, **options),
        tokens_per_expert=10**6,
    )
    lengths = text.rows.bincount()
    padding = int((12 - lengths).sum())
    assert padding > 0.1 * kept.num_tokens
    assert kept.num_tokens == text.num_tokens + padding == 12 * len(lengths)
    for expert in range(models_zoo.NUM_EXPERTS):
        more = len(kept.tokens_of(0, expert)) - len(text.tokens_of(0, expert))
        assert more == (padding if expert in wanted else 0)

    is_padding = kept.positions >= lengths[kept.rows]
    assert (kept.token_ids[is_padding] == 0).all()
    first = kept.positions == 0
    for name in ("documents", "domain_of"):
        values = getattr(kept, name)
        assert torch.equal(values, values[first][kept.rows])
    sample = kept.expert_inputs(0, min(wanted))
    own = is_padding[sample.tokens]
    assert int(own.sum()) == padding
    torch.testing.assert_close(sample.values[own], vector.expand(padding, -1).detach())
    assert text.document_names == kept.document_names


def test_routing_is_recorded_for_every_token(done, expected):
    for layer in done.layers:
        routing = done.routing(layer)
        assert torch.equal(routing.experts, expected[0][layer, "experts"])
        assert torch.equal(routing.weights, expected[0][layer, "weights"].float())
        assert torch.equal(routing.logits, expected[0][layer, "logits"].float())
        parts = list(done.routing_shards(layer))
        assert len(parts) > 2
        assert torch.equal(torch.cat([part.logits for _, part in parts]), routing.logits)
        for tokens, part in parts:
            assert torch.equal(routing.experts[tokens], part.experts)


@pytest.mark.parametrize("name", WIDE)
def test_wide_tensors_are_those_of_their_tokens(done, expected, name):
    for layer in done.layers:
        recorded = done.wide(layer, name)
        assert torch.equal(recorded.tokens, recorded.tokens.unique())
        # Fewer rows at a time may take another kernel in the shared expert.
        torch.testing.assert_close(
            recorded.values, expected[0][layer, name][recorded.tokens], rtol=1e-5, atol=1e-6
        )


def by_brute_force(done, layer, expert):
    """The definition: of all tokens routed to an expert those with the lowest numbers."""
    routed = done.tokens_of(layer, expert)
    key = expert_keys(done.seed, layer, expert + 1)[-1:]
    numbers = priorities(key, torch.zeros(len(routed), 1, dtype=torch.int64), routed)[:, 0]
    wanted = done.manifest["options"]["tokens_per_expert"]
    return routed[numbers.argsort()[:wanted]].sort().values


def test_the_sample_is_the_whole_rows_and_each_experts_share_of_all_its_tokens(done):
    counts = done.rows.bincount()
    whole = counts[counts.cumsum(0) - counts < 60].sum()
    assert done.manifest["num_whole_row_tokens"] == int(whole) == 66
    for layer in done.layers:
        recorded = done.inputs(layer).tokens
        assert recorded[:whole].tolist() == list(range(whole))
        everything = set()
        for expert in range(models_zoo.NUM_EXPERTS):
            own = done.expert_inputs(layer, expert)
            assert torch.equal(own.tokens, by_brute_force(done, layer, expert))
            places = torch.searchsorted(recorded, own.tokens)
            assert torch.equal(own.values, done.inputs(layer).values[places])
            everything |= set(own.tokens.tolist())
        assert everything | set(range(whole)) == set(recorded.tolist())


def test_an_experts_sample_is_uniform_also_over_the_tokens_of_whole_rows(model, tmp_path):
    """Over many seeds, whole rows have the share of a sample that they have of all tokens."""
    found = expected = variance = 0.0
    for seed in range(20):
        recorded = zoo.record(
            tmp_path / str(seed), model, seed=seed, record=("inputs",), tokens_per_expert=20
        )
        for expert, own in recorded.expert_samples(0, range(models_zoo.NUM_EXPERTS)).items():
            routed = recorded.tokens_of(0, expert)
            size, total, share = len(own.tokens), len(routed), float((routed < 66).double().mean())
            found += int((own.tokens < 66).sum())
            expected += size * share
            variance += size * share * (1 - share) * (total - size) / (total - 1)
    assert abs(found - expected) < 3.3 * variance**0.5  # 99.9%, hypergeometric
    assert 3.3 * variance**0.5 < expected / 4


def test_many_experts_cost_one_reading_of_each_tensor(done, monkeypatch):
    one_by_one = {expert: done.expert_inputs(1, expert) for expert in (5, 0, 2)}
    reads = []

    def counted(folder, entry, name):
        reads.append((entry["file"], name))
        return read_tensor(folder, entry, name)

    monkeypatch.setattr(read, "read_tensor", counted)
    together = done.expert_samples(1, (5, 0, 2))
    narrow, wide = [], []
    for entry in done.manifest["shards"]:
        if entry["kind"] == "tokens":
            narrow.append((entry["file"], "layer.1.experts"))
        elif 1 in entry["layers"]:
            wide += [(entry["file"], f"layer.1.{name}") for name in ("tokens", "inputs")]
    assert sorted(reads) == sorted(narrow + wide)
    for expert, own in one_by_one.items():
        assert torch.equal(together[expert].tokens, own.tokens)
        assert torch.equal(together[expert].values, own.values)
    reads.clear()
    done.tokens_of(1, 3)
    assert reads == narrow


def test_tokens_of_an_expert_agree_with_the_routing(done):
    experts = done.routing(1).experts
    for expert in range(models_zoo.NUM_EXPERTS):
        assert done.tokens_of(1, expert).tolist() == [
            token for token, used in enumerate(experts.tolist()) if expert in used
        ]


def test_token_loss_is_that_of_the_next_token_and_nan_at_the_end_of_a_row(done, expected):
    logits = expected[1].double().log_softmax(-1)
    last = torch.cat([done.rows[1:] != done.rows[:-1], torch.tensor([True])])
    assert torch.equal(done.token_loss.isnan(), last)
    following = done.token_ids[1:][~last[:-1]]
    tokens = (~last).nonzero()[:, 0]
    by_hand = -logits[tokens, following]
    torch.testing.assert_close(done.token_loss[tokens].double(), by_hand, rtol=1e-5, atol=1e-5)


def test_token_loss_by_hand():
    logits = torch.zeros(1, 4, 2)
    logits[0, 0, 1] = 1.0
    losses = token_loss(logits, torch.tensor([[0, 1, 0, 0]]), torch.tensor([[1, 1, 1, 0]]))
    expected = torch.tensor([[0.31326, 0.69315, torch.nan, torch.nan]])
    torch.testing.assert_close(losses, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_the_choice_of_tokens_depends_on_no_batch_or_shard(model, done, tmp_path, monkeypatch):
    other = zoo.record(tmp_path / "batch", model, zoo.corpus(rows=1), shard_tokens=23)
    assert torch.equal(other.token_ids, done.token_ids)
    monkeypatch.setattr(recorder, "SPILL_BYTES", 1)
    spilled = zoo.record(tmp_path / "spill", model)
    for layer in done.layers:
        for again in (other, spilled):
            assert torch.equal(again.inputs(layer).tokens, done.inputs(layer).tokens)
    assert zoo.contents(spilled.folder) == zoo.contents(done.folder)


def test_the_seed_changes_the_reservoirs_alone(model, done, tmp_path):
    other = zoo.record(tmp_path, model, seed=1)
    assert torch.equal(other.routing(1).experts, done.routing(1).experts)
    assert not torch.equal(other.inputs(1).tokens, done.inputs(1).tokens)


def test_two_captures_of_the_same_have_the_same_bytes(model, done, tmp_path):
    again = zoo.record(tmp_path, model)
    assert zoo.contents(again.folder) == zoo.contents(done.folder)
    assert not (again.folder / PARTIAL).exists()


def test_routing_alone_records_nothing_wide(model, tmp_path):
    recorded = zoo.record(tmp_path, model, record=("routing",))
    assert recorded.recorded == ["routing"]
    assert {entry["kind"] for entry in recorded.manifest["shards"]} == {"tokens"}
    with pytest.raises(CaptureError, match="'inputs'.*Got: routing.*--record routing inputs"):
        recorded.inputs(0)


def test_routing_is_recorded_unasked(model, tmp_path):
    assert zoo.record(tmp_path, model, record=("inputs",)).recorded == ["routing", "inputs"]


def test_no_sample_is_said_so(model, tmp_path):
    recorded = zoo.record(tmp_path, model, tokens=0, tokens_per_expert=0)
    with pytest.raises(CaptureError, match="holds no sample of layer 1"):
        recorded.inputs(1)


def test_whole_rows_alone_and_reservoirs_alone(model, tmp_path):
    rows = zoo.record(tmp_path / "rows", model, tokens_per_expert=0)
    assert rows.inputs(0).tokens.tolist() == list(range(66))
    with pytest.raises(CaptureError, match="no samples of experts.*tokens_per_expert above 0"):
        rows.expert_inputs(0, 0)
    reservoirs = zoo.record(tmp_path / "reservoirs", model, tokens=0)
    for expert in range(models_zoo.NUM_EXPERTS):
        available = len(reservoirs.tokens_of(0, expert))
        assert len(reservoirs.expert_inputs(0, expert).tokens) == min(45, available)


def test_half_precision_is_kept_or_converted(tmp_path):
    half = zoo.model(dtype=torch.bfloat16)
    half.model.to(torch.bfloat16)
    own = zoo.record(tmp_path / "own", half)
    assert own.inputs(1).values.dtype == torch.bfloat16
    assert own.routing(1).weights.dtype == own.routing(1).logits.dtype == torch.float32
    wider = zoo.record(tmp_path / "float", half, dtype=torch.float32)
    assert torch.equal(wider.inputs(1).values, own.inputs(1).values.float())
    with pytest.raises(OptionError, match="unknown dtype"):
        zoo.record(tmp_path / "no", half, dtype="int8")


@pytest.mark.parametrize("family", models_zoo.FAMILIES)
def test_every_family_is_recorded_under_its_own_layer_numbers(family, tmp_path):
    model = zoo.model(family)
    recorded = zoo.record(tmp_path, model, record=("routing", "inputs"))
    assert recorded.layers == [layer.index for layer in model.layers]
    expected, _ = zoo.seen(model, zoo.corpus())
    for layer in recorded.layers:
        assert torch.equal(recorded.routing(layer).experts, expected[layer, "experts"])
        tokens = recorded.inputs(layer).tokens
        assert torch.equal(recorded.inputs(layer).values, expected[layer, "inputs"][tokens])


def test_some_layers(model, tmp_path):
    recorded = zoo.record(tmp_path, model, layers=(1,))
    assert recorded.layers == [1]
    with pytest.raises(CaptureError, match="layer 0 is not in.*one of 1"):
        recorded.routing(0)
    with pytest.raises(CaptureError, match="no such expert. Got: 8. Expected: 0 to 7"):
        recorded.tokens_of(1, 8)
    with pytest.raises(OptionError, match="not a mixture-of-experts layer"):
        zoo.record(tmp_path / "dense", zoo.model("deepseek_v2"), layers=(0,), record=("inputs",))


def test_what_a_model_does_not_have_cannot_be_recorded(model, tmp_path):
    with pytest.raises(CaptureError, match="layer 0 has no shared expert"):
        zoo.record(tmp_path, zoo.model("mixtral"))
    with pytest.raises(CaptureError, match="Did you mean 'inputs'"):
        zoo.record(tmp_path, model, record=("input",))
    unknown = Corpus.from_token_ids({"a": [[1, 2, 97]]})
    with pytest.raises(CaptureError, match="does not know. Got: 97. Expected: 0 to 96"):
        zoo.record(tmp_path / "vocabulary", model, unknown)
    single = Corpus.from_token_ids({"a": [[1]]}, Packing(length=4))
    with pytest.raises(CaptureError, match="no position to record"):
        zoo.record(tmp_path / "nothing", model, single)


def test_the_model_is_left_as_it_was(model, tmp_path):
    model.model.train()
    try:
        zoo.record(tmp_path, model, record=("routing",))
        assert model.model.training
        assert not any(module._forward_hooks for module in model.model.modules())
    finally:
        model.model.eval()


def test_a_new_tensor_is_one_registration(model, done, tmp_path, monkeypatch):
    monkeypatch.setattr("moescope.captures.registry.RECORDABLE", dict(RECORDABLE))
    square = BlockTensor(
        name="outputs",
        kind="wide",
        needs="block",
        description="",
        compute=lambda seen, chosen: {"outputs": seen.output[chosen]},
    )
    register(square)
    with pytest.raises(AssertionError):
        register(square)
    recorded = zoo.record(tmp_path, model, record=("outputs",))
    assert recorded.wide(1, "outputs").values.shape == done.inputs(1).values.shape


def test_provenance(model, done):
    assert done.model_name == "in memory"
    assert done.model_fingerprint == model.fingerprint
    assert done.seed == 0
    assert done.manifest["options"]["tokens_per_expert"] == 45
    assert len(done.manifest["data_sha256"]) == 64
    assert done.layer_facts(1)["num_experts"] == models_zoo.NUM_EXPERTS
    assert "in memory" in repr(done)
    assert "<table>" in done._repr_html_()


def test_a_capture_opens_by_its_run_folder(done):
    assert Capture(done.folder.parent).num_tokens == done.num_tokens


def test_progress_is_silent_without_a_terminal(capsys):
    assert list(track(range(3), "counting", total=3)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_changed_model_is_not_captured(tmp_path):
    changed = zoo.model()
    with set_top_k(changed.layers, 1), pytest.raises(CaptureError, match="changed by an interv"):
        zoo.record(tmp_path, changed)
    assert not any(tmp_path.iterdir())
    zoo.record(tmp_path, changed)


def test_samples_of_experts_whose_inputs_are_weighed(tmp_path):
    model = load(deviants_zoo.DEVIANTS["llama4_text"]())
    recorded = zoo.record(tmp_path, model, record=("routing", "inputs"))
    layer = model.layers[0].index
    weights, experts = recorded.routing(layer).weights, recorded.routing(layer).experts
    whole = recorded.inputs(layer)
    plain = dict(zip(whole.tokens.tolist(), whole.values, strict=True))
    sample = recorded.expert_samples(layer, [0, 1])
    assert len(sample[0].tokens) > 3
    for expert, found in sample.items():
        for token, value in zip(found.tokens.tolist(), found.values, strict=True):
            slot = experts[token].tolist().index(expert)
            torch.testing.assert_close(value, plain[token] * weights[token, slot])
