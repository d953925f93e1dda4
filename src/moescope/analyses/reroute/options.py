"""What can be set about `reroute`."""

from dataclasses import dataclass

from moescope.analyses.likeness_options import LikenessOptions
from moescope.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class RerouteOptions(LikenessOptions):
    """Options of `reroute`."""

    budgets: tuple[float, ...] = (0.9, 0.75, 0.5, 0.25)
    """Shares of the experts of all layers that are resident: those that are used most."""
    thresholds: tuple[float, ...] = (1.0, 0.7)
    """Inner FVU of the expert that a token would go to above which it is skipped instead. The
    first holds for all routes that are compared; the others are measured for those to any layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("budgets", "thresholds"):
            if not getattr(self, name):
                raise OptionError(f"there are no {name}", remedy=f"Give {name}")
        for budget in self.budgets:
            if not 0 < budget < 1:
                raise OptionError("not a share of the experts", got=budget, expected="between 0, 1")
        for threshold in self.thresholds:
            if not threshold > 0:
                raise OptionError("no threshold of an FVU", got=threshold, expected="more than 0")
