import json

import pytest
import tokenizers
import torch
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import moescope
from moescope.corpora.questions import NO_TARGET, Questions
from moescope.errors import CorpusError

PAIRS = [("How warm is it?", "very warm"), ('Is "it" far, or near?', "near"), ("Où ?", "là-bas")]


@pytest.fixture(scope="module")
def tokenizer():
    return moescope.load("tiny").tokenizer


def written(path):
    match path.suffix:
        case ".csv":
            lines = ["id,text,label"] + [
                '{},"{}","{}"'.format(n, *(part.replace('"', '""') for part in pair))
                for n, pair in enumerate(PAIRS)
            ]
        case ".tsv":
            lines = ["text\tlabel"] + ["\t".join(pair) for pair in PAIRS]
        case ".jsonl":
            lines = [json.dumps({"label": answer, "text": text}) for text, answer in PAIRS]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return f"{path}:text:label"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "tsv"])
def test_a_table_of_any_kind_gives_its_questions_and_answers(kind, tmp_path):
    spec = written(tmp_path / f"data.{kind}")
    questions = Questions.from_source(spec)
    assert sorted(questions.pairs) == sorted(PAIRS)
    assert questions.pairs == Questions.from_source(spec).pairs
    assert len(Questions.from_source(spec, most=2)) == 2
    assert questions.identity["source"] == spec
    orders = {tuple(Questions.from_source(spec, seed=seed).pairs) for seed in range(8)}
    assert len(orders) > 1


def test_the_packaged_questions_are_the_test_part_of_banking77():
    questions = Questions.from_source("banking77")
    assert len(questions) == 3_080
    answers = [answer for _, answer in questions.pairs]
    assert len(set(answers)) == 77
    assert len(set(answers[:77])) > 40  # the file is sorted by answer, the questions are not


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data.csv:text", "cannot read the questions"),
        ("banking", "cannot read the questions"),
        ("data.csv:text:anser", "label"),
        ("none.csv:text:label", "there is no file"),
        ("data.txt:lines:paragraphs", "has no columns"),
    ],
)
def test_what_is_no_source_of_questions_is_refused(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "data.csv")
    (tmp_path / "data.txt").write_text("a\n", "utf-8")
    with pytest.raises(CorpusError, match=message):
        Questions.from_source(spec)


def test_a_model_without_a_decoder_of_its_own_reads_question_and_answer(tokenizer):
    questions = Questions(PAIRS, {})
    first, second = questions.batches(tokenizer, decoder_start=None, rows=2)
    assert (first.first, second.first) == (0, 2)
    assert first.decoder_input_ids is None
    for batch, pairs in ((first, PAIRS[:2]), (second, PAIRS[2:])):
        for row, (question, answer) in enumerate(pairs):
            kept = batch.attention_mask[row].bool()
            ids = batch.input_ids[row][kept].tolist()
            assert tokenizer.decode(ids) == f"{question} {answer}"
            places = (batch.targets[row] != NO_TARGET).nonzero()[:, 0]
            targets = batch.targets[row][places]
            assert tokenizer.decode(targets) == f" {answer}"
            assert batch.input_ids[row][places + 1].tolist() == targets.tolist()
            assert int(places[-1]) == len(ids) - 2


def test_a_decoder_of_its_own_is_given_the_answer_one_token_later(tokenizer):
    (batch,) = Questions(PAIRS, {}).batches(tokenizer, decoder_start=5)
    for row, (question, answer) in enumerate(PAIRS):
        ids = batch.input_ids[row][batch.attention_mask[row].bool()]
        assert tokenizer.decode(ids) == question
        targets = batch.targets[row][batch.targets[row] != NO_TARGET].tolist()
        assert tokenizer.decode(targets) == answer
        assert batch.decoder_input_ids[row, : len(targets)].tolist() == [5, *targets[:-1]]


def test_padding_is_at_the_right_and_counts_nowhere():
    questions = Questions.from_token_ids([([7, 8, 9], [1, 2]), ([6], [3])])
    (batch,) = questions.batches(None, decoder_start=None)
    assert batch.input_ids.tolist() == [[7, 8, 9, 1, 2], [6, 3, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    n = NO_TARGET
    assert batch.targets.tolist() == [[n, n, 1, 2, n], [3, n, n, n, n]]
    (batch,) = questions.batches(None, decoder_start=4)
    assert batch.input_ids.tolist() == [[7, 8, 9], [6, 0, 0]]
    assert batch.decoder_input_ids.tolist() == [[4, 1], [4, 0]]
    assert torch.equal(batch.targets, torch.tensor([[1, 2], [3, n]]))


@pytest.fixture(scope="module")
def merging():
    """A tokenizer of letters that reads "? y" as one token, and ends whole texts."""
    names = ["<pad>", "</s>", *"abeswyhno? ", "? ", "? y"]
    numbers = {name: number for number, name in enumerate(names)}
    reader = tokenizers.Tokenizer(BPE(numbers, [("?", " "), ("? ", "y")]))
    reader.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=reader, pad_token="<pad>", eos_token="</s>")


def test_a_token_across_the_end_of_the_question_is_predicted(merging):
    questions = Questions([("a?", "yes"), ("b", "no")], {})
    (batch,) = questions.batches(merging, decoder_start=None)
    rows = [merging.convert_ids_to_tokens(row) for row in batch.input_ids.tolist()]
    assert rows == [["a", "? y", "e", "s"], ["b", " ", "n", "o"]]
    assert batch.targets[:, :-1].tolist() == batch.input_ids[:, 1:].tolist()
    assert batch.targets[:, -1].tolist() == [NO_TARGET] * 2


@pytest.mark.parametrize("pair", [("why?", ""), ("why?", "  "), ("", "so")])
@pytest.mark.parametrize("start", [None, 1])
def test_a_space_or_an_end_token_is_no_answer(pair, start, tokenizer, merging):
    for reads in (tokenizer, merging):
        with pytest.raises(CorpusError, match="holds no tokens"):
            list(Questions([pair], {}).batches(reads, decoder_start=start))


def test_nothing_to_ask_or_to_answer_is_refused(tokenizer):
    with pytest.raises(CorpusError, match="no questions"):
        Questions([], {})
    with pytest.raises(CorpusError, match="holds no tokens"):
        list(Questions([("why?", "")], {}).batches(tokenizer, decoder_start=1))
    with pytest.raises(CorpusError, match="without a tokenizer"):
        list(Questions(PAIRS, {}).batches(None, decoder_start=None))
