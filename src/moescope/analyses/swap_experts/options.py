"""What can be set about `swap-experts`."""

from dataclasses import dataclass

from moescope.analyses.swap_blocks.options import SwapOptions
from moescope.config import IntList
from moescope.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class SwapExpertsOptions(SwapOptions):
    """Options of `swap-experts`."""

    pairs: tuple[str, ...] = ()
    """Pairs of experts as layer.expert-layer.expert, such as `0.3-5.1`; if left out the most used
    expert of each layer with that of each other layer."""
    layers: IntList = ()
    """Two layers, all experts of the one with all of the other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs and self.layers:
            raise OptionError("pairs and layers exclude each other", remedy="Leave one of them out")
        if self.layers and len(set(self.layers)) != 2:
            raise OptionError(
                "layers are two, as all pairs of experts of more are very many",
                got=", ".join(map(str, self.layers)),
                expected="two different layers",
            )
