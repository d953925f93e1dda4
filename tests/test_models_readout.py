"""The readout of every family gives the model's own logits, or says why not."""

from functools import partial

import pytest
import torch

import deviants_zoo
import families_zoo
from moescope.errors import ModelError
from moescope.models.discover import moe_layers
from moescope.models.readout import Readout
from moescope.models.view import MoEModel

WITHOUT_HEAD = {
    "deepseek_ocr2_text",
    "ernie4_5_vl_moe_text",
    "glm4v_moe_text",
    "glm5_next_text",
    "mistral_large4_text",
    "openai_privacy_filter",
    "qwen3_omni_moe_text",
    "qwen3_vl_moe_text",
    "unlimited_ocr_text",
}
BUILDERS = {
    **{family: partial(families_zoo.build, family) for family in families_zoo.FAMILIES},
    **deviants_zoo.DEVIANTS,
    "llama4 with images": deviants_zoo.llama4_with_images,
    "gemma4 with images": deviants_zoo.gemma4_with_images,
}


MIXES_STREAMS = {"qwen4_exp_text"}
decoded = pytest.mark.parametrize("family", sorted(set(BUILDERS) - WITHOUT_HEAD - MIXES_STREAMS))


def loaded(family):
    """As `load` has it, without the proof of the blocks, which other tests are about."""
    model = BUILDERS[family]()
    return MoEModel(model=model, tokenizer=None, layers=moe_layers(model), name=family)


def ids(rows=3, length=7):
    return torch.randint(97, (rows, length), generator=torch.manual_seed(1))


@torch.no_grad()
def last_states(model, readout):
    """What the final norm is given, and the model's own logits."""
    given = []
    handle = readout.norm.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    logits = model.forward(ids(), head=True).logits
    handle.remove()
    return given[-1].flatten(0, 1), logits.flatten(0, 1)


@decoded
def test_decodes_the_last_state_to_the_models_own_logits(family):
    model = loaded(family)
    readout = Readout.of(model)
    states, logits = last_states(model, readout)
    with torch.no_grad():
        torch.testing.assert_close(readout.logits(states), logits, rtol=1e-4, atol=1e-4)
        some = readout.logits(states[4:5])
    torch.testing.assert_close(some, logits[4:5], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(WITHOUT_HEAD))
def test_refuses_models_without_a_head(family):
    with pytest.raises(ModelError, match="predicts no tokens"):
        Readout.of(loaded(family))


def test_refuses_a_last_state_that_is_mixed_from_several_streams():
    (family,) = MIXES_STREAMS
    with pytest.raises(ModelError, match="no final norm"):
        Readout.of(loaded(family))


def test_refuses_a_model_that_does_more_than_it_found():
    model = loaded("mixtral")
    head = model.model.lm_head
    handle = head.register_forward_hook(
        lambda _, arguments, logits: logits + logits.mean(1, keepdim=True)
    )
    with pytest.raises(ModelError, match="does more to its last state"):
        Readout.of(model)
    handle.remove()
    Readout.of(model)


def test_the_model_is_as_before():
    model = loaded("switch_transformers")
    before = dict(vars(model.model.decoder))
    readout = Readout.of(model)
    with torch.no_grad():
        logits = model.forward(ids(), head=True).logits
        readout.logits(torch.ones(2, 32))
        torch.testing.assert_close(model.forward(ids(), head=True).logits, logits, rtol=0, atol=0)
    assert vars(model.model.decoder) == before
