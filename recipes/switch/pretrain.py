"""Pre-train `tiny-switch`: fill in the spans that were cut out of text and questions.

    python recipes/switch/pretrain.py --sources DIR --work WORK

Needs `vocabulary.py` to have run. Two steps of three read questions (without answers), the third
rows of text. Stopped and started again, it continues from the last state that was kept.
"""

import argparse
import sys
from pathlib import Path

import questions
import torch
from learning import Batch, Plan, Switch, alike, losses, new_model, padded, train
from transformers import PreTrainedTokenizerFast
from vocabulary import SENTINELS

sys.path.insert(0, str(Path(__file__).parents[1] / "tiny"))
import documents

DOMAINS = ("code", "encyclopedia", "french", "maths")
PLAN = Plan(name="pretrained", steps=2_000, peak_rate=2e-3)
QUESTIONS, ROWS, LENGTH = 64, 4, 48  # questions of a batch; rows per domain and their tokens
CUT, SPAN = 0.2, 2  # share of the tokens that are cut out, and tokens of a span


def corrupted(
    tokens: list[int], sentinels: list[int], end: int, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """T5's span corruption (arXiv 1910.10683, sec. 3.1.4): what is left, and what was cut out.

    Spans of `SPAN` tokens start at random; those that meet are one. In both rows sentinels mark
    the places of the spans.
    """
    spans = min(max(1, round(len(tokens) * CUT / SPAN)), len(sentinels))
    starts = torch.randperm(max(1, len(tokens) - SPAN + 1), generator=generator)[:spans].tolist()
    cut = {start + i for start in starts for i in range(SPAN)}
    left: list[int] = []
    missing: list[int] = []
    marks = iter(sentinels)
    for i, token in enumerate(tokens):
        if i not in cut:
            left.append(token)
            continue
        if i - 1 not in cut:
            mark = next(marks)
            left.append(mark)
            missing.append(mark)
        missing.append(token)
    return [*left, end], [*missing, end]


class Spans:
    """Batches of text with spans cut out; the same for the same step."""

    def __init__(self, sources: Path, work: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        asked, self.dev = (
            tokenizer(part.question.tolist(), add_special_tokens=False)["input_ids"]
            for part in questions.training(sources)
        )
        self.asked = [row[:LENGTH] for row in asked]
        self.text = [domain(work, name, tokenizer) for name in DOMAINS]
        self.sentinels = tokenizer.convert_tokens_to_ids(SENTINELS)
        self.end = tokenizer.eos_token_id

    def __call__(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        if step % 3:
            lengths = [len(row) for row in self.asked]
            rows = [self.asked[i] for i in alike(lengths, QUESTIONS, generator)]
        else:
            rows = [
                text[start : start + LENGTH]
                for text in self.text
                for start in torch.randint(
                    len(text) - LENGTH, (ROWS,), generator=generator
                ).tolist()
            ]
        return self.batch(rows, generator)

    def batch(self, rows: list[list[int]], generator: torch.Generator) -> Batch:
        pairs = [corrupted(row, self.sentinels, self.end, generator) for row in rows]
        return padded([left for left, _ in pairs]), padded([cut for _, cut in pairs])

    def measured(self, model: Switch) -> str:
        """Loss in nats of a token that was cut out of the questions chosen on."""
        batch = self.batch(self.dev, torch.Generator().manual_seed(0))
        with torch.no_grad():
            loss, balance, _ = losses(model, batch, 0.0)
        return f"questions {loss:.4f} balance {balance:.3f}"


def domain(work: Path, name: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """All documents of a domain, one after the other, with the end mark between them."""
    texts = [text for _, text in documents.read(work / "train" / f"{name}.jsonl")]
    tokens = [token for row in tokenizer(texts)["input_ids"] for token in row]
    print(f"{name}: {len(tokens)} training tokens", flush=True)
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    work = options.work / "switch"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    spans = Spans(options.sources, options.work, tokenizer)
    average = train(PLAN, new_model(tokenizer), work, spans, spans.measured)
    average.save_pretrained(work / PLAN.name)


if __name__ == "__main__":
    main()
