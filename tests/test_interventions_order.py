"""Order of changed routings, and masks that stay where they are."""

import pytest
import torch

import models_zoo
from moescope import interventions as change
from test_interventions import both_kinds, busiest, loaded, outputs
from test_interventions_families import loaded as family_loaded
from test_interventions_families import logits, observed

HIDDEN = models_zoo.HIDDEN


@both_kinds
def test_the_later_top_k_sees_what_the_earlier_left(kind):
    model = loaded(kind)
    layer = model.layers[0]
    with change.set_top_k(layer, 2, "to_one"):
        expected = observed(model, layer).routing.weights.max(1).values
    with change.set_top_k(layer, 2, "to_one"), change.set_top_k(layer, 1):
        weights = observed(model, layer).routing.weights
    torch.testing.assert_close(weights.sum(1), expected)


@both_kinds
def test_experts_left_out_add_nothing_whatever_they_compute(kind):
    model = loaded(kind)
    layer = model.layers[0]
    e = (layer, busiest(model, layer))
    nothing = outputs(model, layer, change.set_top_k(layer, 0))
    replaced = change.replace_output(e, torch.ones(HIDDEN))
    assert torch.equal(outputs(model, layer, change.set_top_k(layer, 0), replaced), nothing)


@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash", "ernie4_5_moe", "gpt_oss"])
def test_masks_stay_at_their_position_when_blocks_are_swapped(family):
    model = family_loaded(family)
    first, last = model.layers[0], model.layers[-1]
    with change.swap_blocks(first, last):
        expert = busiest(model, first)
        with change.mask_experts(first, [expert]):
            expected = logits(model)
    with change.mask_experts(first, [expert]), change.swap_blocks(first, last):
        assert torch.equal(logits(model), expected)
