"""Train the byte-level BPE tokenizer of `tiny-switch` on what it is trained on, in small letters.

    python recipes/switch/vocabulary.py --sources DIR --work WORK

Needs the training documents of `tiny` in WORK.
"""

import argparse
import sys
from pathlib import Path

import questions
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "tiny"))
import documents

VOCABULARY = 3_072
SENTINELS = [f"<extra_id_{i}>" for i in range(16)]
CHARACTERS = 300_000  # of each of the four domains
REPEATED = 3  # the questions are 600,000 characters, and what matters
PAD, END = "<pad>", "</s>"


def train(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    # Small letters: ten thousand questions are too few to learn that `My` is `my`.
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, *SENTINELS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=SENTINELS,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    asked, _ = questions.training(options.sources)
    texts = [*asked.question, *asked.answer.unique()] * REPEATED
    for path in sorted((options.work / "train").glob("*.jsonl")):
        domain = (text for _, text in documents.read(path))
        texts.append("\n".join(domain)[:CHARACTERS])
    train(texts).save_pretrained(options.work / "switch" / "tokenizer")


if __name__ == "__main__":
    main()
