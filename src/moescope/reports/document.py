"""The report as one HTML document that asks the network for nothing.

Whatever comes from a corpus or a model is data: escaped in the text, and in the embedded JSON
written without `<`, `>` and `&`, so that nothing can end a script element. A content security
policy allows the scripts written here, by their hash, and no other; Vega evaluates expressions
with its interpreter, so that not even it needs `eval`.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from moescope.reports.registry import Chapter, Figure
from moescope.reports.tables import meanings_html, size_in_words, table_html
from moescope.runs import Result, plain

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
"""Version of the grammar that Altair writes, as vl-convert names it."""

Content = Sequence[tuple[Result, Chapter, list[Figure]]]


def themes() -> dict[str, Any]:
    """Vega configurations by colour scheme: light and dark."""
    found: dict[str, Any] = json.loads(_page_file("theme.json"))
    return found


def document(content: Content, specifications: Mapping[str, Any], folder: str) -> str:
    """The whole page.

    Args:
        content: Results in order, with their chapters and figures.
        specifications: Vega-Lite of every figure, by name.
        folder: Name of the run folder.
    """
    scripts = [_vega(), _page_file("report.js")]
    drawn = [figure for _, _, figures in content for figure in figures]
    numbers = {figure.name: number for number, figure in enumerate(drawn, start=1)}
    provenance = content[0][0].provenance
    return Template(_page_file("report.html")).substitute(
        policy=_policy(scripts),
        title=html.escape(str(provenance.get("model", folder))),
        facts=_facts(provenance, folder),
        style=_page_file("report.css"),
        navigation="".join(
            f'<a href="#{_anchor(result)}">{html.escape(chapter.title)}</a>'
            for result, chapter, _ in content
        ),
        findings="".join(_findings(result, chapter) for result, chapter, _ in content),
        chapters="".join(_chapter(*part, numbers) for part in content),
        provenance="".join(_provenance(result, chapter) for result, chapter, _ in content),
        themes=_embedded(themes()),
        specifications=_embedded(specifications),
        vega=scripts[0],
        script=scripts[1],
    )


def _page_file(name: str) -> str:
    return files("moescope.reports").joinpath("page", name).read_text(encoding="utf-8")


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script, once for all charts."""
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _policy(scripts: Sequence[str]) -> str:
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _embedded(value: object) -> str:
    """JSON that may stand inside a script element; missing numbers become null."""
    text = json.dumps(plain(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _anchor(result: Result) -> str:
    return f"result-{html.escape(result.name)}"


def _facts(provenance: Mapping[str, Any], folder: str) -> str:
    facts = {"run": folder}
    facts |= {
        name: f"{provenance[name]:,}" for name in ("tokens", "documents") if name in provenance
    }
    items = (f"<div><dt>{k}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{"".join(items)}</dl>'


def _findings(result: Result, chapter: Chapter) -> str:
    sentences = "".join(f"<li>{html.escape(finding.text)}</li>" for finding in result.findings)
    if not sentences:
        sentences = "<li>This analysis states no finding; see its tables.</li>"
    heading = f'<h3><a href="#{_anchor(result)}">{html.escape(chapter.title)}</a></h3>'
    return f"{heading}<ul>{sentences}</ul>"


def _chapter(
    result: Result, chapter: Chapter, figures: list[Figure], numbers: Mapping[str, int]
) -> str:
    tables = {name: frame for name, frame in result.tables.items() if not frame.empty}
    shown = "".join(_table(result, name, frame) for name, frame in tables.items())
    meanings = meanings_html(chapter.columns, list(tables.values())) if chapter.columns else ""
    return (
        f'<section id="{_anchor(result)}"><h2>{html.escape(chapter.title)}</h2>'
        f'<p class="question">{html.escape(chapter.question)}</p>'
        f"{''.join(_figure(figure, numbers[figure.name]) for figure in figures)}"
        f'<div class="tables"><h3>Tables</h3>{meanings}{shown}</div></section>'
    )


def _figure(figure: Figure, number: int) -> str:
    name, title = html.escape(figure.name), html.escape(figure.title)
    table = "" if figure.table is None else table_html(figure.table, f"Numbers of figure {number}")
    return (
        f'<figure id="{name}"><p class="number">Figure {number}</p><h3>{title}</h3>'
        f'<div class="chart" data-figure="{name}" role="group" tabindex="0" '
        f'aria-label="{title}"></div>'
        f"<figcaption><p>{html.escape(figure.how_to_read)}</p>"
        f'<p class="limits"><b>What it does not say.</b> {html.escape(figure.limits)}</p>'
        f'<p class="save">Save as <button type="button" data-save="svg">SVG</button> '
        f'<button type="button" data-save="png">PNG</button></p></figcaption>{table}</figure>'
    )


def _table(result: Result, name: str, frame: pd.DataFrame) -> str:
    caption = result.name if name == result.name else f"{result.name}: {name}"
    return (
        f"<details><summary>{html.escape(caption)} "
        f"<small>{size_in_words(frame)}</small></summary>{table_html(frame, caption)}</details>"
    )


def _provenance(result: Result, chapter: Chapter) -> str:
    return (
        f"<details><summary>{html.escape(chapter.title)}</summary>"
        f"{_nested(result.provenance)}</details>"
    )


def _nested(value: object) -> str:
    """A mapping as a definition list, anything else as text."""
    if not isinstance(value, Mapping):
        return html.escape(json.dumps(value, ensure_ascii=False) if value is None else str(value))
    items = (f"<dt>{html.escape(str(k))}</dt><dd>{_nested(v)}</dd>" for k, v in value.items())
    return f"<dl>{''.join(items)}</dl>"
