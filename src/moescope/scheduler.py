"""The scheduler: take the union of what the chosen analyses need, capture once, run them."""

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from moescope.analyses.material import Material
from moescope.analyses.registry import Analysis, find
from moescope.captures.options import CaptureOptions
from moescope.captures.read import Capture
from moescope.captures.record import capture
from moescope.captures.registry import RECORDABLE, BlockTensor, LogitsTensor, recordable
from moescope.captures.shards import SHARD_BYTES, SPILL_BYTES
from moescope.config import build
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Batch, Packing
from moescope.models.view import MoEModel
from moescope.progress import track
from moescope.runs import Run

TIMED_BATCHES = 3  # the first of them only warms up
SHARE_OF_PEAK = 0.5  # of matrix products alone, that fits with all around them reach
CAPTURE_OVERHEAD = 1.35  # of a capture with block inputs, against plain forward passes


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What to study: text, how it is packed and recorded, which analyses with which options."""

    corpus: Mapping[str, str] = field(default_factory=dict)
    """Source of each domain (docs/corpora.md); empty for the built-in corpus."""
    packing: Packing = field(default_factory=Packing)
    """How documents become rows."""
    capture: CaptureOptions = field(default_factory=CaptureOptions)
    """Of how many tokens to record; what the analyses need is added."""
    analyses: Mapping[str, Mapping[str, Any] | None] = field(
        default_factory=lambda: {"routing": None}
    )
    """Analyses by name, with their options."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a study is going to do, and what its capture costs at most."""

    run: Path
    """Run folder."""
    model: str
    """Name of the model."""
    steps: Mapping[str, str]
    """`capture` and the analyses, each `to do` or `done`."""
    record: tuple[str, ...]
    """Tensors to record."""
    tokens: int
    """Tokens to run through the model, padding not counted."""
    seconds: Mapping[str, float]
    """Estimate for each step to do, from forward passes and matrix products timed here."""
    disk_bytes: int
    """Upper bound for the capture."""
    memory_bytes: int
    """Weights of the model and the capture's buffer."""

    def _state(self, step: str) -> str:
        if step not in self.seconds:
            return self.steps[step]
        return f"{self.steps[step]}, about {self.seconds[step]:,.0f} s"

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        steps = "\n".join(f"  {name}: {self._state(name)}" for name in self.steps)
        return (
            f"Study of {self.model} in {self.run}\n{steps}\n"
            f"Recording {', '.join(self.record)} over {self.tokens:,} tokens\n"
            f"  time    about {sum(self.seconds.values()):,.0f} s\n"
            f"  disk    at most {self.disk_bytes / 2**20:,.0f} MiB\n"
            f"  memory  about {self.memory_bytes / 2**20:,.0f} MiB"
        )


def study(
    model: MoEModel,
    out: str | os.PathLike[str],
    config: StudyConfig | Mapping[str, Any] | None = None,
) -> Run:
    """Capture what the chosen analyses need and run them; what is done already is kept.

    Args:
        model: The model.
        out: Run folder.
        config: What to study, as an object or as a mapping like the YAML file.

    Raises:
        OptionError: Unknown or unfit options.
        CaptureError: The folder holds a capture made with other options.
    """
    config = _config(config)
    chosen = _chosen(config)
    options = _capture_options(config, chosen, model)
    corpus = open_corpus(config.corpus, config.packing)
    capture(model, corpus, out, **vars(options))
    material = Material(out, model, corpus)
    for entry, entry_options in chosen:
        if not entry.is_done(material, entry_options):
            entry.run(material, entry_options)
    return material.run


