"""Finds a checkpoint by name, on disk or on the Hub, and checks its files before they are read."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open

from moescope.errors import ModelError, OptionError
from moescope.runs import read_json

CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_REFERENCE = Path(__file__).parent / "reference"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder with a model, and where it came from."""

    name: str
    """What the user called it."""
    folder: Path
    """Where it lies on disk."""
    revision: str | None = None
    """Commit on the Hub; None for a folder."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether there are tokenizer files (transformers would invent a tokenizer otherwise)."""
        return any((self.folder / name).is_file() for name in _TOKENIZERS)


def reference_models() -> dict[str, Path]:
    """The models that come with moescope, by name."""
    return {path.parent.name: path.parent for path in sorted(_REFERENCE.glob(f"*/{CONFIG}"))}


def locate(
    name: str | PathLike[str], *, revision: str | None = None, code: bool = False
) -> Checkpoint:
    """Find what `name` names: a reference model, a folder, or, failing these, a Hub id.

    Only a name of the form owner/model that is no folder reaches the network, and then only
    small files; `weights` gets the rest.

    Args:
        name: Name, path, or Hub id.
        revision: Branch, tag, or commit on the Hub.
        code: Whether to get the Python files of a Hub model too.

    Raises:
        ModelError: There is nothing of this name, or the Hub does not give it.
        OptionError: A revision of something that is not on the Hub.
    """
    text = str(name)
    folder = Path(text).expanduser()
    is_hub_id = (
        isinstance(name, str)
        and text not in reference_models()
        and not folder.exists()
        and _HUB_ID.fullmatch(text) is not None
        and not folder.parent.is_dir()  # a mistyped path, not a Hub id
    )
    if is_hub_id:
        files = (*_SMALL_FILES, "*.py") if code else _SMALL_FILES
        folder = _fetch(text, files, revision)
        return Checkpoint(name=text, folder=folder, revision=folder.name)
    if revision is not None:
        raise OptionError(
            f"revisions are for models on the Hub, and {text} is not a Hub id", got=revision
        )
    if isinstance(name, str) and text in reference_models():
        return Checkpoint(name=text, folder=reference_models()[text])
    if not folder.is_dir():
        raise _not_found(text, folder)
    return Checkpoint(name=text, folder=folder)


def weights(checkpoint: Checkpoint) -> list[Path]:
    """The safetensors files of a checkpoint, all there and whole as far as their headers say.

    Raises:
        ModelError: Files are missing or damaged, or there is nothing but pickles.
    """
    folder = checkpoint.folder
    shards = [_WEIGHTS]
    if (folder / _INDEX).is_file():
        shards = sorted(set(read_json(folder / _INDEX)["weight_map"].values()))
    if checkpoint.revision is not None:
        _fetch(checkpoint.name, shards, checkpoint.revision)
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise _without_weights(checkpoint, missing)
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{checkpoint.name} holds no {CONFIG}",
            expected="a folder that `save_pretrained` wrote",
        )
    for shard in shards:
        _check_shard(folder / shard)
    return [folder / shard for shard in shards]


def _fetch(name: str, files: Iterable[str], revision: str | None) -> Path:
    """The folder of a Hub model with `files` in it."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ModelError(
            f"the Hub does not give {name}" + (f" at revision {revision}" if revision else ""),
            got=first_line(error),
            remedy="Check the name, the connection and your access rights; a folder of that name "
            "does not exist here either" + _suggestion(name),
        ) from error


def _not_found(text: str, path: Path) -> ModelError:
    if path.suffix in _PICKLED and path.is_file():
        return _pickled(text, [path.name])
    if path.is_file():
        return ModelError(f"{text} is a file", expected="the folder it lies in")
    return ModelError(
        f"there is no model called {text!r}",
        expected="an existing folder, a Hub id (owner/name), or a reference model "
        f"({', '.join(reference_models()) or 'none is installed'})",
        remedy=_suggestion(text).removeprefix(". ") or None,
    )


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(Path(name).name, reference_models(), n=1)
    return f". Did you mean {close[0]!r}?" if close else ""


def _without_weights(checkpoint: Checkpoint, missing: list[str]) -> ModelError:
    pickles = sorted(p.name for p in checkpoint.folder.iterdir() if p.suffix in _PICKLED)
    if pickles and missing == [_WEIGHTS]:
        return _pickled(checkpoint.name, pickles)
    return ModelError(
        f"{checkpoint.name} holds no {', '.join(missing[:3])}",
        got=f"{len(missing)} missing file(s)",
        expected="weights in safetensors format",
    )


def _pickled(name: str, files: list[str]) -> ModelError:
    return ModelError(
        f"{name} has only pickled weights, which could run any code when opened: refused",
        got=", ".join(files[:3]),
        expected="weights in safetensors format",
        remedy="Have its owner save it again with `save_pretrained`",
    )


def _check_shard(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path} is damaged",
            got=first_line(error),
            expected="a whole safetensors file",
            remedy="Copy or download it again",
        ) from error


def first_line(error: Exception) -> str:
    """What an error of another library says, without the essay that follows."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
