import json
from hashlib import sha256
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from moescope.corpora import documents as documents_module
from moescope.corpora import files
from moescope.corpora.documents import Chat, Document, TextFile, TokenIds, shuffled
from moescope.corpora.sources import BUILTIN_DOMAINS, parse
from moescope.errors import CorpusError


def documents(spec):
    return [(document.name, document.content) for document in parse(str(spec)).documents()]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_text_file_is_one_document_and_is_not_read_yet(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\ntwo\n")
    assert documents(path) == [("a.txt", TextFile(path))]


def test_lines_and_paragraphs(tmp_path):
    path = write(tmp_path / "a.txt", "one\r\nstill one\n\n \ntwo\n")
    assert documents(f"{path}:lines") == [
        ("a.txt:1", "one"),
        ("a.txt:2", "still one"),
        ("a.txt:3", ""),
        ("a.txt:4", " "),
        ("a.txt:5", "two"),
    ]
    assert documents(f"{path}:paragraphs") == [("a.txt:1", "one\r\nstill one"), ("a.txt:5", "two")]


def test_a_glob_is_sorted_and_named_below_its_fixed_part(tmp_path):
    (tmp_path / "src" / "deep").mkdir(parents=True)
    b = write(tmp_path / "src" / "b.py", "b")
    a = write(tmp_path / "src" / "deep" / "a.py", "a")
    assert documents(f"text:{tmp_path}/src/**/*.py") == [
        ("b.py", TextFile(b)),
        ("deep/a.py", TextFile(a)),
    ]
    write(tmp_path / "src" / "c.txt", "c")
    assert [name for name, _ in documents(f"{tmp_path}/src/*.txt")] == ["c.txt"]


def test_json_lines_with_ids_chat_null_and_blank_lines(tmp_path):
    chat = [{"role": "user", "content": "hello"}]
    rows = [{"id": 7, "text": "one"}, {"text": None}, {"id": "x", "text": chat}]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows[:2]) + "\n\n")
    with path.open("a") as file:
        file.write(json.dumps(rows[2]))
    assert documents(f"{path}:text") == [("7", "one"), ("a.jsonl:2", ""), ("x", Chat(chat))]


def test_csv_has_quoted_line_ends_and_tsv_has_no_quotes(tmp_path):
    path = write(tmp_path / "a.csv", '\ufeffid,body\n1,"two\nlines, ""quoted"""\n\n2,plain\n')
    assert documents(f"{path}:body") == [("1", 'two\nlines, "quoted"'), ("2", "plain")]
    path = write(tmp_path / "a.tsv", 'body\tlabel\n"open quote\t1\nnext\t0\n')
    assert documents(f"{path}:body") == [("a.tsv:2", '"open quote'), ("a.tsv:3", "next")]


def test_a_long_csv_field_is_read(tmp_path):
    path = write(tmp_path / "a.csv", "body\n" + "x" * 300_000 + "\n")
    assert len(documents(f"{path}:body")[0][1]) == 300_000


def test_hub_data_sets_stream_from_a_local_folder(tmp_path):
    rows = [{"id": f"q{n}", "question": f"question {n}"} for n in range(3)]
    write(tmp_path / "train.jsonl", "\n".join(map(json.dumps, rows)))
    assert documents(f"hf:{tmp_path}::train:question") == [
        (f"q{n}", f"question {n}") for n in range(3)
    ]
    with pytest.raises(CorpusError, match=r"row 0: 'questoin'.*Did you mean 'question'"):
        documents(f"hf:{tmp_path}::train:questoin")
    with pytest.raises(CorpusError, match="cannot be read"):
        documents(f"hf:{tmp_path}::test:question")