def plan(
    model: MoEModel,
    out: str | os.PathLike[str],
    config: StudyConfig | Mapping[str, Any] | None = None,
) -> Plan:
    """What `study` with the same arguments would do; reads the text and times the model."""
    config = _config(config)
    chosen = _chosen(config)
    options = _capture_options(config, chosen, model)
    corpus = open_corpus(config.corpus, config.packing)
    run = Run(out)
    captured = Capture.exists(run)
    steps = {"capture": "done" if captured else "to do"}
    seconds: dict[str, float] = {}
    for entry, entry_options in chosen:
        done = captured and entry.is_done(Material(run, model), entry_options)
        steps[entry.name] = "done" if done else "to do"
        if not done and entry.work is not None:
            seconds[entry.name] = entry.work(model, entry_options) / _operations_per_second()
    tokens, rows = 0, 0
    for batch in track(corpus.batches(model.tokenizer), "reading the text"):
        tokens += int((batch.documents >= 0).sum())
        rows += len(batch.input_ids)
    if not captured:
        batches = list(islice(corpus.batches(model.tokenizer), TIMED_BATCHES))
        seconds["capture"] = _seconds_per_row(model, batches) * rows * CAPTURE_OVERHEAD
    return Plan(
        run=run.path,
        model=model.name,
        steps=steps,
        record=options.record,
        tokens=tokens,
        seconds=seconds,
        disk_bytes=_disk_bytes(model, options, tokens),
        memory_bytes=_weight_bytes(model) + 2 * (SHARD_BYTES + SPILL_BYTES),
    )


def open_corpus(sources: Mapping[str, str], packing: Packing) -> Corpus:
    """The named sources, or the built-in corpus where there are none."""
    return Corpus.from_sources(sources, packing) if sources else Corpus.builtin(packing)


def _config(config: StudyConfig | Mapping[str, Any] | None) -> StudyConfig:
    return config if isinstance(config, StudyConfig) else build(StudyConfig, config, "study")


def _chosen(config: StudyConfig) -> list[tuple[Analysis[Any], Any]]:
    """Analyses with their options, checked before anything is computed."""
    found = []
    for name, options in config.analyses.items():
        entry = find(name)
        found.append((entry, build(entry.options, options, f"analyses.{name}")))
    return found


def _capture_options(
    config: StudyConfig, chosen: list[tuple[Analysis[Any], Any]], model: MoEModel
) -> CaptureOptions:
    """With what the analyses need; losses only of models that go on with a text.

    An analysis that cannot do without says so.
    """
    needs = {need for entry, _ in chosen for need in entry.needs if need in RECORDABLE}
    if model.model.config.is_encoder_decoder:
        needs = {need for need in needs if not isinstance(recordable(need), LogitsTensor)}
    return replace(config.capture, record=tuple(sorted({"routing"} | needs)))


def _seconds_per_row(model: MoEModel, batches: list[Batch]) -> float:
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        with torch.inference_mode():
            model.forward(batch.input_ids, batch.attention_mask, head=True)
        seconds.append((time.perf_counter() - start) / len(batch.input_ids))
    return min(seconds[1:] or seconds)


def _operations_per_second() -> float:
    """Of products of matrices as small as those of a fit, in fp32, at the share a fit reaches."""
    left = torch.randn(8, 256, 256)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.bmm(left, left)
        seconds.append(time.perf_counter() - start)
    return SHARE_OF_PEAK * 2 * left.numel() * left.shape[-1] / min(seconds)


def _weight_bytes(model: MoEModel) -> int:
    return sum(weights.numel() * weights.element_size() for weights in model.model.parameters())


def _disk_bytes(model: MoEModel, options: CaptureOptions, tokens: int) -> int:
    """Everything a token can bring, for as many tokens as each tensor can be recorded for."""
    wide = [
        n
        for n in options.record
        if isinstance(t := recordable(n), BlockTensor) and t.kind == "wide"
    ]
    total = tokens * 32  # ids, documents, domains, positions, rows
    for layer in model.layers:
        sampled = min(tokens, options.tokens + layer.num_experts * options.tokens_per_expert)
        total += tokens * (4 * layer.num_experts + 6 * layer.top_k)
        total += sampled * (8 + len(wide) * layer.hidden_size * model.dtype.itemsize)
    return total
