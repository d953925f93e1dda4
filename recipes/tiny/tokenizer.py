"""Train the byte-level BPE tokenizer of `tiny` on its training documents.

python recipes/tiny/tokenizer.py --work DIR
"""

import argparse
from pathlib import Path

import documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4_096
END, PAD = "<|endoftext|>", "<|pad|>"


def train(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    texts = []
    for path in sorted((work / "train").glob("*.jsonl")):
        domain = (text for _, text in documents.read(path))
        # An equal share per domain, or the larger ones would take most of the vocabulary.
        texts.append("\n".join(domain)[:600_000])
    train(texts).save_pretrained(work / "tokenizer")


if __name__ == "__main__":
    main()
