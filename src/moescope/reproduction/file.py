"""What a file in `reproduce/` says: the study as it was done, what it found, and how to do it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moescope.captures.options import CaptureOptions
from moescope.config import build, read_yaml
from moescope.corpora.packing import Packing
from moescope.errors import OptionError
from moescope.reproduction.published import Label, PublishedTable
from moescope.scheduler import StudyConfig

CORRECTED = "corrected"
"""Folder within the run where the study is done right."""


@dataclass(frozen=True, kw_only=True)
class Correction:
    """The study without its known mistakes, on the same model and text."""

    packing: Packing
    """How documents become rows."""
    capture: CaptureOptions
    """Of how many tokens to record."""
    analyses: Mapping[str, Mapping[str, Any] | None]
    """Analyses by name, with their options."""
    where: Mapping[str, Label] = field(default_factory=dict)
    """Columns of the analysis' main table with the one value that is shown."""
    beside: tuple[str, ...]
    """Columns of that table, to be shown beside each published value."""


@dataclass(frozen=True, kw_only=True)
class Reproduction(StudyConfig):
    """A published study: what it did, what it found, and how it is to be done."""

    model: str
    """The published study's model: Hub id, local folder, or name of a shipped model."""
    dtype: str = "auto"
    """Type of the weights: auto (as saved), float32, bfloat16 or float16."""
    claims: Mapping[str, str] = field(default_factory=dict)
    """By analysis: what the study says in words about what it measures."""
    published: PublishedTable | None = None
    """What was found, in numbers; None where no table was published."""
    corrected: Correction | None = None
    """How it is to be done; None where the analyses do it right already."""

    def __post_init__(self) -> None:
        if not self.claims and self.published is None:
            raise OptionError("nothing is said of what was published", expected="published, claims")
        _require("claims", self.claims, self.analyses)
        if self.published is not None:
            _require("published", [self.published.analysis], self.analyses)
        if self.corrected is not None:
            if self.published is None:
                raise OptionError(f"{CORRECTED} is shown beside published values; there are none")
            _require(CORRECTED, [self.published.analysis], self.corrected.analyses)

    @property
    def corrected_study(self) -> StudyConfig | None:
        """The study done right."""
        done = self.corrected
        if done is None:
            return None
        return StudyConfig(
            corpus=self.corpus, packing=done.packing, capture=done.capture, analyses=done.analyses
        )


def _require(part: str, names: Any, analyses: Mapping[str, object]) -> None:
    for name in names:
        if name not in analyses:
            raise OptionError(
                f"{part} is about an analysis that is left out",
                got=", ".join(analyses),
                expected=name,
            )


def read(file: Path) -> Reproduction:
    """Read a file, and check it as far as that goes without running it.

    Raises:
        OptionError: It cannot be read, or holds unknown or unfit options.
    """
    content = read_yaml(file)
    for name, part in (("published", PublishedTable), (CORRECTED, Correction)):
        if isinstance(content, Mapping) and content.get(name) is not None:
            content = {**content, name: build(part, content[name], f"{file}.{name}")}
    return build(Reproduction, content, str(file))
