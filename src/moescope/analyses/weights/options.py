"""What can be set about `weights`."""

from dataclasses import dataclass

from moescope.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class WeightsOptions:
    """Options of `weights`."""

    checkpoint: str | None = None
    """Folder, Hub id or name of a reference model to read; that of the capture if left out."""
    revision: str | None = None
    """Branch, tag or commit of the checkpoint on the Hub."""
    ancestor: str | None = None
    """A dense model that the experts may descend from: folder, Hub id or name."""
    matched: int = 28
    """Most pairs of experts of one layer whose neurons are matched, at random; their time grows
    with the third power of the number of neurons."""
    matched_across: int = 28
    """The same for each two neighbouring layers."""
    null_pairs: int = 20
    """Pairs behind each null of the matching: of Gaussian experts of equal shape, and, by layer, of
    experts one of which is scrambled."""
    permutations: int = 9_999
    """Permutations of the experts behind each p-value."""
    reach: int | None = None
    """Compare layers that lie up to so many sparse layers apart; all if left out, which reads the
    checkpoint about half as many times as there are layers."""
    cells: int = 200_000
    """Most pairs of experts across layers that are kept one by one, not as means alone."""
    seed: int = 0
    """Seed of choices, null and permutations."""

    def __post_init__(self) -> None:
        for name in ("matched", "matched_across", "cells"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name} is below 0", got=getattr(self, name))
        for name in ("null_pairs", "permutations"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is too small", got=getattr(self, name), expected="1")
        if self.reach is not None and self.reach < 1:
            raise OptionError("reach is too small", got=self.reach, expected="at least 1")
        if self.revision is not None and self.checkpoint is None:
            raise OptionError("a revision needs a checkpoint", got=self.revision)
