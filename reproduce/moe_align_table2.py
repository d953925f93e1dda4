"""Fine-tune google/switch-base-8 on MNLI as text to text, for moe_align_table2.yaml.

    python reproduce/moe_align_table2.py

Reads model and data from the Hub; writes `switch-base-8-mnli/` and `mnli.csv`, the matched part of
the validation data. Three epochs, as in the study; learning rate and batch size are ours, as the
study does not say them. Not run here: it needs the network and a GPU. The tests run `fine_tune` on
a shrunken model.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
import torch
from datasets import load_dataset

import moescope
from moescope.corpora.questions import Questions
from moescope.evaluate.answers import decoder_start
from moescope.models.view import MoEModel

EPOCHS, ROWS, LEARNING_RATE = 3, 32, 1e-4
LABELS = ("entailment", "neutral", "contradiction")


def asked(rows: Iterable[Mapping[str, str | int]]) -> pd.DataFrame:
    """Questions and answers as T5 was given them (Raffel et al. 2020, appendix D.4)."""
    return pd.DataFrame(
        {
            "question": f"mnli hypothesis: {row['hypothesis']} premise: {row['premise']}",
            "answer": LABELS[int(row["label"])],
        }
        for row in rows
    )


def fine_tune(model: MoEModel, train: pd.DataFrame, *, epochs: int, rate: float) -> None:
    """AdamW on the loss of the answers, in an order drawn anew for each epoch."""
    network = model.model.train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate)
    for epoch in range(epochs):
        shuffled = train.sample(frac=1, random_state=epoch)
        pairs = list(zip(shuffled["question"], shuffled["answer"], strict=True))
        for batch in Questions(pairs, {}).batches(
            model.tokenizer, decoder_start=decoder_start(model), rows=ROWS
        ):
            loss = network(
                input_ids=batch.input_ids.to(model.device),
                attention_mask=batch.attention_mask.to(model.device),
                labels=batch.targets.to(model.device),
            ).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
    network.eval()


def main() -> None:
    """Three epochs of the published model."""
    data = load_dataset("nyu-mll/glue", "mnli")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = moescope.load("google/switch-base-8", dtype="float32", device_map=device)
    fine_tune(model, asked(data["train"]), epochs=EPOCHS, rate=LEARNING_RATE)
    out = Path("switch-base-8-mnli")
    model.model.save_pretrained(out)
    assert model.tokenizer is not None
    model.tokenizer.save_pretrained(out)
    asked(data["validation_matched"]).to_csv("mnli.csv", index=False)


if __name__ == "__main__":
    main()
