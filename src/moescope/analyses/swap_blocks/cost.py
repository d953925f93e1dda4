"""About how much it takes to read everything once for each swap."""

from moescope.analyses.swap_blocks.options import SwapOptions
from moescope.analyses.work import parameters_met
from moescope.models.view import MoEModel

_QUESTION = 40
"""Tokens of a question and its answer: a guess."""


def reading_operations(model: MoEModel, options: SwapOptions, swaps: int) -> float:
    """Floating-point operations of reading with the model as it is and once with each swap."""
    tokens = _QUESTION * options.most_questions if options.questions else options.tokens
    return 2.0 * parameters_met(model) * tokens * (1 + swaps)
