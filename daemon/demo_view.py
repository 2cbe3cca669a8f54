"""The demo for people: a live view on a terminal, a line now and then elsewhere, and the summary at the end."""

import contextlib
import shlex
import sys
import time
from collections.abc import Generator, Iterator
from typing import Final, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kafkasrcd.daemon.demo import DemoOutcome, DemoProgress
from kafkasrcd.daemon.demo_directory import GROUP
from kafkasrcd.daemon.status_view import status_view

_LINE_SECONDS: Final = 2.0
"""Between lines where the output is not a terminal."""


class DemoScreen(Protocol):
    """Shows a demo, and what came of it."""

    def show(self, progress: DemoProgress) -> None: ...

    def summary(self, outcome: DemoOutcome) -> None: ...


@contextlib.contextmanager
def open_view() -> Generator[DemoScreen]:
    """The one that suits standard output."""
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if not console.is_terminal:
        yield _Lines(console)
        return
    with Live(console=console, auto_refresh=False) as live:
        yield _LiveView(console, live)


class _Summary:
    def __init__(self, console: Console) -> None:
        self._console = console

    def summary(self, outcome: DemoOutcome) -> None:
        self._console.print(_summary(outcome))


class _Lines(_Summary):
    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._due = 0.0
        self._step = ""

    def show(self, progress: DemoProgress) -> None:
        now = time.monotonic()
        if now < self._due and progress.step == self._step:
            return
        self._due = now + _LINE_SECONDS
        self._step = progress.step
        parts = [f"{progress.elapsed_seconds:5.1f} s", f"produced {progress.report.produced:,}"]
        parts.append(f"handled {progress.tally.orders:,}")
        status = progress.status
        if status is not None:
            parts.append(f"{status.state}, {len(status.partitions)} partitions, {status.total_commits:,} commits")
            parts += status.problems
            parts += (partition.problem for partition in status.partitions if partition.problem)
        self._console.print(Text("  ".join([*parts, f"({progress.step})"])))


class _LiveView(_Summary):
    def __init__(self, console: Console, live: Live) -> None:
        super().__init__(console)
        self._live = live

    def show(self, progress: DemoProgress) -> None:
        self._live.update(_progress(progress, self._console.width), refresh=True)


def _progress(progress: DemoProgress, width: int) -> RenderableType:
    if not progress.brokers:
        return Text(f"{progress.step} ...")
    where = f"embedded broker {progress.brokers}" if progress.embedded else progress.brokers
    lines: list[RenderableType] = [
        Text.assemble(("orders", "bold"), f" -> topic {progress.topic}, {where} -> handlers.py"),
        Text.assemble(
            ("produced ", "dim"), f"{progress.report.produced:,}", ("   handled ", "dim"), f"{progress.tally.orders:,}"
        ),
        *_latest(progress),
        Text(),
    ]
    if progress.status is not None:
        lines.append(status_view(progress.status, width))
        lines.append(Text())
    lines.append(Text(progress.step, style="bold"))
    if progress.status is not None:
        folder = shlex.quote(str(progress.directory.path))
        lines.append(Text(f"from another terminal: kafkasrcd status -c {folder}/kafkasrcd.toml", style="dim"))
        lines.append(Text("or kill -9 one of the pids in the table, and see what happens", style="dim"))
    return Group(*lines)


def _latest(progress: DemoProgress) -> Iterator[Text]:
    latest = progress.tally.latest
    if latest is not None:
        yield Text.assemble(
            ("latest   ", "dim"),
            f"{latest.order_id} of {latest.user}, {_euros(latest.amount_cents)} EUR, "
            f"[{latest.partition}] offset {latest.offset:,}",
        )


def _summary(outcome: DemoOutcome) -> RenderableType:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", overflow="fold")
    report, tally = outcome.report, outcome.tally
    table.add_row("produced", f"{report.produced:,} orders, {_euros(report.cents)} EUR", "acknowledged by the broker")
    if outcome.backlog:
        table.add_row("found", f"{outcome.backlog:,} orders", "there before, not yet committed")
    handled = f"counted in {outcome.directory.handled}"
    table.add_row("handled", f"{tally.orders:,} orders, {_euros(tally.cents)} EUR", handled)
    for number, (end, committed) in sorted(outcome.offsets.items()):
        offset = "nothing" if committed is None else f"{committed:,}"
        table.add_row("committed" if number == 0 else "", offset, f"partition {number}, which ends at {end:,}")
    return Group(Text(), table, Text(), *_verdict(outcome), *_next_steps(outcome))


def _verdict(outcome: DemoOutcome) -> Iterator[Text]:
    behind = any(end != (committed or 0) for end, committed in outcome.offsets.values())
    if not (outcome.report.produced or outcome.tally.orders):
        yield Text("It was ended before the first order.", style="bold")
    elif outcome.shared:
        yield Text(f"Another member of the group {GROUP} has handled some of them.", style="bold")
    elif outcome.missing < 0:
        why = (
            f"{outcome.restarts} handler processes were started again, and what they were at came again"
            if outcome.restarts
            else "someone else produced too, or a process had been killed"
        )
        yield Text(f"Handled {-outcome.missing:,} more than produced: {why}.", style="bold")
    elif outcome.missing == 0 and not behind:
        yield Text("Every order was handled once, and that is committed.", style="bold green")


def _next_steps(outcome: DemoOutcome) -> Iterator[Text]:
    folder = outcome.directory.path
    yield Text(f"Look at {folder}: handlers.py, kafkasrcd.toml, handled/, daemon.log.")
    yield Text("Then yours: `kafkasrcd init` writes a configuration and a handler to start from.")


def _euros(cents: int) -> str:
    return f"{cents // 100:,}.{cents % 100:02d}"
