"""Fine-tune `tiny-switch` on BANKING77: the question in, the name of its intent out.

    python recipes/switch/finetune.py --sources DIR --work WORK

Needs `pretrain.py` to have run. Keeps the averaged weights that answer best the questions set apart
for choosing, in bf16, in `WORK/switch/best/`. Stopped and started again, it continues from the last
state that was kept, and chooses among what follows.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
import pretrain
import questions
import torch
from learning import Batch, Plan, Switch, alike, logits_of, padded, train
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "relatives"))
from training import save

PLAN = Plan(name="finetuned", steps=4_000, peak_rate=1e-3, smoothing=0.1, dropout=0.1)
QUESTIONS = 64  # of a batch
LONGEST = 48  # tokens of a question that are trained on: one of seventy is longer
LOST = 0.1  # share of a question's tokens that training leaves out
EVALUATED = 128  # questions of a batch


class Answers:
    """Batches of questions and answers; the same for the same step."""

    def __init__(self, sources: Path, work: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        parts = questions.training(sources)
        self.asked, self.dev = (encoded(part, tokenizer) for part in parts)
        self.lengths = [len(question) for question, _ in self.asked]
        self.tokenizer, self.work, self.best = tokenizer, work, 0.0

    def __call__(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        chosen = [self.asked[i] for i in alike(self.lengths, QUESTIONS, generator)]
        thinned = [thin(question, generator) for question, _ in chosen]
        return padded(thinned), padded([answer for _, answer in chosen])

    def measured(self, model: Switch) -> str:
        """Share of the questions chosen on that are answered exactly; keeps the best weights."""
        share = torch.tensor(right(model, self.dev)).float().mean().item()
        if share > self.best:
            self.best = share
            save(model, self.tokenizer, self.work / "best")
        return f"dev accuracy {share:.4f} (best {self.best:.4f})"


def encoded(
    part: pd.DataFrame, tokenizer: PreTrainedTokenizerFast
) -> list[tuple[list[int], list[int]]]:
    asked = tokenizer(part.question.tolist())["input_ids"]
    return list(zip(asked, tokenizer(part.answer.tolist())["input_ids"], strict=True))


def thin(question: list[int], generator: torch.Generator) -> list[int]:
    """The beginning of a question without some of its tokens, the end mark kept."""
    *words, end = question
    kept = (torch.rand(len(words), generator=generator) >= LOST).tolist()
    return [word for word, keep in zip(words[:LONGEST], kept, strict=False) if keep] + [end]


@torch.no_grad()
def right(model: Switch, pairs: list[tuple[list[int], list[int]]]) -> list[bool]:
    """Whether greedy decoding gives the answer, for each pair.

    It does where every token of the answer, its end included, is the likeliest after the
    tokens before it, so one forward pass decides.
    """
    found: dict[int, bool] = {}
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    for start in range(0, len(order), EVALUATED):
        rows = order[start : start + EVALUATED]
        batch = padded([pairs[i][0] for i in rows]), padded([pairs[i][1] for i in rows])
        same = (logits_of(model, batch).argmax(-1) == batch[1]) | (batch[1] == 0)
        found |= dict(zip(rows, same.all(1).tolist(), strict=True))
    return [found[i] for i in range(len(pairs))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    work = options.work / "switch"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    answers = Answers(options.sources, work, tokenizer)
    model = Switch.from_pretrained(
        work / pretrain.PLAN.name, dropout_rate=PLAN.dropout, dtype=torch.float32
    )
    train(PLAN, model, work, answers, answers.measured)


if __name__ == "__main__":
    main()
