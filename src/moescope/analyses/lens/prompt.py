"""The lens over one prompt: what every column says at every position."""

from typing import get_args

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from moescope.analyses.lens.corpus import Lens
from moescope.analyses.prompts import tokenizer_of, visible
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Packing
from moescope.decoding.columns import Kind, watch
from moescope.decoding.lens import Decoded, decoded
from moescope.errors import OptionError

SHOWN = 5
"""Tokens of largest probability that the table holds for each column."""


def prompt_ids(lens: Lens, prompt: str) -> list[int]:
    """The tokens of a prompt, with those that the tokenizer puts before a text.

    Raises:
        OptionError: The model has no tokenizer, or the prompt holds no token.
    """
    ids = tokenizer_of(lens.readout.model)(prompt)["input_ids"]
    if not ids:
        raise OptionError("the prompt holds no token", got=repr(prompt))
    return [int(number) for number in ids]


def as_corpus(ids: list[int]) -> Corpus:
    """The prompt as a text of one document, all of whose positions count."""
    packing = Packing(length=max(2, len(ids)), rows=1, packed=False, skip_first=False, shuffle=0)
    return Corpus.from_token_ids({"prompt": [ids]}, packing)


def prompt_table(lens: Lens, ids: list[int]) -> pd.DataFrame:
    """One row per position, layer and column.

    Returns:
        position, token, stack, layer, column, kind, rank; experts, those of the column with their
        weights; top_1 to top_5, the likeliest tokens, and p_1 to p_5; kl.
    """
    row = torch.tensor([ids])
    everywhere = torch.arange(len(ids))
    last, layers = watch(lens.readout, lens.endings, row, torch.ones_like(row), everywhere)
    tokenizer = tokenizer_of(lens.readout.model)
    tokens = [visible(tokenizer, number) for number in ids]
    parts = decoded(lens.readout, last, layers, lens.translation)
    frame = pd.concat([_rows(part, tokens, tokenizer) for part in parts], ignore_index=True)
    order = ["position", "layer", "kind", "rank"]
    kinds = {kind: place for place, kind in enumerate(get_args(Kind))}
    return frame.sort_values(
        order, key=lambda c: c.map(kinds) if c.name == "kind" else c, ignore_index=True
    )


def _rows(part: Decoded, tokens: list[str], tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    layer, column = part.states.ending.layer, part.column
    likeliest = part.log_probabilities.topk(SHOWN)
    names = [[visible(tokenizer, n) for n in row] for row in likeliest.indices.tolist()]
    frame = pd.DataFrame(
        {
            "position": range(*part.positions.indices(len(tokens))),
            "token": tokens[part.positions],
            "stack": layer.stack,
            "layer": layer.index,
            "column": column.label(layer),
            "kind": column.kind,
            "rank": column.rank,
            "experts": _experts(part),
        }
    )
    for place, chosen in enumerate(zip(*names, strict=True), start=1):
        frame[f"top_{place}"] = chosen
    for place, values in enumerate(likeliest.values.exp().T.tolist(), start=1):
        frame[f"p_{place}"] = values
    frame["kl"] = part.divergence.tolist()
    return frame[part.states.used(column).tolist()]


def _experts(part: Decoded) -> list[str]:
    """Those of a column with their weights, the largest first."""
    rank, states = part.column.rank, part.states
    chosen = {
        "residual": slice(0),
        "shared": slice(0),
        "top": slice(rank),
        "output": slice(None),
        "added": slice(rank - 1, rank),
        "alone": slice(rank - 1, rank),
    }[part.column.kind]
    return [
        ", ".join(f"{e} ({w:.2f})" for e, w in zip(experts, weights, strict=True) if e >= 0)
        for experts, weights in zip(
            states.experts[:, chosen].tolist(), states.weights[:, chosen].tolist(), strict=True
        )
    ]
