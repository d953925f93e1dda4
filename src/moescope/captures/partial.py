"""How far a capture is: finished, with a manifest, or able to go on after any interruption.

`capture/partial/progress.json` lists the groups of shards that are complete; it is replaced
atomically after each group. Reservoir candidates lie beside it. The folder goes away once the
manifest of the finished capture is in place.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moescope.captures.shards import READABLE, Entry, verify
from moescope.errors import CaptureError, MoEScopeError
from moescope.runs import read_json, write_json

MANIFEST = "manifest.json"
PARTIAL = "partial"
_PROGRESS = "progress.json"


@dataclass(frozen=True, kw_only=True)
class Group:
    """State after a group of shards: counts from the beginning of the corpus."""

    rows: int = 0
    """Rows done."""
    tokens: int = 0
    """Kept tokens recorded."""
    documents: int = 0
    """Documents begun."""
    whole_tokens: int = 0
    """Kept tokens in rows whose wide tensors were recorded wholly."""
    data_sha256: str = ""
    """Chained hash of the rows done."""
    unused_slots: Mapping[str, int] = field(default_factory=dict)
    """By layer, the slots of kept tokens that no expert was used for."""
    shards: Sequence[Entry] = ()
    """Finished shards of this group."""
    candidates: Sequence[Entry] = ()
    """Files of reservoir candidates of this group, within `partial/`."""


class Partial:
    """The unfinished state in a capture folder."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], groups: list[Group]) -> None:
        self.folder = folder
        self.identity = identity
        self.groups = groups

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any]) -> "Partial":
        """Start anew, or go on where a capture with the same options stopped.

        Raises:
            CaptureError: The folder holds a part of another capture, or an altered shard.
        """
        for leftover in [*folder.glob(".*.partial"), *folder.glob(f"{PARTIAL}/.*.partial")]:
            leftover.unlink()
        path = folder / PARTIAL / _PROGRESS
        if not path.exists():
            return cls(folder, identity, [])
        content = read_json(path)
        require_same(folder, content["identity"], identity)
        groups = [Group(**group) for group in content["groups"]]
        for group in groups:
            for entry in group.shards:
                verify(folder, entry)
            for entry in group.candidates:
                verify(folder / PARTIAL, entry)
        return cls(folder, identity, groups)

    @property
    def candidate_folder(self) -> Path:
        """Where reservoir candidates go."""
        return self.folder / PARTIAL

    @property
    def last(self) -> Group:
        """State after the last complete group."""
        return self.groups[-1] if self.groups else Group()

    @property
    def shards(self) -> list[Entry]:
        """Finished shards of all groups."""
        return [entry for group in self.groups for entry in group.shards]

    @property
    def candidates(self) -> list[Entry]:
        """Candidate files of all groups, in token order."""
        return [entry for group in self.groups for entry in group.candidates]

    def commit(self, group: Group) -> None:
        """Note that a group is complete; its files are on the disk."""
        self.groups.append(group)
        content = {"identity": self.identity, "groups": [asdict(group) for group in self.groups]}
        write_json(self.folder / PARTIAL / _PROGRESS, content)

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Put the manifest in place, then remove what only an unfinished capture needs."""
        write_json(self.folder / MANIFEST, manifest)
        discard_partial(self.folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a complete capture.

    Raises:
        CaptureError: There is none, it was altered, or it has another format.
    """
    path = folder / MANIFEST
    if not path.exists():
        begun = (folder / PARTIAL).exists()
        raise CaptureError(
            f"{folder} holds {'an unfinished' if begun else 'no'} capture",
            remedy="Run the same capture again; it goes on where it stopped"
            if begun
            else "Run `moescope capture` first",
        )
    try:
        manifest: dict[str, Any] = read_json(path)
    except MoEScopeError as error:
        raise CaptureError(f"{path} was altered: it is not JSON", got=error) from error
    if manifest.get("schema") not in READABLE:
        raise CaptureError(
            f"{path} has another format",
            got=manifest.get("schema"),
            expected=f"schema {' or '.join(map(str, READABLE))}",
            remedy="Capture again, or use the version of moescope that wrote it",
        )
    return manifest


def discard_partial(folder: Path) -> None:
    """Remove the remains of an unfinished state."""
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def require_same(folder: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Make sure that a folder belongs to the capture that was asked for.

    Compares what `asked` names; `found` may say more.

    Raises:
        CaptureError: They differ; the message says where.
    """
    before, now = _flat(found), _flat(asked)
    differences = [
        f"{name}: {before.get(name)!r} in the folder, {value!r} asked for"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if differences:
        raise CaptureError(
            f"{folder} holds a capture made with other options or of another text",
            got="; ".join(differences),
            remedy=f"Choose another folder, or delete {folder} to capture again",
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}.{name}" if prefix else str(name))
    return flat
