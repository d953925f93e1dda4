"""Shard files: safetensors written whole, known by size and SHA-256."""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from moescope.errors import CaptureError
from moescope.runs import write_atomically

SCHEMA = 2
"""Version of the format; docs/capture-format.md describes it."""
READABLE = (1, 2)
"""Versions that can be read."""
SHARD_BYTES = 1 << 27
"""A group of shards is written at the latest when it holds this much (128 MiB)."""
SPILL_BYTES = 1 << 26
"""Reservoir candidates go to disk when they take this much (64 MiB)."""

Entry = dict[str, Any]
"""A shard in the manifest: `file`, `bytes`, `sha256`, and what is in it."""


class Columns:
    """Tensors growing by name, batch by batch, until they are written."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}
        self._on_device: list[tuple[str, int]] = []
        self.bytes = 0

    def add(self, name: str, values: Tensor) -> None:
        """Append rows; they may still be on the device."""
        parts = self._parts.setdefault(name, [])
        if values.device.type != "cpu":
            self._on_device.append((name, len(parts)))
        parts.append(values)
        self.bytes += values.nbytes

    def settle(self) -> None:
        """Move to the CPU what was added since the last time."""
        for name, number in self._on_device:
            self._parts[name][number] = self._parts[name][number].cpu()
        self._on_device.clear()

    def take(self) -> dict[str, Tensor]:
        """Everything that was added, joined; empties the columns."""
        taken = {}
        while self._parts:  # one name at a time, so that parts and whole do not both stay
            name, parts = self._parts.popitem()
            taken[name] = torch.cat(parts)
        self.bytes = 0
        return taken


def write_shard(folder: Path, file: str, tensors: Mapping[str, Tensor], **content: object) -> Entry:
    """Write a shard atomically.

    Args:
        folder: Where.
        file: Its name.
        tensors: CPU tensors by name.
        content: More about the shard, for its entry.

    Returns:
        The entry for the manifest.
    """
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_atomically(folder / file, lambda path: path.write_bytes(data))
    digest = hashlib.sha256(data).hexdigest()
    return {"file": file, "bytes": len(data), "sha256": digest, **content}


def verify(folder: Path, entry: Entry) -> None:
    """Make sure that a shard is what was written.

    Reads the file once per process, in pieces.

    Raises:
        CaptureError: The shard is missing, truncated or altered; the message names it.
    """
    path = folder / str(entry["file"])
    remedy = f"Copy the file again, or delete {folder} and capture again"
    if not path.is_file():
        raise CaptureError(f"shard {path} is missing", remedy=remedy)
    status = path.stat()
    if status.st_size != entry["bytes"]:
        raise CaptureError(
            f"shard {path} is truncated or has grown",
            got=f"{status.st_size} bytes",
            expected=f"{entry['bytes']} bytes",
            remedy=remedy,
        )
    if _sha256(path.resolve(), status.st_size, status.st_mtime_ns) != entry["sha256"]:
        raise CaptureError(f"shard {path} was altered: its checksum differs", remedy=remedy)


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, modified: int) -> str:
    """Checksum of a file; size and time tell whether an earlier answer still holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensor(folder: Path, entry: Entry, name: str) -> Tensor:
    """Read one tensor of a shard, and nothing else of it."""
    with safe_open(folder / str(entry["file"]), framework="pt") as shard:
        tensor: Tensor = shard.get_tensor(name)
        return tensor
