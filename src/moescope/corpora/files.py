"""Local files as documents, read line by line or in pieces: never a whole file at once."""

import codecs
import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Literal

from moescope.corpora.documents import Document, TextFile
from moescope.corpora.fields import content_of, name_of
from moescope.errors import CorpusError

LONGEST_LINE = 1 << 26
"""Bytes (64 MiB) that one line, paragraph or table field may have; it has to be in memory."""
_READ_BYTES = 1 << 16
_LINE_REMEDY = "A whole file can be one document of any size: name the file without ':'"


@dataclass(frozen=True)
class TextSource:
    """Plain text: a document per file, per line, or per block between blank lines."""

    spec: str
    """The source as the user wrote it."""
    files: tuple[tuple[str, Path], ...]
    """Name and path of every file."""
    unit: Literal["file", "lines", "paragraphs"]
    """What one document is."""

    def identity(self) -> dict[str, str]:
        """SHA-256 of names and contents."""
        return {"sha256": files_sha256(self.files)}

    def documents(self) -> Iterator[Document]:
        """Stream the documents in file order."""
        for name, path in self.files:
            match self.unit:
                case "file":
                    yield Document(name, TextFile(path))
                case "lines":
                    for number, line in _lines(path, self.spec):
                        yield Document(f"{name}:{number}", line.rstrip("\r\n"))
                case "paragraphs":
                    for number, block in _paragraphs(path, self.spec):
                        yield Document(f"{name}:{number}", block)


@dataclass(frozen=True)
class JsonLinesSource:
    """A JSON object per line; one field is the text, or a list of chat messages."""

    spec: str
    """The source as the user wrote it."""
    path: Path
    """The file."""
    field: str
    """Name of the field."""

    def identity(self) -> dict[str, str]:
        """SHA-256 of name and content."""
        return {"sha256": files_sha256([(self.path.name, self.path)])}

    def documents(self) -> Iterator[Document]:
        """Stream the documents in file order."""
        for number, line in _lines(self.path, self.spec):
            if not line.strip():
                continue
            where = f"{self.path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CorpusError(f"{where} is not JSON", got=error) from error
            if not isinstance(row, dict):
                raise CorpusError(
                    f"{where} is not a JSON object", got=type(row).__name__, expected='{"...": ...}'
                )
            content = content_of(row, self.field, where)
            yield Document(name_of(row, f"{self.path.name}:{number}"), content)


@dataclass(frozen=True)
class TableSource:
    """A CSV (quoted fields) or TSV (no quoting) file with a header; one column is the text."""

    spec: str
    """The source as the user wrote it."""
    path: Path
    """The file."""
    column: str
    """Name of the column."""

    def identity(self) -> dict[str, str]:
        """SHA-256 of name and content."""
        return {"sha256": files_sha256([(self.path.name, self.path)])}

    def documents(self) -> Iterator[Document]:
        """Stream the documents in file order."""
        csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
        lines = (line for _, line in _lines(self.path, self.spec))
        if self.path.suffix == ".tsv":
            reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            reader = csv.reader(lines, strict=True)
        try:
            header: list[str] = next(reader, [])
            self._require_once(header)
            for cells in reader:
                if cells:
                    yield self._document(header, cells, reader.line_num)
        except csv.Error as error:
            raise CorpusError(
                f"{self.path}, line {reader.line_num} is not a row of a table",
                got=error,
                remedy="Check the quotes from this line upwards",
            ) from error

    def _require_once(self, header: list[str]) -> None:
        if header.count(self.column) > 1:
            raise CorpusError(
                f"{self.path} has several columns of one name",
                got=f"{header.count(self.column)} columns {self.column!r}",
                remedy="Rename all but the one that holds the text",
            )

    def _document(self, header: list[str], cells: list[str], line: int) -> Document:
        where = f"{self.path}, line {line}"
        if len(cells) != len(header):
            raise CorpusError(
                f"{where} has another number of columns", got=len(cells), expected=len(header)
            )
        row = dict(zip(header, cells, strict=True))
        content = content_of(row, self.column, where)
        return Document(name_of(row, f"{self.path.name}:{line}"), content)


def files_sha256(files: Iterable[tuple[str, Path]]) -> str:
    """SHA-256 of the listing that `sha256sum` makes of named files; reads them in pieces.

    Raises:
        CorpusError: A file cannot be read.
    """
    listing = hashlib.sha256()
    for name, path in files:
        with _opened(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        listing.update(f"{digest}  {name}\n".encode())
    return listing.hexdigest()


def read_text(path: Path) -> Iterator[str]:
    """Stream a UTF-8 file as strings of about 64 thousand characters.

    Raises:
        CorpusError: The bytes are not UTF-8; the message says in which line.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")("strict")
    line = 1
    with _opened(path) as file:
        while True:
            data = file.read(_READ_BYTES)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise _undecodable(path, line, error) from error
            line += text.count("\n")
            yield text
            if not data:
                return


def _opened(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise CorpusError(f"cannot read {path}", got=error.strerror) from error


def _lines(path: Path, spec: str) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends."""
    with _opened(path) as file:
        number = 0
        while data := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(data) > LONGEST_LINE:
                raise _too_long(path, number, spec)
            try:
                line = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _undecodable(path, number, error) from error
            yield number, line


def _paragraphs(path: Path, spec: str) -> Iterator[tuple[int, str]]:
    """Blocks between blank lines, numbered by their first line."""
    block, first, size = list[str](), 0, 0
    for number, line in _lines(path, spec):
        if line.strip():
            first = first if block else number
            block.append(line)
            size += len(line)
            if size > LONGEST_LINE:
                raise _too_long(path, first, spec)
        elif block:
            yield first, "".join(block).strip()
            block, size = [], 0
    if block:
        yield first, "".join(block).strip()


def _too_long(path: Path, line: int, spec: str) -> CorpusError:
    return CorpusError(
        f"{spec}: the document that begins in {path}, line {line} is too long to hold in memory",
        expected=f"at most {LONGEST_LINE} bytes",
        remedy=_LINE_REMEDY,
    )


def _undecodable(path: Path, line: int, error: UnicodeDecodeError) -> CorpusError:
    return CorpusError(
        f"{path}, line {line} is not UTF-8 text",
        got=f"byte 0x{error.object[error.start]:02x} ({error.reason})",
        remedy=f"Convert it first, for example with `iconv -f latin1 -t utf8 {path}`",
    )
