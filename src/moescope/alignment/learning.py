"""How the numbers change with the training tokens: would more of them have helped?"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float

from moescope.alignment.options import FitOptions
from moescope.alignment.pairs import fit_pairs
from moescope.alignment.randomness import generator
from moescope.alignment.samples import Samples
from moescope.alignment.trainer import Progress
from moescope.errors import OptionError
from moescope.experts.weights import ExpertWeights

SHARES = (8, 4, 2)
"""Parts of the training tokens that a curve is fitted on, beside all of them."""


def learning_curve(
    train: Samples,
    held_out: Samples,
    targets: Mapping[str, ExpertWeights],
    *,
    sizes: Sequence[int] | None = None,
    source: ExpertWeights | None = None,
    source_name: str = "source",
    target_inputs: Mapping[str, Float[torch.Tensor, "..."]] | None = None,
    options: FitOptions = FitOptions(),  # noqa: B008 (frozen)
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Align on nested parts of the training tokens, by whole documents.

    Every part is measured on the same held-out tokens, with controls of its own: what falls for the
    pair may fall for the random targets too. Parts with fewer than four tokens per dimension get
    another form of adapter, as in `fit_pairs`; columns `form` and `rank` say so.

    Args:
        train: Tokens to learn from.
        held_out: Tokens for the reported errors.
        targets: Experts by name, of the same hidden size.
        sizes: Wanted numbers of training tokens; an eighth, a quarter, a half and all where left
            out. Sizes that come down to the same documents are fitted once.
        source: As for `fit_pairs`.
        source_name: As for `fit_pairs`.
        target_inputs: As for `fit_pairs`.
        options: As for `fit_pairs`; the budget is that of each part.
        progress: Called with the number of fits done and of all fits of a part.

    Returns:
        For every part, from small to large, and every target a row: `target`, and the columns of
        `AlignmentResult.row`, `n_train` among them.

    Raises:
        AlignmentError: Shapes do not fit, or a tensor holds NaN or infinity.
        OptionError: A size is no number of training tokens.
    """
    rows, last = [], 0
    for size in _sizes(sizes, len(train)):
        order = generator(options.seed, source_name, "learning curve")
        part = train.first(size, order)
        if len(part) == last:
            continue
        last = len(part)
        found = fit_pairs(
            part,
            held_out,
            targets,
            source=source,
            source_name=source_name,
            target_inputs=target_inputs,
            options=options,
            progress=progress,
        )
        rows += [{"target": name, **result.row()} for name, result in found.items()]
    return rows


def _sizes(sizes: Sequence[int] | None, tokens: int) -> list[int]:
    if sizes is None:
        return [max(1, tokens // share) for share in (*SHARES, 1)]
    for size in sizes:
        if not 1 <= size <= tokens:
            raise OptionError(
                "a part of the training tokens is empty or larger than all of them",
                got=size,
                expected=f"1 to {tokens}",
            )
    return sorted(sizes)
