"""Measure the shipped `tiny-switch` on the test split of BANKING77 and write its model card.

    python recipes/switch/card.py --sources DIR --work WORK

Needs `finetune.py` to have run and the model to lie in the package. Every number on the card is
measured on those bf16 weights.
"""

import argparse
from pathlib import Path

import baseline
import numpy as np
import questions
import torch
from finetune import encoded, right
from jaxtyping import Bool
from learning import Batch, Switch, logits_of, padded, routers
from scipy.stats import binomtest

import moescope

HERE = Path(__file__).parent
CARD = Path(moescope.__file__).parent / "models/reference/tiny-switch/README.md"


def share(hits: Bool[np.ndarray, " questions"]) -> str:
    """A share with its 95% Wilson interval over questions."""
    limits = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return f"{hits.mean():.3f} ({limits.low:.3f} to {limits.high:.3f})"


def accuracy_rows(
    ours: Bool[np.ndarray, " questions"], theirs: Bool[np.ndarray, " questions"]
) -> list[str]:
    """Markdown rows: both shares, and their paired difference with its normal interval."""
    difference = ours.astype(float) - theirs
    reach = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
    cell = f"{difference.mean():+.3f} ({difference.mean() - reach:+.3f} to "
    return [
        f"| `tiny-switch` | {len(ours)} | {share(ours)} |",
        f"| logistic regression on a bag of words | {len(theirs)} | {share(theirs)} |",
        f"| difference, paired | {len(ours)} | {cell}{difference.mean() + reach:+.3f}) |",
    ]


@torch.no_grad()
def routing_rows(model: Switch, batch: Batch) -> list[str]:
    """Markdown rows: percent of the tokens that go to each expert, by sparse layer."""
    seen: list[torch.Tensor] = []
    hooks = [r.register_forward_hook(lambda m, i, o: seen.append(o[0])) for r in routers(model)]
    logits_of(model, batch)
    for hook in hooks:
        hook.remove()
    rows, encoder = [], model.config.num_layers
    for i, chosen in enumerate(seen):
        stack, layer = ("encoder", i) if i < encoder else ("decoder", i - encoder)
        kept = batch[stack == "decoder"] != 0
        percent = 100 * chosen[kept].double().mean(0)
        cells = " | ".join(f"{value:.1f}" for value in percent.tolist())
        rows.append(f"| {stack} {layer} | {cells} |")
    return rows


@torch.no_grad()
def loss(model: Switch, batch: Batch) -> float:
    """Nats per token of the answers, their end included."""
    logits = logits_of(model, batch).float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, batch[1].flatten(), ignore_index=0).item()


def last(log: Path) -> list[str]:
    """The last measurements of a training log."""
    lines = log.read_text("utf-8").splitlines()
    return [line for line in lines if line.startswith("step")][-2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    model = moescope.load("tiny-switch")
    test = questions.read(options.sources / "banking77" / "test.csv")
    pairs = encoded(test, model.tokenizer)
    batch = padded([question for question, _ in pairs]), padded([answer for _, answer in pairs])
    ours = np.array(right(model.model, pairs))
    pretrained, finetuned = (
        last(options.work / "switch" / f"{name}.log") for name in ("pretrain", "finetune")
    )
    tables = {
        "PARAMETERS": [f"{model.model.num_parameters():,}"],
        "ACCURACY": accuracy_rows(ours, baseline.right(options.sources)),
        "LOSS": [f"{loss(model.model, batch):.3f}"],
        "ROUTING": routing_rows(model.model, batch),
        "LOGS": ["```", *pretrained, *finetuned, "```"],
    }
    card = (HERE / "card.md").read_text(encoding="utf-8")
    for name, rows in tables.items():
        card = card.replace(f"@{name}@", "\n".join(rows))
    CARD.write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
