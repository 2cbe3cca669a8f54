"""How far a long command is: a bar on a terminal, nothing elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Generator
from typing import Final

_FROM: Final = 20
"""Fewer are done before a bar could be read."""


@contextlib.contextmanager
def progress_bar(what: str, total: int) -> Generator[Callable[[], None]]:
    """On standard error. What it gives is called once for each that is done."""
    if total < _FROM or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # What is printed meanwhile stands above the bar; standard output may be a file.
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
