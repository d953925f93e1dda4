"""A tiny random model of every family that loads, each with at least two sparse layers."""

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedModel

import deviants_zoo
import families_zoo

_DEEPER = {"deepseek_v3": 3, "ernie4_5_moe": 3, "jamba": 4}

BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    family: partial(families_zoo.build, family) for family in families_zoo.FAMILIES
}
BUILDERS |= deviants_zoo.DEVIANTS
BUILDERS |= {
    family: partial(families_zoo.build, family, num_hidden_layers=layers)
    for family, layers in _DEEPER.items()
}
BUILDERS["step3p7"] = partial(
    deviants_zoo.step3p7, num_hidden_layers=3, mlp_layer_types=["dense", "sparse", "sparse"]
)
