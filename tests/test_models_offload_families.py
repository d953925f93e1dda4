"""Every family with its weights on disk: the same as in memory, or refused."""

import pytest

from moescope.errors import ModelError
from moescope.models.load import load
from test_models_families import BUILDERS, loaded, outputs, relative

# What transformers itself fails on with weights on disk: it raises, or computes something else.
NOT_WITHOUT_WEIGHTS = {"dbrx", "jetmoe", "llama4_text", "longcat_flash"}
# Text parts of larger models, which no automatic class reads alone.
NOT_READ_ALONE = {
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


@pytest.mark.parametrize("family", sorted(BUILDERS.keys() - NOT_WITHOUT_WEIGHTS - NOT_READ_ALONE))
def test_weights_on_disk_change_nothing(family, tmp_path):
    BUILDERS[family]().save_pretrained(tmp_path)
    offloaded = load(tmp_path, device_map={"": "disk"})
    assert all(parameter.is_meta for parameter in offloaded.model.parameters())
    assert relative(outputs(offloaded), outputs(loaded(family))) <= 1e-5


@pytest.mark.parametrize("family", sorted(NOT_WITHOUT_WEIGHTS))
def test_what_does_not_run_offloaded_is_refused(family, tmp_path):
    BUILDERS[family]().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not run as it should with offloaded weights"):
        load(tmp_path, device_map={"": "disk"})
