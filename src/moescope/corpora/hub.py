"""Hub data sets, streamed through the `datasets` library."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moescope.corpora.documents import Document
from moescope.corpora.fields import content_of, name_of
from moescope.corpora.files import files_sha256
from moescope.errors import CorpusError

_SECONDS = 10.0
"""The Hub has this long to say which commit it would serve."""


@dataclass(frozen=True)
class HubSource:
    """One column of one split of a data set; rows arrive one at a time."""

    spec: str
    """The source as the user wrote it."""
    dataset: str
    """Hub id, or a local folder that `datasets` can read."""
    config: str | None
    """Configuration of the data set; None is its default."""
    split: str
    """For example `train`, or `train[:100]` where the library allows it."""
    column: str
    """Name of the column that holds text or chat messages."""

    def identity(self) -> dict[str, str]:
        """SHA-256 of a local folder, or commit on the Hub; nothing if the Hub does not answer."""
        folder = Path(self.dataset)
        if folder.is_dir():
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            named = ((path.relative_to(folder).as_posix(), path) for path in paths)
            return {"sha256": files_sha256(named)}
        commit = _commit(self.dataset)
        return {} if commit is None else {"revision": commit}

    def documents(self) -> Iterator[Document]:
        """Stream the documents in the order of the data set."""
        for number, row in enumerate(self._rows()):
            where = f"{self.spec}, row {number}"
            content = content_of(row, self.column, where)
            yield Document(name_of(row, f"{self.dataset}:{self.split}:{number}"), content)

    def _rows(self) -> Iterator[dict[str, object]]:
        import datasets  # takes seconds to import; most corpora are local files

        # The library and the file systems below it raise unrelated classes for a wrong name,
        # no network, a bad split, or a broken file; the user needs the same answer to all.
        try:
            yield from datasets.load_dataset(
                self.dataset, self.config, split=self.split, streaming=True
            )
        except Exception as error:
            raise CorpusError(
                f"{self.spec} cannot be read",
                got=f"{type(error).__name__}: {error}",
                expected="hf:ID:CONFIG:SPLIT:COLUMN (CONFIG may be empty)",
                remedy="Check the name and the split; a Hub id needs the network the first time",
            ) from error


def _commit(dataset: str) -> str | None:
    from huggingface_hub import HfApi

    # Whatever is wrong, reading the data set will say it; a finished capture opens without it.
    try:
        return HfApi().dataset_info(dataset, timeout=_SECONDS).sha
    except Exception:
        return None
