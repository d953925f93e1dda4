import numpy as np
import pytest
import torch

import moescope
from models_zoo import VOCABULARY, build
from moescope.analyses.registry import find
from moescope.corpora.packing import Packing
from moescope.errors import MoEScopeError, OptionError


def documents(first: int, last: int, number: int, seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(first, last, size=40).tolist() for _ in range(number)]


def run_folder(tmp_path, *, planted: bool):
    """A capture of two domains with tokens of their own.

    Planted: domain `a` is routed to experts 0-3 only, `b` to 4-7 only. Otherwise both domains draw
    from the same tokens.
    """
    model = build("mixtral")
    with torch.no_grad():
        # Block inputs are the normed embeddings: the other parts write nothing.
        model.model.embed_tokens.weight[:50, 0] = 3
        model.model.embed_tokens.weight[50:, 0] = -3
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()
            layer.mlp.gate.weight[:, 0] = torch.tensor([9.0] * 4 + [-9.0] * 4)
    loaded = moescope.load(model)
    b_tokens = (50, VOCABULARY) if planted else (3, 50)
    corpus = moescope.Corpus.from_token_ids(
        {"a": documents(3, 50, 40, 0), "b": documents(*b_tokens, 40, 1)},
        Packing(length=32, skip_first=False),
    )
    moescope.capture(loaded, corpus, tmp_path, record=("routing",))
    return loaded


def test_planted_specialisation_is_found(tmp_path):
    model = run_folder(tmp_path, planted=True)
    result = moescope.routing(tmp_path, model=model, permutations=500)
    divergence = result.tables["divergence"]
    assert divergence.js_bits.to_numpy() == pytest.approx(1)
    assert (divergence.p_value == 1 / 501).all()
    shares = result.table.set_index(["layer", "domain", "expert"]).share.sort_index()
    for layer in (0, 1):
        assert shares[layer, "a"][4:].sum() == 0
        assert shares[layer, "a"].sum() == pytest.approx(2)
        assert shares[layer, "b"][:4].sum() == 0
    assert "2 of 2 comparisons" in result.findings[1].text


def test_domains_of_the_same_text_are_not_told_apart(tmp_path):
    model = run_folder(tmp_path, planted=False)
    divergence = moescope.routing(tmp_path, model=model).tables["divergence"]
    assert (divergence.p_value > 0.01).all()
    assert (divergence.js_bits < divergence.null_p95 * 2).all()


def test_tables_agree_with_counts_by_hand(tmp_path):
    model = run_folder(tmp_path, planted=False)
    result = moescope.routing(tmp_path, model=model, permutations=20)
    capture = moescope.Capture(tmp_path)
    experts = capture.routing(1).experts
    in_a = capture.domain_of == 0
    used = (experts[in_a] == 2).any(1).sum().item()
    row = result.table.query("layer == 1 and domain == 'a' and expert == 2").iloc[0]
    assert row.tokens == used
    assert row.share == pytest.approx(used / in_a.sum().item())
    assert row.low <= row.share <= row.high
    assert row.uniform == 2 / 8
    layer = result.tables["layers"].query("layer == 1").iloc[0]
    probabilities = capture.routing(1).logits.double().softmax(1)
    entropy = -(probabilities * probabilities.log2()).sum(1).mean()
    assert layer.router_entropy_bits == pytest.approx(entropy.item(), rel=1e-5)


def test_results_are_saved_with_their_provenance(tmp_path):
    model = run_folder(tmp_path, planted=False)
    moescope.routing(tmp_path, model=model, permutations=20, seed=4)
    saved = moescope.Run(tmp_path).result("routing")
    assert saved.provenance["seed"] == 4
    assert saved.provenance["options"]["permutations"] == 20
    assert saved.provenance["capture"] == moescope.Capture(tmp_path).digest


def test_an_unknown_option_and_analysis_suggest_the_nearest(tmp_path):
    with pytest.raises(OptionError, match="Did you mean 'permutations'"):
        moescope.routing(tmp_path, permutation=3)
    with pytest.raises(OptionError, match="Did you mean 'routing'"):
        find("routin")


def test_a_run_without_capture_is_one_clear_error(tmp_path):
    with pytest.raises(MoEScopeError, match="capture"):
        moescope.routing(tmp_path)
