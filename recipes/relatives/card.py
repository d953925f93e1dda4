"""Measure the relatives of `tiny` on held-out text and write their card, `README.md`.

    python recipes/relatives/card.py --work DIR

Needs all of `training.py`. Every number is measured on the bf16 weights that were saved. All models
read the same batches, so that differences are paired.
"""

import argparse
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import pandas as pd
import torch
from training import MODELS

import moescope
from moescope.corpora.packing import Packing
from moescope.evaluate.predictions import Targets, evaluating, forward, losses
from moescope.evaluate.totals import Resampling, Totals, difference_columns, mean_columns
from moescope.surgery.conversion import SplitOptions, split

HERE = Path(__file__).parent
LAST = {name: f"{name}/step-{plan.steps}" for name, plan in MODELS.items()}
STEPS = {
    name: [f"{name}/step-{step}" for step in (*plan.saved, plan.steps) if step or plan.skipped]
    for name, plan in MODELS.items()
}
COMPARED = (
    ("continued", "dense"),
    ("upcycled", "continued"),
    ("split", "continued"),
    ("upcycled", "split"),
    ("upcycled", "small"),
)
CHOSEN = (8, 4, 2)
TOKENS = 40_000  # of the built-in corpus, where there are many models
RESAMPLING = Resampling(resamples=2_000, seed=0)


def opened(name: str, work: Path) -> moescope.MoEModel:
    """One of `tiny`, a folder in `work`, or `split N`: the dense model split, N experts chosen."""
    if name == "tiny":
        return moescope.load(name)
    if name.startswith("split "):
        options = SplitOptions(experts=8, top_k=int(name.removeprefix("split ")))
        return split(work / LAST["dense"], options).model
    folder = work / name
    return moescope.load(folder, dense_as_experts=name.startswith(("dense", "continued")))


def measured(names: Iterable[str], work: Path, max_tokens: int | None) -> pd.DataFrame:
    """Tokens of each document and summed losses of each model, by domain and document."""
    frames = [measured_one(name, work, max_tokens) for name in names]
    return pd.concat([frames[0].tokens, *(f.drop(columns="tokens") for f in frames)], axis=1)


def measured_one(name: str, work: Path, max_tokens: int | None) -> pd.DataFrame:
    model, corpus = opened(name, work), moescope.Corpus.builtin(Packing(max_tokens=max_tokens))
    totals = Totals(corpus.domains)
    with evaluating(model):
        for batch in corpus.batches(model.tokenizer):
            targets = Targets.of(batch, torch.device("cpu"))
            totals.add(targets, {name: losses(forward(model, batch), targets)})
    return pd.concat(dict(totals.by_domain()), names=["part"])


def mean(documents: pd.DataFrame, name: str) -> str:
    found = mean_columns(documents, [name], RESAMPLING)
    return "{:.3f} ({:.3f} to {:.3f})".format(*found.values())


def loss_rows(documents: pd.DataFrame) -> list[str]:
    """Markdown: one row per domain, one column per model."""
    names = ["tiny", *LAST.values()]
    rows = []
    for domain, part in documents.groupby(level="part", sort=False):
        cells = " | ".join(mean(part, name) for name in names)
        rows.append(f"| {domain} | {len(part)} | {int(part.tokens.sum()):,} | {cells} |")
    return rows


def difference_rows(documents: pd.DataFrame) -> list[str]:
    """Markdown: paired differences over all documents."""
    part, rows = documents.loc["all"], []
    for one, other in COMPARED:
        pair = part.assign(difference=part[LAST[one]] - part[LAST[other]])
        found = difference_columns(pair, "difference", RESAMPLING)
        cell = "{:+.3f} ({:+.3f} to {:+.3f})".format(*found.values())
        rows.append(f"| {one} minus {other} | {cell} |")
    return rows


def step_rows(documents: pd.DataFrame) -> list[str]:
    """Markdown: loss along training."""
    return [
        f"| {name} | {folder.partition('-')[2]} | {mean(documents.loc['all'], folder)} |"
        for name, folders in STEPS.items()
        for folder in folders
    ]


def chosen_rows(documents: pd.DataFrame) -> list[str]:
    """Markdown: what a split costs before any training, by experts per token."""
    part, rows = documents.loc["all"], []
    for k in CHOSEN:
        pair = part.assign(difference=part[f"split {k}"] - part[LAST["dense"]])
        found = difference_columns(pair, "difference", RESAMPLING)
        cell = "{:+.3f} ({:+.3f} to {:+.3f})".format(*found.values())
        rows.append(f"| {k} of 8 | {mean(part, f'split {k}')} | {cell} |")
    return rows


def log_rows(work: Path) -> list[str]:
    """Last line of each training log."""
    rows = []
    for name in MODELS:
        lines = (work / f"{name}.log").read_text("utf-8").splitlines()
        rows.append(f"{name}: {[line for line in lines if line.startswith('step')][-1]}")
    return ["```", *rows, "```"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    last = measured(["tiny", *LAST.values()], work, None)
    names = [*chain(*STEPS.values()), *(f"split {k}" for k in CHOSEN)]
    documents = measured(names, work, TOKENS)
    card = (HERE / "card.md").read_text(encoding="utf-8")
    tables = {
        "LOSSES": loss_rows(last),
        "DIFFERENCES": difference_rows(last),
        "STEPS": step_rows(documents),
        "CHOSEN": chosen_rows(documents),
        "LOGS": log_rows(work),
    }
    for name, rows in tables.items():
        card = card.replace(f"@{name}@", "\n".join(rows))
    (HERE / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
