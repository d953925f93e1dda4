"""A progress bar where somebody can see it."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def track(
    iterable: Iterable[Item], description: str, *, total: int | None = None
) -> Iterator[Item]:
    """Pass items on while a bar on standard error counts them; silent if that is no terminal.

    Args:
        iterable: What to go through.
        description: What is being done, in a few words.
        total: Number of items, if known.
    """
    if not sys.stderr.isatty():
        yield from iterable
        return
    from rich.console import Console  # only a terminal needs it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        yield from bar.track(iterable, total=total, description=description)
