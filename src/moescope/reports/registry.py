"""Which figures belong to which result.

Every module of `moescope.reports.figures` may register one function; a result without one
still shows its findings and tables.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import altair as alt
import pandas as pd

from moescope.errors import MoEScopeError
from moescope.reports import figures as figures_package
from moescope.reports.panels import Panels, specification
from moescope.runs import Result


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One chart and the words that make it readable."""

    name: str
    """File name without ending; lower case, joined by hyphens."""
    title: str
    """The question that the chart answers."""
    how_to_read: str
    """What a mark, an axis and a colour mean."""
    limits: str
    """What the chart does not say."""
    chart: alt.TopLevelMixin
    """The chart, without width: `panels` gives it one."""
    panels: Panels
    """How the chart fills the width of the page."""
    table: pd.DataFrame | None = None
    """The numbers of the chart, shown as a sortable table below it."""

    def of_stack(self, stack: str) -> "Figure":
        """The same, told apart from that of the other stack by name and title."""
        title = f"{stack.capitalize()}: {self.title[0].lower()}{self.title[1:]}"
        return replace(self, name=f"{self.name}-{stack}", title=title)

    def specification(self) -> dict[str, Any]:
        """The chart as Vega-Lite, with its data, title and description."""
        description = f"{self.title} {self.how_to_read}"
        return specification(self.chart, self.panels, title=self.title, description=description)


Draw = Callable[[Result], list[Figure]]


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """The part of a report that belongs to one result."""

    title: str
    """Heading of the chapter."""
    question: str = ""
    """The question of the analysis, one sentence."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Meaning of the columns of its tables."""
    draw: Draw = lambda result: []
    """The figures of a result."""


_CHAPTERS: dict[str, Chapter] = {}


def figures(
    name: str, *, title: str, question: str, columns: Mapping[str, str]
) -> Callable[[Draw], Draw]:
    """Register the decorated function as what draws the result `name`.

    Raises:
        MoEScopeError: The name is taken.
    """

    def register(draw: Draw) -> Draw:
        if name in _CHAPTERS:
            raise MoEScopeError(
                f"figures for the result {name!r} are registered twice",
                got=f"{draw.__module__}.{draw.__qualname__}",
                remedy="Give every analysis its own name and one function that draws it",
            )
        _CHAPTERS[name] = Chapter(title=title, question=question, columns=columns, draw=draw)
        return draw

    return register


def chapter(name: str) -> Chapter:
    """The chapter of the result `name`; one without figures if none is registered."""
    for module in iter_modules(figures_package.__path__):
        import_module(f"{figures_package.__name__}.{module.name}")
    return _CHAPTERS.get(name, Chapter(title=name.replace("_", " ").capitalize()))
