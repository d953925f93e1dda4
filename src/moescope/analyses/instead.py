"""What computes the tokens of experts that are gone, and the parameters that it takes.

Nothing of it is held in memory before the model is changed, for there may be many.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from moescope.analyses.fits import Fits, Source, Target
from moescope.analyses.losses import entered
from moescope.interventions import Expert, replace_output, substitute


@dataclass(frozen=True, kw_only=True, eq=False)
class Instead:
    """What takes the place of some experts."""

    changes: Callable[[], Sequence[AbstractContextManager[None]]]
    """Make the model compute it."""
    parameters: int
    """Numbers in adapters, maps and means."""

    def change(self) -> AbstractContextManager[None]:
        """Have the model compute it."""
        return entered(self.changes())


def through_adapters(fits: Fits, routes: Mapping[Source, Source]) -> Instead:
    """Other experts, behind their adapters; for each expert which."""
    pairs = [(source, Target(*end)) for source, end in routes.items()]
    return Instead(
        changes=lambda: [fits.substituting(fits.between(s, [t])[t]) for s, t in pairs],
        parameters=sum(fits.between(s, [t])[t].row["adapter_parameters"] for s, t in pairs),
    )


def linear_maps(fits: Fits, gone: Sequence[Source]) -> Instead:
    """The best linear maps: no experts."""
    widths = [fits.material.model.layer(source.layer).hidden_size for source in gone]
    return Instead(
        changes=lambda: [substitute(expert_of(fits, s), None, fits.linear(s)) for s in gone],
        parameters=sum(width * (width + 1) for width in widths),
    )


def mean_outputs(fits: Fits, gone: Sequence[Source]) -> Instead:
    """Their mean outputs."""
    widths = [fits.material.model.layer(source.layer).hidden_size for source in gone]
    return Instead(
        changes=lambda: [replace_output(expert_of(fits, s), fits.mean(s)) for s in gone],
        parameters=sum(widths),
    )


def nothing(fits: Fits, gone: Sequence[Source]) -> Instead:
    """Nothing: what the router gave them is lost."""
    return Instead(
        changes=lambda: [replace_output(expert_of(fits, s), 0.0) for s in gone], parameters=0
    )


def expert_of(fits: Fits, of: Source) -> Expert:
    """As interventions know it."""
    return fits.material.model.layer(of.layer), of.expert
