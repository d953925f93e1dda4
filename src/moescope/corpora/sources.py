"""What the user writes to name a source, and what it means.

a.txt                      plain text, one document per file; also dir/*.txt
a.txt:lines                one document per line
a.txt:paragraphs           one document per block between blank lines
text:src/**/*.py           plain text under any other name
a.jsonl:FIELD              JSON lines; the field holds text or {role, content} messages
a.csv:COLUMN  a.tsv:COLUMN tables with a header line
hf:ID:CONFIG:SPLIT:COLUMN  a data set of the Hub (or a local folder), CONFIG may be empty
builtin:NAME               a domain of the built-in corpus
"""

import glob
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol, runtime_checkable

from moescope.corpora.documents import Document
from moescope.corpora.files import JsonLinesSource, TableSource, TextSource
from moescope.corpora.hub import HubSource
from moescope.errors import CorpusError, unknown

BUILTIN_DOMAINS = ("encyclopedia", "maths", "code", "french")
"""Domains of the built-in corpus, in their order."""
_BUILTIN = Path(__file__).parent / "builtin"
_SYNTAX = (
    "a.txt, a.txt:lines, a.txt:paragraphs, text:GLOB, a.jsonl:FIELD, a.csv:COLUMN, "
    "a.tsv:COLUMN, hf:ID:CONFIG:SPLIT:COLUMN or builtin:NAME"
)


@runtime_checkable
class Source(Protocol):
    """Where the documents of a domain come from."""

    @property
    def spec(self) -> str:
        """The source as the user wrote it."""
        ...

    def identity(self) -> Mapping[str, str]:
        """What tells that the content is the same; for local files their SHA-256."""
        ...

    def documents(self) -> Iterator[Document]:
        """Stream the documents, always in the same order."""
        ...


def parse(spec: str) -> Source:
    """Read one source as written by the user.

    Raises:
        CorpusError: The syntax is unknown, or a file is missing.
    """
    prefix, _, rest = spec.partition(":")
    match prefix:
        case "hf":
            return _hub(spec, rest)
        case "builtin":
            return _builtin(spec, rest)
        case "text":
            return TextSource(spec, _files(spec, rest), "file")
    path, argument = _split(spec)
    match Path(path).suffix:
        case ".txt":
            return _text(spec, path, argument)
        case ".jsonl":
            name = _argument(spec, argument, "field")
            return JsonLinesSource(spec, _existing(spec, path), name)
        case ".csv" | ".tsv":
            name = _argument(spec, argument, "column")
            return TableSource(spec, _existing(spec, path), name)
    raise CorpusError(f"cannot tell what {spec!r} is", expected=_SYNTAX)


def _split(spec: str) -> tuple[str, str]:
    """Separate the path from what follows its last colon."""
    path, colon, argument = spec.rpartition(":")
    return (path, argument) if colon and Path(path).suffix else (spec, "")


def _argument(spec: str, argument: str, kind: str) -> str:
    if not argument:
        raise CorpusError(
            f"{spec} does not say which {kind} holds the text",
            remedy=f"Write {spec.rstrip(':')}:{kind.upper()}",
        )
    return argument


def _text(spec: str, path: str, unit: str) -> TextSource:
    match unit:
        case "":
            return TextSource(spec, _files(spec, path), "file")
        case "lines" | "paragraphs":
            return TextSource(spec, _files(spec, path), unit)
    raise unknown(f"part of a text file in {spec}:", unit, ("lines", "paragraphs"), CorpusError)


def _files(spec: str, pattern: str) -> tuple[tuple[str, Path], ...]:
    """Files of a name or glob, sorted, each named by its path below the fixed part."""
    if not glob.has_magic(pattern):
        path = _existing(spec, pattern)
        return ((path.name, path),)
    root = Path(re.split(r"[^/]*[*?\[]", pattern, maxsplit=1)[0])
    paths = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not paths:
        raise CorpusError(f"{spec} matches no file", remedy="Check the pattern and the folder")
    return tuple((path.relative_to(root).as_posix(), path) for path in paths)


def _existing(spec: str, name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, siblings, n=1)
    raise CorpusError(
        f"{spec}: there is no file {path}",
        got="a folder" if path.is_dir() else None,
        remedy=f"Did you mean {path.parent / near[0]}" if near else "Check the path",
    )


def _hub(spec: str, rest: str) -> HubSource:
    parts = rest.rsplit(":", 3)
    if len(parts) != 4 or not all((parts[0], parts[2], parts[3])):
        raise CorpusError(
            f"cannot read {spec!r}",
            expected="hf:ID:CONFIG:SPLIT:COLUMN (CONFIG may be empty), "
            "for example hf:openai/gsm8k:main:train:question",
        )
    dataset, config, split, column = parts
    return HubSource(spec, dataset, config or None, split, column)


def _builtin(spec: str, name: str) -> JsonLinesSource:
    if name not in BUILTIN_DOMAINS:
        raise unknown("domain of the built-in corpus:", name, BUILTIN_DOMAINS, CorpusError)
    return JsonLinesSource(spec, _BUILTIN / f"{name}.jsonl", "text")
