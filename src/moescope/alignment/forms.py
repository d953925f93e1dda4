"""Which form of adapter is fitted, and what it costs."""

from dataclasses import replace

from moescope.alignment.options import WELL_DETERMINED, FitOptions
from moescope.experts.adapter import TENSORS, Form


def underdetermined(options: FitOptions, tokens: int, hidden: int) -> bool:
    """Whether the form asked for has more freedom than so many training tokens can settle.

    Every token gives `hidden` numbers. A matrix has `hidden` times `hidden` of its own, a low-rank
    delta `2 * rank` times `hidden` and never more than a matrix; four must stand for each.
    """
    rank = trained_rank(options.form, hidden, options.rank)
    return tokens < WELL_DETERMINED * min(2 * rank, hidden)


def fitted_options(options: FitOptions, tokens: int, hidden: int) -> FitOptions:
    """The options of the fits themselves, for so many training tokens.

    With fewer than four tokens per dimension the full matrix is underdetermined: a low-rank delta
    takes its place, whose rank, an eighth of the tokens, again leaves four numbers of the outputs
    to one number of the factors. The published protocol is always the study's own adapter. No rank
    is above the hidden size.
    """
    if options.protocol == "published":
        return options
    if options.form == "layer_norm" and underdetermined(options, tokens, hidden):
        options = replace(options, form="low_rank", rank=max(1, tokens // 8))
    return replace(options, rank=min(options.rank, hidden))


def num_parameters(form: Form, hidden: int, rank: int) -> int:
    """Numbers in an adapter of a form."""
    sizes = {
        "weight": hidden * hidden,
        "left": hidden * rank,
        "right": rank * hidden,
        "gain": 1 if form == "orthogonal" else hidden,
    }
    return sum(sizes.get(name, hidden) for name in TENSORS[form])


def trained_rank(form: Form, hidden: int, rank: int) -> int:
    """Rank of the trained matrix, 0 where the form has none."""
    if form == "low_rank":
        return rank
    return hidden if "weight" in TENSORS[form] else 0


def hidden_rank(form: Form, rank: int) -> int | None:
    """Rank of the hidden rotation that an adapter of a form can undo; None: any rotation."""
    if "weight" in TENSORS[form]:
        return None
    return rank if form == "low_rank" else 0
