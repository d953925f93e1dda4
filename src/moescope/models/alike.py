"""Which experts could stand in each other's place, tensor by tensor."""

from moescope.errors import OptionError
from moescope.models.view import MoELayer


def require_alike(a: tuple[MoELayer, int], b: tuple[MoELayer, int]) -> None:
    """Refuse two experts that are not built alike.

    Raises:
        OptionError: There is no such expert, or shapes, dtypes or nonlinearities differ.
        ModelError: The weights are not plain numbers in memory (quantised, offloaded).
    """
    forms = _form(*a), _form(*b)
    if forms[0] != forms[1]:
        raise OptionError("these experts are not built alike", got=forms[1], expected=forms[0])


def _form(layer: MoELayer, expert: int) -> tuple[object, ...]:
    weights = layer.expert_weights(expert)
    tensors = sorted(layer.expert_tensors(expert).items())
    shapes = [f"{name} {tuple(t.shape)} {t.dtype}".replace("torch.", "") for name, t in tensors]
    settings = (weights.activation, weights.limit, weights.up_offset)
    return (type(layer.block).__name__, *shapes, *settings)