def test_the_identity_is_the_listing_of_sha256sum(tmp_path):
    a, b = write(tmp_path / "a.txt", "one"), write(tmp_path / "b.txt", "two" * 100_000)

    def listed(*paths):
        lines = [f"{sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths]
        return {"sha256": sha256("".join(lines).encode()).hexdigest()}

    for unit in ("", ":lines", ":paragraphs"):
        assert parse(f"{a}{unit}").identity() == listed(a)
    assert parse(f"{tmp_path}/*.txt").identity() == listed(a, b)
    assert parse(f"hf:{tmp_path}::train:text").identity() == listed(a, b)
    for name, column in (("a.jsonl", "text"), ("a.csv", "body"), ("a.tsv", "body")):
        path = write(tmp_path / name, "x")
        assert parse(f"{path}:{column}").identity() == listed(path)
    source = parse(str(a))
    before = source.identity()
    write(a, "One")
    assert source.identity() != before
    a.unlink()
    with pytest.raises(CorpusError, match="cannot read"):
        source.identity()


def test_a_hub_data_set_is_known_by_its_commit_if_the_hub_answers(monkeypatch):
    source = parse("hf:openai/gsm8k:main:train:question")
    answer = SimpleNamespace(sha="abc")
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: answer)
    assert source.identity() == {"revision": "abc"}

    def silent(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(HfApi, "dataset_info", silent)
    assert source.identity() == {}


def test_a_hub_source_names_id_config_split_and_column():
    source = parse("hf:openai/gsm8k:main:train:question")
    assert (source.dataset, source.config) == ("openai/gsm8k", "main")
    assert (source.split, source.column) == ("train", "question")


@pytest.mark.parametrize("domain", BUILTIN_DOMAINS)
def test_the_builtin_corpus_has_thirty_documents_per_domain(domain):
    found = documents(f"builtin:{domain}")
    assert len(found) >= 30
    assert len({name for name, _ in found}) == len(found)
    assert all(0 < len(text) <= 5_000 for _, text in found)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a.parquet:text", "cannot tell what 'a.parquet:text' is"),
        ("plain", "cannot tell what 'plain' is"),
        ("there.txt:line", "part of a text file.*Did you mean 'lines'"),
        ("ther.txt", "there is no file ther.txt. Did you mean there.txt"),
        ("*.txt2:", "cannot tell"),
        ("none-*.txt", "matches no file"),
        ("there.jsonl", "does not say which field.*there.jsonl:FIELD"),
        ("there.jsonl:", "does not say which field"),
        ("there.csv", "does not say which column"),
        ("hf:openai/gsm8k", "hf:ID:CONFIG:SPLIT:COLUMN"),
        ("hf:openai/gsm8k:main:train:", "hf:ID:CONFIG:SPLIT:COLUMN"),
        ("builtin:math", "Did you mean 'maths'"),
    ],
)
def test_a_wrong_source_is_refused_at_once(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    for name in ("there.txt", "there.jsonl", "there.csv"):
        write(tmp_path / name, "x")
    with pytest.raises(CorpusError, match=message):
        parse(spec)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl:text", '{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl:text", '["a"]', "line 1 is not a JSON object"),
        ("a.jsonl:text", '{"text": 5}', "line 1: 'text' holds no text. Got: int"),
        ("a.jsonl:text", '{"text": ["a"]}', "holds no text. Got: list"),
        ("a.jsonl:text", '{"txt": "a"}', "line 1: 'text'.*Did you mean 'txt'"),
        ("a.jsonl:text", b'{"text": "a"}\n\xff\n', "line 2 is not UTF-8.*0xff.*iconv"),
        ("a.csv:text", "body,txt\n1,2\n", "unknown field.*Did you mean 'txt'"),
        ("a.csv:b", "a,b\n1\n", "line 2 has another number of columns"),
        ("a.csv:a", 'a\n"x" y\n', "line 2 is not a row"),
        ("a.csv:a", "a,b,a\n1,2,3\n", "several columns of one name. Got: 2 columns 'a'"),
        ("a.txt:lines", b"good\nbad \xe9\n", "line 2 is not UTF-8"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, message):
    file, _, argument = name.partition(":")
    path = write(tmp_path / file, content)
    with pytest.raises(CorpusError, match=message) as caught:
        documents(f"{path}:{argument}")
    assert str(path) in str(caught.value)


def test_undecodable_bytes_in_a_streamed_file_are_found_by_line(tmp_path):
    lines = [b"line\n"] * 40_000
    lines[30_000] = b"caf\xe9 noir\n"
    path = write(tmp_path / "a.txt", b"".join(lines))
    with pytest.raises(CorpusError, match="line 30001 is not UTF-8"):
        list(files.read_text(path))
    path = write(tmp_path / "b.txt", b"ok\n\xc3")
    with pytest.raises(CorpusError, match="line 2 is not UTF-8"):
        list(files.read_text(path))


def test_characters_that_span_two_reads_survive(tmp_path):
    text = "x" + "é" * 100_000
    assert "".join(files.read_text(write(tmp_path / "a.txt", text))) == text


def test_a_line_that_does_not_fit_in_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 100)
    path = write(tmp_path / "a.txt", "short\n" + "x" * 200)
    with pytest.raises(CorpusError, match="line 2 is too long.*without ':'"):
        documents(f"{path}:lines")
    path = write(tmp_path / "b.txt", "x\n" * 99)
    with pytest.raises(CorpusError, match="line 1 is too long"):
        documents(f"{path}:paragraphs")


def many(number):
    return [Document(str(n), "text") for n in range(number)]


def test_shuffling_keeps_every_document_once_and_follows_its_key():
    names = [document.name for document in shuffled(many(50), buffer=10, key="0:a")]
    assert sorted(names, key=int) == [str(n) for n in range(50)]
    assert names != sorted(names, key=int)
    assert names == [document.name for document in shuffled(many(50), buffer=10, key="0:a")]
    assert names != [document.name for document in shuffled(many(50), buffer=10, key="1:a")]


def test_a_buffer_of_zero_keeps_the_order():
    names = [document.name for document in shuffled(many(9), buffer=0, key="0:a")]
    assert names == [str(n) for n in range(9)]


def test_the_shuffling_buffer_is_bounded_by_documents_and_by_characters(monkeypatch):
    taken = 0

    def counted(size):
        nonlocal taken
        for document in range(1_000):
            taken += 1
            yield Document(str(document), "x" * size)

    next(shuffled(counted(1), buffer=20, key=""))
    assert taken == 21
    monkeypatch.setattr(documents_module, "SHUFFLE_CHARACTERS", 500)
    taken = 0
    next(shuffled(counted(100), buffer=20, key=""))
    assert taken == 6


def test_documents_know_what_they_hold(tmp_path):
    chat = Chat([{"role": "user", "content": "four"}])
    assert Document("a", chat).characters == 4
    assert Document("a", TokenIds([1, 2])).characters == 2
    assert Document("a", TextFile(tmp_path)).characters == 0
