import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moescope.corpora import tokens
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Packing
from moescope.corpora.tokens import tokenizer_sha256
from moescope.errors import CorpusError, OptionError

BOS, EOS, PAD = 256, 257, 258


def byte_tokenizer(*, begins=False, **options):
    """One token per byte, so that every expected token can be written down."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: n for n, character in enumerate(alphabet)}
    vocabulary |= {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if begins:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", **options
    )


def batches(corpus, tokenizer=None, **options):
    return list(corpus.batches(tokenizer, **options))


def rows_of(found):
    """Token lists without padding, one per row."""
    return [
        ids[mask.bool()].tolist()
        for batch in found
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


def stream(found, domain):
    """(document, token) pairs of a domain, in order."""
    return [
        (int(number), int(token))
        for batch in found
        for ids, numbers, domains in zip(
            batch.input_ids, batch.documents, batch.domains, strict=True
        )
        for token, number, at in zip(ids, numbers, domains, strict=True)
        if at == domain
    ]


DOCUMENTS = st.lists(st.lists(st.integers(0, 99), max_size=12), max_size=8).filter(
    lambda documents: any(documents)
)


@settings(max_examples=60, deadline=None)
@given(
    given_documents=st.lists(DOCUMENTS, min_size=1, max_size=3),
    length=st.integers(2, 9),
    rows=st.integers(1, 4),
    packed=st.booleans(),
    skip_first=st.booleans(),
)
def test_packing_loses_nothing_and_masks_rightly(given_documents, length, rows, packed, skip_first):
    packing = Packing(length=length, rows=rows, packed=packed, skip_first=skip_first, shuffle=0)
    corpus = Corpus.from_token_ids(dict(zip("abc", given_documents, strict=False)), packing)
    found = batches(corpus)

    for domain, documents in enumerate(given_documents):
        pairs = stream(found, domain)
        assert [token for _, token in pairs] == [token for ids in documents for token in ids]
        numbers = list(dict.fromkeys(number for number, _ in pairs))
        assert numbers == sorted(numbers)
        kept = [ids for ids in documents if ids]
        for number, ids in zip(numbers, kept, strict=True):
            assert [token for n, token in pairs if n == number] == ids

    assert [batch.first_row for batch in found] == list(range(0, len(found) * rows, rows))
    assert all(len(batch.input_ids) == rows for batch in found[:-1])
    for batch in found:
        real = batch.attention_mask.bool()
        assert torch.equal(real, batch.documents >= 0)
        assert torch.equal(real, batch.domains >= 0)
        assert torch.equal(batch.attention_mask.cummin(1).values, batch.attention_mask)
        expected = real.clone()
        if skip_first:
            expected[:, 0] = False
        assert torch.equal(batch.kept, expected)
        for domains, numbers, mask in zip(batch.domains, batch.documents, real, strict=True):
            assert len(domains[mask].unique()) == 1
            assert packed or len(numbers[mask].unique()) == 1

    names = {number: name for batch in found for number, name in batch.document_names.items()}
    assert list(names) == list(range(len(names)))
    assert set(names) == {int(n) for b in found for n in b.documents.unique()} - {-1}


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4), length=st.integers(2, 5))
def test_any_beginning_is_balanced_until_the_shortest_domain_ends(sizes, length):
    given_documents = {str(n): [[n] * size] for n, size in enumerate(sizes)}
    corpus = Corpus.from_token_ids(given_documents, Packing(length=length, rows=1))
    order = [int(batch.domains[0, 0]) for batch in batches(corpus)]
    shortest = min(-(-size // length) for size in sizes)
    balanced = order[: shortest * len(sizes)]
    assert balanced == list(range(len(sizes))) * shortest
    assert len(order) == sum(-(-size // length) for size in sizes)


def text_corpus(tmp_path, texts, **packing):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return Corpus.from_sources({"a": f"{path}:text"}, Packing(shuffle=0, **packing))


def test_documents_are_joined_by_the_end_token_which_belongs_to_the_first(tmp_path):
    corpus = text_corpus(tmp_path, ["ab", "", "cde"], length=4, rows=2)
    (batch,) = batches(corpus, byte_tokenizer())
    a, b, c, d, e = byte_tokenizer()("abcde")["input_ids"]
    assert batch.input_ids.tolist() == [[a, b, EOS, c], [d, e, PAD, PAD]]
    assert batch.documents.tolist() == [[0, 0, 0, 1], [1, 1, -1, -1]]
    assert batch.document_names == {0: "a.jsonl:1", 1: "a.jsonl:3"}


def test_unpacked_documents_begin_a_row_and_go_on_in_the_next(tmp_path):
    corpus = text_corpus(tmp_path, ["ab", "cdefg"], length=4, rows=3, packed=False)
    (batch,) = batches(corpus, byte_tokenizer())
    assert batch.attention_mask.sum(1).tolist() == [2, 4, 1]
    assert EOS not in batch.input_ids


def test_rows_begin_as_the_tokenizer_begins_a_text(tmp_path):
    corpus = text_corpus(tmp_path, ["abcd"], length=3)
    assert [row[0] for row in rows_of(batches(corpus, byte_tokenizer(begins=True)))] == [BOS, BOS]
    assert BOS not in rows_of(batches(corpus, byte_tokenizer()))[0]
    given_ids = Corpus.from_token_ids({"a": [[BOS, 5, 6]]}, Packing(length=4))
    assert rows_of(batches(given_ids, byte_tokenizer(begins=True))) == [[BOS, 5, 6]]


def test_conversations_go_through_the_chat_template(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    corpus = text_corpus(tmp_path, [chat])
    tokenizer = byte_tokenizer(chat_template=template)
    assert tokenizer.decode(rows_of(batches(corpus, tokenizer))[0]) == "u:hi;a:yo;"
    with pytest.raises(CorpusError, match="has no chat template"):
        batches(corpus, byte_tokenizer())
    refusing = byte_tokenizer(chat_template="{{ raise_exception('no such role') }}")
    with pytest.raises(CorpusError, match="refuses document 'a.jsonl:1'.*no such role"):
        batches(corpus, refusing)


def test_a_long_document_is_tokenised_in_pieces_cut_before_spaces(tmp_path, monkeypatch):
    text = "some words " * 3_000 + "x" * 5_000
    path = tmp_path / "a.txt"
    path.write_text(text)
    longest = 0

    class Watched(PreTrainedTokenizerFast):
        def __call__(self, piece, **options):
            nonlocal longest
            longest = max(longest, len(piece))
            return super().__call__(piece, **options)

    monkeypatch.setattr(tokens, "PIECE_CHARACTERS", 1_000)
    tokenizer = byte_tokenizer()
    tokenizer.__class__ = Watched
    found = batches(Corpus.from_sources({"a": str(path)}, Packing(length=64)), tokenizer)
    assert tokenizer.decode([token for row in rows_of(found) for token in row]) == text
    assert longest <= 1_000
    pieces = list(tokens._cut([text]))
    assert all(piece[0] == " " for piece in pieces[1:30])


def test_a_huge_file_is_not_read_to_give_its_first_batch(tmp_path):
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.write(b"word " * 100_000)
        file.truncate(10 << 30)  # a sparse file of 10 GiB
    corpus = Corpus.from_sources({"a": str(path)}, Packing(length=16, rows=2))
    assert next(corpus.batches(byte_tokenizer())).input_ids.shape == (2, 16)


def test_the_same_seed_gives_the_same_batches_and_another_seed_others():
    def first_ids(seed):
        corpus = Corpus.builtin(Packing(max_tokens=3_000, seed=seed))
        return torch.cat([batch.input_ids for batch in corpus.batches(byte_tokenizer())])

    assert torch.equal(first_ids(0), first_ids(0))
    assert not torch.equal(first_ids(0), first_ids(1))


@pytest.mark.parametrize("start", [0, 1, 3, 4, 7])
def test_starting_at_a_row_gives_what_a_full_reading_gives_there(start):
    corpus = Corpus.builtin(Packing(max_tokens=2_000, rows=3))
    whole, rest = (batches(corpus, byte_tokenizer(), start_row=row) for row in (0, start))
    for name in ("input_ids", "documents", "domains", "kept"):
        full, part = (torch.cat([getattr(batch, name) for batch in b]) for b in (whole, rest))
        assert torch.equal(full[start:], part)
    assert rest[0].first_row == start


def test_max_tokens_ends_after_the_row_that_reaches_it():
    corpus = Corpus.from_token_ids({"a": [[1] * 100]}, Packing(length=8, rows=4, max_tokens=41))
    assert sum(len(row) for row in rows_of(batches(corpus))) == 48


def test_the_first_domains_of_the_builtin_corpus_are_balanced():
    corpus = Corpus.builtin(Packing(max_tokens=8 * 256))
    domains = torch.cat([batch.domains[:, 0] for batch in corpus.batches(byte_tokenizer())])
    assert corpus.domains == ["encyclopedia", "maths", "code", "french"]
    assert domains.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_an_empty_domain_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("")
    corpus = Corpus.from_sources({"full": "builtin:maths", "empty": str(path)})
    with pytest.raises(CorpusError, match="domain 'empty' is empty"):
        batches(corpus, byte_tokenizer())
    with pytest.raises(CorpusError, match="at least one domain"):
        Corpus.from_sources({})
    with pytest.raises(CorpusError, match="no domain may be called 'all'"):
        Corpus.from_sources({"all": "builtin:maths"})


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(CorpusError, match="without a tokenizer.*from_token_ids"):
        batches(Corpus.builtin())


@pytest.mark.parametrize("options", [{"length": 1}, {"rows": 0}, {"max_tokens": 0}])
def test_impossible_packing_is_refused(options):
    with pytest.raises(OptionError, match=f"{next(iter(options))} is too small"):
        Packing(**options)


def test_a_corpus_describes_itself_in_json():
    corpus = Corpus.from_token_ids({"a": [[1, 2]]})
    assert json.loads(json.dumps(corpus.description)) == corpus.description
    assert corpus.description != Corpus.from_token_ids({"a": [[1, 3]]}).description
    builtin = Corpus.builtin().description["sources"]["maths"]
    assert builtin["source"] == "builtin:maths"
    assert len(builtin["sha256"]) == 64
    assert "builtin:maths" in repr(Corpus.builtin())


def test_the_tokenizer_hash_follows_what_it_does_not_what_it_did():
    plain = tokenizer_sha256(byte_tokenizer())
    used = byte_tokenizer()
    used(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_sha256(used) == plain
    assert tokenizer_sha256(byte_tokenizer(begins=True)) != plain
    assert tokenizer_sha256(byte_tokenizer(chat_template="x")) != plain
    assert tokenizer_sha256(None) is None


def test_kept_padding_belongs_to_the_document_of_its_row():
    given_documents = {"a": [[5] * 6, [6] * 2], "b": [[7] * 4]}
    options = {"length": 4, "packed": False, "shuffle": 0, "rows": 8}
    kept = batches(Corpus.from_token_ids(given_documents, Packing(keep_padding=True, **options)))[0]
    masked = batches(Corpus.from_token_ids(given_documents, Packing(**options)))[0]
    rows = [[5, 5, 5, 5], [7, 7, 7, 7], [5, 5, 0, 0], [6, 6, 0, 0]]
    assert kept.input_ids.tolist() == masked.input_ids.tolist() == rows
    assert torch.equal(kept.attention_mask, masked.attention_mask)
    assert kept.attention_mask.tolist()[2:] == [[1, 1, 0, 0]] * 2
    assert kept.documents.tolist() == [[0] * 4, [1] * 4, [0] * 4, [2] * 4]
    assert kept.domains.tolist() == [[0] * 4, [1] * 4, [0] * 4, [0] * 4]
    assert kept.kept.tolist() == [[False, True, True, True]] * 4
    assert masked.documents.tolist()[2:] == [[0, 0, -1, -1], [2, 2, -1, -1]]


def test_the_same_text_is_read_whether_padding_is_kept():
    given_documents = {"a": [[n] * (n % 5 + 1) for n in range(30)]}
    ids = [
        rows_of(batches(Corpus.from_token_ids(given_documents, Packing(length=4, **options))))
        for options in (
            {"packed": False, "max_tokens": 40},
            {"packed": False, "max_tokens": 40, "keep_padding": True},
        )
    ]
    assert ids[0] == ids[1]
    assert 40 <= sum(map(len, ids[0])) < 44


def test_joined_rows_have_no_padding_to_keep():
    with pytest.raises(OptionError, match="Set packed to false"):
        Packing(keep_padding=True)
