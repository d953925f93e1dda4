"""Changes to a model that last as long as a `with` block; afterwards it is the same to the bit."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.interventions.blocks import swap_blocks as swap_blocks
    from moescope.interventions.choice import mask_experts as mask_experts
    from moescope.interventions.choice import set_top_k as set_top_k
    from moescope.interventions.functions import Expert as Expert
    from moescope.interventions.functions import insert_adapter as insert_adapter
    from moescope.interventions.functions import replace_output as replace_output
    from moescope.interventions.functions import scale_expert as scale_expert
    from moescope.interventions.functions import substitute as substitute
    from moescope.interventions.tensors import ablate_neurons as ablate_neurons
    from moescope.interventions.tensors import swap_experts as swap_experts
    from moescope.interventions.trials import support as support

_HOMES = {
    "Expert": "functions",
    "ablate_neurons": "tensors",
    "insert_adapter": "functions",
    "mask_experts": "choice",
    "replace_output": "functions",
    "scale_expert": "functions",
    "set_top_k": "choice",
    "substitute": "functions",
    "support": "trials",
    "swap_blocks": "blocks",
    "swap_experts": "tensors",
}


def __getattr__(name: str) -> Any:
    """The interventions, on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
