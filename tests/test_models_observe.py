"""What the hooks see, against the router formulas written out by hand."""

import pytest
import torch

from models_zoo import FAMILIES, TOP_K, VOCABULARY, build
from moescope.models.load import load
from moescope.models.observe import observe

ROWS, LENGTH = 3, 7


def ids(seed=0):
    return torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))


def watched(model, *, residual=False, **inputs):
    seen = []
    with torch.no_grad(), observe(model.layers, seen.append, residual=residual):
        out = model.model(**({"input_ids": ids()} | inputs), output_hidden_states=True)
    return seen, out


def hooks(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in model.model.modules()
    )


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_fit_what_the_model_itself_reports(family, residual):
    model = load(build(family))
    seen, out = watched(model, residual=residual)

    assert [observation.layer for observation in seen] == model.layers
    for observation in seen:
        layer = observation.layer
        assert observation.input.shape == (ROWS * LENGTH, layer.hidden_size)
        assert observation.routing.logits.shape == (ROWS * LENGTH, layer.num_experts)
        assert observation.routing.experts.shape == (ROWS * LENGTH, TOP_K)
        assert (observation.residual is not None) == residual
        if residual:
            norm = layer.decoder_layer.post_attention_layernorm
            torch.testing.assert_close(norm(observation.residual), observation.input)
            if layer.index + 1 < len(out.hidden_states) - 1:  # the last one is normed
                after = out.hidden_states[layer.index + 1].reshape(-1, layer.hidden_size)
                torch.testing.assert_close(observation.residual + observation.output, after)


def test_token_of_row_and_position():
    model = load(build("qwen3_moe"))
    batch, _ = watched(model)
    for row in range(ROWS):
        alone, _ = watched(model, input_ids=ids()[row : row + 1])
        tokens = slice(row * LENGTH, (row + 1) * LENGTH)
        for whole, part in zip(batch, alone, strict=True):
            torch.testing.assert_close(whole.input[tokens], part.input)
            assert torch.equal(whole.routing.experts[tokens], part.routing.experts)


def test_mixtral_router_by_hand():
    seen, _ = watched(load(build("mixtral")))
    for observation in seen:
        x, routing = observation.input, observation.routing
        logits = x @ observation.layer.block.gate.weight.T
        probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
        weights, experts = probabilities.sort(-1, descending=True)
        weights = weights[:, :2] / weights[:, :2].sum(-1, keepdim=True)
        torch.testing.assert_close(routing.logits, logits)
        torch.testing.assert_close(routing.weights, weights)
        assert torch.equal(routing.experts, experts[:, :2])


def test_deepseek_v3_router_by_hand():
    model = load(build("deepseek_v3"))
    generator = torch.Generator().manual_seed(1)
    for layer in model.layers:
        layer.block.gate.e_score_correction_bias.normal_(generator=generator)
    seen, _ = watched(model)
    differs = 0
    for observation in seen:
        gate, routing = observation.layer.block.gate, observation.routing
        logits = observation.input @ gate.weight.T
        scores = 1 / (1 + (-logits).exp())
        torch.testing.assert_close(routing.logits, logits)
        for token, score in enumerate(scores):
            biased = (score + gate.e_score_correction_bias).tolist()
            groups = [range(4), range(4, 8)]
            best = max(groups, key=lambda g, b=biased: sum(sorted(b[e] for e in g)[-2:]))
            chosen = sorted(sorted(best, key=lambda e, b=biased: b[e])[-2:])
            assert sorted(routing.experts[token].tolist()) == chosen
            differs += chosen != sorted(score.topk(2).indices.tolist())
            used = score[routing.experts[token]]
            torch.testing.assert_close(routing.weights[token], 1.5 * used / used.sum())
    assert differs > 10  # the case is one where a re-derived top-k would be wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_both_implementations_of_the_experts_are_seen_alike(family):
    model = load(build(family))
    model.model.set_experts_implementation("eager")
    eager, _ = watched(model)
    model.model.set_experts_implementation("grouped_mm")
    grouped, _ = watched(model)
    for one, other in zip(eager, grouped, strict=True):
        assert torch.equal(one.routing.experts, other.routing.experts)
        torch.testing.assert_close(one.routing.weights, other.routing.weights)
        torch.testing.assert_close(one.output, other.output)


@pytest.mark.parametrize("family", FAMILIES)
def test_dtype_of_the_model_is_kept(family):
    seen, _ = watched(load(build(family).to(torch.bfloat16)), residual=True)
    for observation in seen:
        assert observation.input.dtype == torch.bfloat16
        assert observation.output.dtype == torch.bfloat16
        assert observation.residual.dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_nobody_writes_into_what_was_seen(family):
    model = load(build(family))
    pairs = []

    def keep(observation):
        tensors = (
            observation.input,
            observation.output,
            observation.residual,
            *vars(observation.routing).values(),
        )
        pairs.extend((tensor, tensor.clone()) for tensor in tensors)

    with observe(model.layers, keep, residual=True):
        model.model(input_ids=ids()).logits.sum().backward()
    assert not any(tensor.requires_grad for tensor, _ in pairs)
    assert all(torch.equal(now, then) for now, then in pairs)


def test_interventions_are_seen():
    model = load(build("qwen3_moe"))
    layer = model.layers[0]

    def to_expert_five(_, arguments):
        x, experts, weights = arguments
        return x, torch.full_like(experts, 5), weights

    handle = layer.experts.register_forward_pre_hook(to_expert_five)
    seen, _ = watched(model)
    handle.remove()
    assert (seen[0].routing.experts == 5).all()


def test_hooks_go_away():
    model = load(build("mixtral"))
    assert hooks(model) == 0
    with torch.no_grad(), observe(model.layers, lambda _: None, residual=True):
        assert hooks(model) > 4 * len(model.layers)
        model.model(input_ids=ids())
    assert hooks(model) == 0

    def stop(observation):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), observe(model.layers, stop, residual=True):
        model.model(input_ids=ids())
    assert hooks(model) == 0


def test_only_the_chosen_layers_and_every_pass():
    model = load(build("deepseek_v2"))
    seen = []
    with torch.no_grad(), observe([model.layer(2)], seen.append):
        model.model(input_ids=ids())
        model.model(input_ids=ids()[:1, :2])
    assert [(o.layer.index, len(o.input)) for o in seen] == [(2, ROWS * LENGTH), (2, 2)]


def test_what_a_callback_asks_of_a_layer_is_not_seen_by_other_observers():
    model = load(build("deepseek_v3"))
    seen, alone = [], []

    def ask(observation):
        observation.layer.route(observation.input[:1])
        assert observation.layer.top_k == TOP_K

    with torch.no_grad():
        with observe(model.layers, alone.append):
            model.model(input_ids=ids())
        with observe(model.layers, ask), observe(model.layers, seen.append):
            model.model(input_ids=ids())
    for one, other in zip(alone, seen, strict=True):
        assert torch.equal(one.routing.experts, other.routing.experts)
        assert torch.equal(one.routing.logits, other.routing.logits)
