"""The experts that every token goes through."""

from jaxtyping import Float
from torch import Tensor, nn, sigmoid


def shared_experts(
    module: nn.Module, x: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "tokens hidden"] | None:
    """Sum over children called `shared_...`: `shared(x)`, or `sigmoid(shared_gate(x)) * shared(x)`.

    The latter where there is a `shared_..._gate`. None without any.
    """
    children = {
        name: child for name, child in module.named_children() if name.startswith("shared_")
    }
    outputs: list[Tensor] = []
    for name, child in children.items():
        if name.endswith("_gate"):
            continue
        x = x.to(next(child.parameters()).dtype)
        output: Tensor = child(x)
        gate = children.get(f"{name}_gate")
        outputs.append(output if gate is None else sigmoid(gate(x)) * output)
    return sum(outputs[1:], outputs[0]) if outputs else None
