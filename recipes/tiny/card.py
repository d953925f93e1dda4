"""Measure the shipped `tiny` and write its model card.

    python recipes/tiny/card.py --work DIR

Needs `train.py` to have run (its training documents are the trigram model's too) and the chosen
checkpoint to lie in the package. Every number on the card is measured on those bf16 weights.
"""

import argparse
import tempfile
from pathlib import Path

import documents
import numpy as np
import torch
from trigram import Trigram

import moescope
from moescope.measures.bootstrap import ratio_interval

DOMAINS = ("encyclopedia", "maths", "code", "french")
CONTEXT = 256
TUNING_SHARE = 20  # every 20th training document tunes the trigram's weights
HERE = Path(__file__).parent
CARD = Path(moescope.__file__).parent / "models/reference/tiny/README.md"


def model_losses(model: moescope.MoEModel, tokens: list[int]) -> list[float]:
    """Loss in nats of every token but the first; windows of `CONTEXT`, each token scored once."""
    found = []
    for start in range(0, len(tokens) - 1, CONTEXT):
        window = torch.tensor([tokens[start : start + CONTEXT + 1]])
        with torch.no_grad():
            logits = model.model(window[:, :-1]).logits[0].float()
        loss = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
        found += loss.tolist()
    return found


def loss_table(work: Path, model: moescope.MoEModel) -> list[str]:
    """Markdown rows: loss per domain of the model and of the trigram, 95% over documents."""
    tokenizer = model.tokenizer

    def tokenize(path: Path) -> list[list[int]]:
        return [
            [tokenizer.bos_token_id, *ids]
            for ids in tokenizer([text for _, text in documents.read(path)])["input_ids"]
        ]

    train = [t for d in DOMAINS for t in tokenize(work / "train" / f"{d}.jsonl")]
    tuning = train[::TUNING_SHARE]
    counted = [tokens for i, tokens in enumerate(train) if i % TUNING_SHARE]
    trigram = Trigram(counted, tuning, len(tokenizer))
    rows = []
    for domain in DOMAINS:
        held_out = tokenize(documents.BUILTIN / f"{domain}.jsonl")
        sizes = np.array([len(tokens) - 1 for tokens in held_out])
        cells = []
        for losses in (lambda t: model_losses(model, t), trigram.losses):
            sums = np.array([[sum(losses(tokens))] for tokens in held_out])
            low, high = ratio_interval(sums, sizes, resamples=2_000, seed=0)
            cells.append(f"{sums.sum() / sizes.sum():.3f} ({low[0]:.3f} to {high[0]:.3f})")
        rows.append(f"| {domain} | {len(held_out)} | {sizes.sum()} | {cells[0]} | {cells[1]} |")
    return rows


def divergence_rows(model: moescope.MoEModel) -> list[str]:
    """Markdown rows: routing divergence by pair of domains, mean over layers, and its null."""
    with tempfile.TemporaryDirectory() as folder:
        moescope.capture(model, moescope.Corpus.builtin(), folder, record=("routing",))
        table = moescope.routing(folder, model=model).tables["divergence"]
    rows = []
    for (a, b), part in table.groupby(["domain_a", "domain_b"], sort=False):
        rows.append(
            f"| {a}, {b} | {part.js_bits.min():.3f} to {part.js_bits.max():.3f} | "
            f"{part.null_p95.max():.3f} | {part.p_value.max():.3f} |"
        )
    return rows


def last_step(log: Path) -> str:
    return [line for line in log.read_text("utf-8").splitlines() if line.startswith("step")][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    model = moescope.load("tiny")
    template = (HERE / "card.md").read_text(encoding="utf-8")
    tables = {
        "LOSSES": loss_table(work, model),
        "DIVERGENCES": divergence_rows(model),
        "LOG": ["```", last_step(work / "train.log"), "```"],
    }
    for name, rows in tables.items():
        template = template.replace(f"@{name}@", "\n".join(rows))
    CARD.write_text(template, encoding="utf-8")


if __name__ == "__main__":
    main()
