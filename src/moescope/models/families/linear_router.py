"""Routers that are one linear map and what they make of it."""

from torch import Tensor, nn

from moescope.errors import ModelError

ROUTERS = ("gate", "router")


def router_of(block: nn.Module) -> nn.Module:
    """The child called `gate` or `router`."""
    children = dict(block.named_children())
    return next(children[name] for name in ROUTERS if name in children)


def linear_map(router: nn.Module, least_rows: int = 1) -> tuple[Tensor, Tensor | None]:
    """The one matrix in a router, of at least so many rows, and the bias beside it; detached.

    Raises:
        ModelError: It holds several, or none.
    """
    found = []
    for module in router.modules():
        own = {name: tensor.detach() for name, tensor in module.named_parameters(recurse=False)}
        matrices = [tensor for tensor in own.values() if tensor.ndim == 2]
        found += [(m, own.get("bias")) for m in matrices if len(m) >= least_rows]
    if len(found) != 1:
        raise ModelError(
            "a router is more than one linear map",
            got=f"{len(found)} matrices in {type(router).__name__}",
        )
    return found[0]
