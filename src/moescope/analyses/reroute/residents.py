"""Which experts are resident at a budget."""

from collections.abc import Mapping, Sequence

from moescope.analyses.fits import Source


def resident_numbers(experts: int, budgets: Sequence[float]) -> list[int]:
    """Numbers of resident experts, most first; at least one is, and one is not."""
    numbers = {min(max(1, round(budget * experts)), experts - 1) for budget in budgets}
    return sorted(numbers, reverse=True)


def residents(tokens: Mapping[Source, int], number: int) -> list[Source]:
    """The experts that the most tokens use, over all layers; the first of equal ones."""
    by_use = sorted(tokens, key=lambda expert: (-tokens[expert], expert))
    return sorted(by_use[:number])
