"""Writes a report: the page, its figures and its tables."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import vl_convert

from moescope.errors import MoEScopeError
from moescope.reports.document import VEGA_LITE, document, themes
from moescope.reports.registry import Figure, chapter
from moescope.runs import Result, Run, write_atomically, write_text

_RESOLUTION = 2.0  # pixels of a PNG per pixel of the layout


def report(run: Run | str | os.PathLike[str]) -> Path:
    """Write RUN/report.html, RUN/figures/NAME.{svg,png} and RUN/tables/NAME.{csv,parquet}.

    The page holds everything it needs: it opens without a network and may be sent by itself.

    Args:
        run: A run folder with at least one result.

    Returns:
        The path of the page.

    Raises:
        MoEScopeError: The run holds no result, or one of another format.
    """
    run = run if isinstance(run, Run) else Run(run)
    names = run.results()
    if not names:
        raise MoEScopeError(
            f"{run.path} holds no result to report",
            got="no folder of this name" if not run.path.exists() else "no results",
            remedy=f"Run an analysis first, for example `moescope routing {run.path}`",
        )
    results = [run.result(name) for name in _in_order(names)]
    content = [(result, chapter(result.name), _figures(result)) for result in results]
    specifications = {f.name: f.specification() for _, _, figures in content for f in figures}
    for result in results:
        _write_tables(run.path / "tables", result)
    for name, specification in specifications.items():
        write_figure(name, specification, run.path / "figures")
    page = run.path / "report.html"
    write_text(page, document(content, specifications, run.path.resolve().name))
    return page


def write_figure(name: str, specification: Mapping[str, Any], folder: Path) -> None:
    """Write one figure as `NAME.svg` and `NAME.png`, in the light theme, without a network."""
    svg = vl_convert.vegalite_to_svg(
        dict(specification), VEGA_LITE, config=themes()["light"], allowed_base_urls=[]
    )
    png = vl_convert.svg_to_png(svg, scale=_RESOLUTION)
    write_text(folder / f"{name}.svg", svg)
    write_atomically(folder / f"{name}.png", lambda path: path.write_bytes(png))


def _in_order(names: list[str]) -> list[str]:
    """Routing first: it says what the other results stand on."""
    return sorted(names, key=lambda name: (name != "routing", name))


def _figures(result: Result) -> list[Figure]:
    return chapter(result.name).draw(result)


def _write_tables(folder: Path, result: Result) -> None:
    for table, frame in result.tables.items():
        name = result.name if table == result.name else f"{result.name}.{table}"
        _write_table(folder, name, frame)


def _write_table(folder: Path, name: str, frame: pd.DataFrame) -> None:
    write_atomically(folder / f"{name}.parquet", frame.to_parquet)
    write_atomically(folder / f"{name}.csv", lambda path: frame.to_csv(path, index=False))
