"""A published study run again: as it was done, beside what it found, and done right."""

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from moescope.captures.read import Capture
from moescope.models.load import load
from moescope.reproduction.file import CORRECTED, Reproduction, read
from moescope.reproduction.findings import claim_findings, claims_table, table_findings
from moescope.reproduction.published import beside, comparison
from moescope.runs import Finding, Result, Run, library_versions
from moescope.scheduler import study

RESULT = "published"
"""Name of the result that holds the comparison."""
CLAIMS = "claims"
"""Its table of what was published in words; the main one where no numbers were."""


def reproduce(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | None = None,
    corpus: Mapping[str, str] | None = None,
    device_map: str | None = None,
) -> Run:
    """Run a published study and the same study done right; put both beside what was published.

    What is done already is kept. `out/results/published` holds the comparison, `out/corrected` is
    the run of the study done right, where the file says how.

    Args:
        file: A YAML file with the fields of `Reproduction`.
        out: Run folder.
        model: Another model in the place of the published one; nothing is comparable then.
        corpus: Another text by domain; the same holds.
        device_map: Where the weights go, as `moescope.load` takes it.

    Raises:
        OptionError: Unknown or unfit options.
        ModelError: The model cannot be read.
        CaptureError: The folder holds a capture made with other options.
    """
    asked = read(Path(file))
    ran = replace(asked, model=model or asked.model, corpus=corpus or asked.corpus)
    opened = load(ran.model, dtype=ran.dtype, device_map=device_map)
    runs = {RESULT: study(opened, out, ran)}
    if (right := ran.corrected_study) is not None:
        runs[CORRECTED] = study(opened, Path(out) / CORRECTED, right)
    tables, findings = _compared(ran, runs, _differences(asked, ran))
    result = Result(
        name=RESULT,
        tables=tables,
        findings=findings,
        provenance={
            "model": ran.model,
            "reproduction": asdict(ran),
            "captures": {name: Capture(run).digest for name, run in runs.items()},
            "libraries": library_versions(),
        },
    )
    result.save(runs[RESULT].results_folder)
    return runs[RESULT]


def _compared(
    ran: Reproduction, runs: Mapping[str, Run], differences: list[str]
) -> tuple[dict[str, pd.DataFrame], list[Finding]]:
    """Tables of the comparison, the main one first, and what they say."""
    tables, said = dict[str, pd.DataFrame](), list[Finding]()
    if ran.published is not None:
        ours = ran.published.ours(runs[RESULT].result(ran.published.analysis))
        tables[RESULT] = comparison(ran.published, ours, differences)
        said += table_findings(ran.published, tables[RESULT], ran.model)
        if ran.corrected is not None:
            right = runs[CORRECTED].result(ran.published.analysis)
            done = ran.corrected
            tables[CORRECTED] = beside(ran.published, right.table, done.beside, done.where)
            said += [replace(f, text=f"Done right: {f.text}") for f in right.findings]
    if ran.claims:
        found = {analysis: runs[RESULT].result(analysis) for analysis in ran.claims}
        tables[CLAIMS if tables else RESULT] = claims_table(ran.claims, found, differences)
        said += claim_findings(ran.claims, found, ran.model)
    return tables, said


def _differences(asked: Reproduction, ran: Reproduction) -> list[str]:
    found = []
    if ran.model != asked.model:
        found.append(f"another model: {ran.model}")
    if ran.corpus != asked.corpus:
        found.append(f"another text: {', '.join(ran.corpus.values())}")
    return found
