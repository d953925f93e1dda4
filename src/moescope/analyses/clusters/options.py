"""What can be set about `clusters`."""

from dataclasses import dataclass

from moescope.analyses.likeness import FEWEST
from moescope.analyses.likeness_options import LikenessOptions
from moescope.config import IntList
from moescope.errors import OptionError, require_least


@dataclass(frozen=True, kw_only=True)
class ClustersOptions(LikenessOptions):
    """Options of `clusters`."""

    shares: tuple[float, ...] = (0.9, 0.75, 0.5)
    """Shares of the experts that are kept where losses are measured: as many clusters."""
    kept: IntList = ()
    """Numbers of experts kept, in the place of `shares`."""
    stability_experts: int = 16
    """Experts that clusterings of other documents, seeds and random experts are compared on, drawn
    evenly from the layers; 0 for none. Their adapters are fitted 3 + `random` times more."""
    permutations: int = 200
    """Permutations behind each null."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_least(self, {"stability_experts": 0, "permutations": 20})
        if 0 < self.stability_experts < FEWEST:
            raise OptionError(
                "too few experts to compare clusterings on",
                got=self.stability_experts,
                expected=f"0, or at least {FEWEST}",
            )
        if not (self.kept or self.shares):
            raise OptionError("there are no sizes to measure", remedy="Give shares, or kept")
        for kept in self.kept:
            if kept < 1:
                raise OptionError("too few experts kept", got=kept, expected="at least 1")
        for share in self.shares:
            if not 0 < share < 1:
                raise OptionError("not a share of the experts", got=share, expected="between 0, 1")
