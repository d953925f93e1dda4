"""The run folder and what lies in it.

    RUN/
      capture/             what one forward pass recorded (docs/capture-format.md)
      results/NAME.parquet, NAME.TABLE.parquet, NAME.json
      figures/, tables/, report.html

Files are written under a temporary name, flushed to disk and renamed: a name that exists is
complete. `results/NAME.json` is written last, so a result without it does not exist.
"""

import errno
import hashlib
import html
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError

from moescope.errors import MoEScopeError

RESULT_SCHEMA = 1
_LIBRARIES = ("moescope", "torch", "transformers", "numpy", "scipy", "pandas")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file, flush it to disk, then give it its name.

    Raises:
        MoEScopeError: The disk is full; nothing is left behind under `path`.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        if not disk_is_full(error):
            raise
        raise MoEScopeError(
            f"the disk is full: {path} was not written",
            got=error,
            remedy="Free some space and run the same command again; finished parts are kept",
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def disk_is_full(error: OSError | SafetensorError) -> bool:
    """Whether that is why nothing was written; of a file of tensors only the words say so."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def to_json(value: object) -> str:
    """Sorted, indented JSON; NaN and infinity become null."""
    return json.dumps(plain(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, value: object) -> None:
    """Write what `to_json` gives, atomically."""
    write_text(path, to_json(value) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        MoEScopeError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoEScopeError(f"cannot read {path}", got=error) from error


def plain(value: object) -> object:
    """Reduce paths, numpy scalars, tuples and non-finite numbers to what JSON can say."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence that the data carry, with the numbers in it."""

    text: str
    """The sentence, with its numbers written out."""
    numbers: Mapping[str, float | int | str] = field(default_factory=dict)
    """The same numbers by name, for scripts."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an analysis found: tables, findings in words, and where they come from. No charts.

    A notebook shows it by itself; `save` and `load` move it to and from a run folder.
    """

    name: str
    """Name of the analysis."""
    tables: Mapping[str, pd.DataFrame]
    """Tables by name; the main one carries the name of the analysis."""
    findings: Sequence[Finding] = ()
    """What can be said, most important first."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Options, seed, model, capture, library versions."""

    @property
    def table(self) -> pd.DataFrame:
        """The main table."""
        return self.tables[self.name]

    def save(self, folder: Path) -> None:
        """Write `NAME.parquet`, `NAME.TABLE.parquet` and, last, `NAME.json` into `folder`."""
        (folder / f"{self.name}.json").unlink(missing_ok=True)
        for table, frame in self.tables.items():
            write_atomically(self._parquet(folder, table), frame.to_parquet)
        content = self._words() | {"schema": RESULT_SCHEMA, "tables": list(self.tables)}
        write_json(folder / f"{self.name}.json", content)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values; tables as lists of rows."""
        rows = {table: frame.to_dict("records") for table, frame in self.tables.items()}
        return self._words() | {"tables": rows}

    def _words(self) -> dict[str, Any]:
        """Everything but the tables."""
        return {
            "name": self.name,
            "findings": [{"text": f.text, "numbers": f.numbers} for f in self.findings],
            "provenance": self.provenance,
        }

    @classmethod
    def load(cls, folder: Path, name: str) -> "Result":
        """Read what `save` wrote.

        Raises:
            MoEScopeError: There is no complete result of this name, or of another schema.
        """
        content = read_json(folder / f"{name}.json")
        if content.get("schema") != RESULT_SCHEMA:
            raise MoEScopeError(
                f"{folder / name}.json has another format",
                got=content.get("schema"),
                expected=f"schema {RESULT_SCHEMA}",
                remedy="Run the analysis again",
            )
        return cls(
            name=name,
            tables={t: read_table(_parquet(folder, name, t)) for t in content["tables"]},
            findings=[Finding(**finding) for finding in content["findings"]],
            provenance=content["provenance"],
        )

    def _parquet(self, folder: Path, table: str) -> Path:
        return _parquet(folder, self.name, table)

    def _repr_html_(self) -> str:
        items = "".join(f"<li>{html.escape(finding.text)}</li>" for finding in self.findings)
        table = self.table.to_html(index=False, max_rows=20, float_format="{:.4g}".format)
        return f"<h3>{html.escape(self.name)}</h3><ul>{items}</ul>{table}"

    def __str__(self) -> str:
        lines = [f"- {finding.text}" for finding in self.findings]
        table = self.table.to_string(index=False, max_rows=40, float_format="{:.4g}".format)
        return "\n".join([*lines, "", table])


def _parquet(folder: Path, name: str, table: str) -> Path:
    return folder / (f"{name}.parquet" if table == name else f"{name}.{table}.parquet")


def read_table(path: Path) -> pd.DataFrame:
    """Read a table that was written whole.

    Raises:
        MoEScopeError: The file is not there, or damaged.
    """
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are both
        raise MoEScopeError(
            f"cannot read {path}", got=error, remedy="Delete it, and run the analysis again"
        ) from error


def library_versions() -> dict[str, str]:
    """Versions of moescope and of the libraries its numbers depend on."""
    return {library: version(library) for library in _LIBRARIES}


class Run:
    """A run folder: one capture and the results computed from it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def capture_folder(self) -> Path:
        """Where the recorded tensors lie."""
        return self.path / "capture"

    @property
    def results_folder(self) -> Path:
        """Where analyses write."""
        return self.path / "results"

    def parts_folder(self, analysis: str, key: Mapping[str, object]) -> Path:
        """Where an analysis keeps finished parts, so that an interrupted run goes on after them.

        Args:
            analysis: Its name.
            key: Everything that the parts depend on, but for their names; versions of libraries
                are added.
        """
        named = to_json({**key, "libraries": library_versions()})
        return self.results_folder / analysis / hashlib.sha256(named.encode()).hexdigest()[:12]

    def results(self) -> list[str]:
        """Names of the complete results, sorted."""
        return sorted(path.stem for path in self.results_folder.glob("*.json"))

    def result(self, name: str) -> Result:
        """One complete result.

        Raises:
            MoEScopeError: There is none of this name.
        """
        if name not in self.results():
            raise MoEScopeError(
                f"{self.path} holds no result {name!r}",
                got=", ".join(self.results()) or "no results",
                remedy=f"Run `moescope {name} {self.path}` first",
            )
        return Result.load(self.results_folder, name)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, results={self.results()})"
