"""How alike the output with one expert and that with all are, in four forms, with controls."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from moescope.analyses.ensemble.parts import Parts

MEASURES = ("cosine", "centred_cosine", "norm_ratio", "relative_error")
ONE_EXPERT = ("top", "random", "lowest")


class Pair(NamedTuple):
    """Two outputs for the same tokens."""

    form: str
    """What the experts are added to: `routed`, nothing; `block`, the shared expert; `residual`,
    the residual stream and the shared expert; `published`, the normed input and the shared
    expert."""
    compared: str
    """`top`, `random` or `lowest`: one expert; `shared_only`: none; `residual_only`: not even the
    shared expert."""
    one: Float[Tensor, "tokens hidden"]
    """The output to be compared."""
    all: Float[Tensor, "tokens hidden"]
    """The output with all K experts."""


def pairs_of(parts: Parts) -> Iterator[Pair]:
    """Every form with what there is to compare; what would be zero or occur twice is left out."""
    shared = parts.get("shared")
    streams = {"routed": torch.zeros_like(parts["all"])}
    if shared is not None:
        streams["block"] = shared
    bare = {"residual": parts["residual"], "published": parts["input"]}
    streams |= {form: x if shared is None else x + shared for form, x in bare.items()}
    for form, stream in streams.items():
        whole = stream + parts["all"]
        for name in ONE_EXPERT:
            yield Pair(form, name, stream + parts[name], whole)
        if shared is not None and form != "routed":
            yield Pair(form, "shared_only", stream, whole)
        if form in bare:
            yield Pair(form, "residual_only", bare[form], whole)


def measured(
    read: Callable[[], Iterator[Parts]],
) -> dict[tuple[str, str], Float[Tensor, "measures tokens"]]:
    """`MEASURES` of every token, by form and what is compared.

    The cosine of a token is that of the two outputs; the centred one is taken after each of them
    lost its mean over all tokens, so that what is the same for every token counts for nothing.
    Norm ratio and relative error `|one - all| / |all|` are of the uncentred outputs. NaN where a
    vector is zero.

    Args:
        read: Gives the parts of all tokens, each time that it is called: means come first.
    """
    means = _means(read())
    found: dict[tuple[str, str], list[Tensor]] = {}
    for parts in read():
        centred = {name: (part - means[name]).float() for name, part in parts.items()}
        for pair, moved in zip(pairs_of(parts), pairs_of(centred), strict=True):
            norm = pair.all.norm(dim=1)
            values = [
                _cosines(pair.one, pair.all),
                _cosines(moved.one, moved.all),
                pair.one.norm(dim=1) / norm,
                (pair.one - pair.all).norm(dim=1) / norm,
            ]
            measures = torch.where(norm > 0, torch.stack(values), torch.nan)
            found.setdefault((pair.form, pair.compared), []).append(measures)
    return {key: torch.cat(values, dim=1) for key, values in found.items()}


def _means(every: Iterator[Parts]) -> dict[str, Float64[Tensor, " hidden"]]:
    sums: dict[str, Tensor] = {}
    tokens = 0
    for parts in every:
        tokens += len(parts["all"])
        for name, part in parts.items():
            sums[name] = sums.get(name, 0) + part.sum(0, dtype=torch.float64)
    return {name: total / tokens for name, total in sums.items()}


def _cosines(one: Tensor, other: Tensor) -> Float[Tensor, " tokens"]:
    norms: Tensor = one.norm(dim=1) * other.norm(dim=1)
    return torch.where(norms > 0, (one * other).sum(1) / norms, torch.nan)
