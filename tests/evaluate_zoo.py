"""A small model, a corpus of token ids with short documents, and changes of the model."""

from contextlib import contextmanager

import numpy as np
import torch

import moescope
from models_zoo import VOCABULARY
from moescope.corpora.packing import Packing

PACKING = Packing(length=12, rows=3)


def random_documents(number, seed):
    """Token ids without the special tokens of the zoo."""
    random = np.random.default_rng(seed)
    return [random.integers(3, VOCABULARY, random.integers(2, 30)).tolist() for _ in range(number)]


def small_corpus(packing=PACKING):
    documents = {"first": random_documents(40, 0), "second": random_documents(5, 1)}
    return moescope.Corpus.from_token_ids(documents, packing)


@contextmanager
def hooked(module, change):
    handle = module.register_forward_hook(lambda _, __, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def scaled_blocks(model, factor):
    """An intervention: the first sparse block's output times `factor`."""
    return lambda: hooked(model.layers[0].block, lambda output: output * factor)


def shifted(model, token, shift):
    """An intervention: one logit moved everywhere."""
    moved = torch.zeros(VOCABULARY)
    moved[token] = shift
    return lambda: hooked(model.model.lm_head, lambda logits: logits + moved)


def every_prediction(model, corpus):
    """(domain, document, target, log-probabilities) one by one, straight from the definition."""
    for batch in corpus.batches(model.tokenizer):
        for r, row in enumerate(batch.input_ids):
            length = int(batch.attention_mask[r].sum())
            logs = model.model(row[None, :length]).logits[0].double().log_softmax(-1)
            for p in range(length - 1):
                document = int(batch.documents[r, p])
                if batch.kept[r, p] and document == batch.documents[r, p + 1]:
                    yield int(batch.domains[r, p]), document, int(row[p + 1]), logs[p].detach()
