"""Rows of chosen documents, gathered again."""

from itertools import chain

import pytest
import torch

import moescope
from evaluate_zoo import small_corpus
from moescope.corpora.packing import Packing
from moescope.corpora.rows import rows_holding, rows_in_turn
from moescope.errors import CorpusError


def test_rows_that_hold_chosen_documents():
    corpus = small_corpus()
    chosen = torch.zeros(45, dtype=torch.bool)
    chosen[[3, 4, 20, 44]] = True
    wanted, context = set(), set()
    for batch in corpus.batches(None):
        for r in range(len(batch.input_ids)):
            kept = [
                (int(d), int(i))
                for d, i, k in zip(
                    batch.documents[r], batch.input_ids[r], batch.kept[r], strict=True
                )
                if k and d in (3, 4, 20, 44)
            ]
            if kept:
                wanted |= {(tuple(batch.input_ids[r].tolist()), tuple(kept))}
                context |= set(batch.documents[r].tolist())
    found, sizes = set(), []
    for batch in rows_holding(corpus.batches(None), chosen, 2):
        sizes.append(len(batch.input_ids))
        for r in range(len(batch.input_ids)):
            kept = zip(batch.documents[r], batch.input_ids[r], batch.kept[r], strict=True)
            pairs = tuple((int(d), int(i)) for d, i, k in kept if k)
            found |= {(tuple(batch.input_ids[r].tolist()), pairs)}
    assert found == wanted
    assert sum(sizes) == len(wanted)
    assert set(sizes[:-1]) <= {2}
    assert context > {3, 4, 20, 44}


def test_documents_take_turns():
    given = {"a": [[5] * 40, [6] * 8, [7] * 24]}
    corpus = moescope.Corpus.from_token_ids(given, Packing(length=8, rows=2, packed=False))
    chosen = torch.tensor([True, True, True])
    numbers = [
        batch.documents[:, 0].tolist()
        for batch in rows_in_turn(corpus.batches(None), chosen, 20, rows=2)
    ]
    assert sorted(chain.from_iterable(numbers)) == [0, 1, 2]
    every = rows_in_turn(corpus.batches(None), chosen, 10**9, rows=2)
    assert sum(len(batch.input_ids) for batch in every) == 9
    one = rows_in_turn(corpus.batches(None), torch.tensor([False, True, False]), 10**9, rows=2)
    assert [batch.input_ids.tolist() for batch in one] == [[[6] * 8]]


def test_domains_take_turns_too():
    given = {"long": [[5] * 80, [6] * 80], "short": [[7] * 8] * 30}
    corpus = moescope.Corpus.from_token_ids(given, Packing(length=8, rows=4, packed=False))
    chosen = torch.ones(32, dtype=torch.bool)
    found = rows_in_turn(corpus.batches(None), chosen, 7 * 12, rows=4)
    domains = torch.cat([batch.domains[:, 0] for batch in found])
    assert domains.bincount().tolist() == [6, 6]
    documents = torch.cat([batch.documents[:, 0] for batch in found])[domains == 0]
    assert documents.unique(return_counts=True)[1].tolist() == [3, 3]


def test_documents_that_are_not_there_are_refused():
    corpus = small_corpus()
    for find in (rows_holding, lambda b, d, r: rows_in_turn(b, d, 10, r)):
        with pytest.raises(CorpusError, match="no token of the chosen documents"):
            list(find(corpus.batches(None), torch.zeros(45, dtype=torch.bool), 2))
        with pytest.raises(CorpusError, match="more documents"):
            list(find(corpus.batches(None), torch.ones(10, dtype=torch.bool), 2))
