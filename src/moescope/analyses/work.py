"""How much work a pass through a model is, before it is done."""

from moescope.models.view import MoEModel


def parameters_met(model: MoEModel) -> int:
    """About how many parameters a token meets: all but those of the experts it does not use."""
    idle = sum(
        (layer.num_experts - layer.top_k) * 3 * layer.hidden_size * layer.intermediate_size
        for layer in model.layers
    )
    return sum(parameter.numel() for parameter in model.model.parameters()) - idle
