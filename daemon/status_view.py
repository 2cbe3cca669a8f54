"""The status for people: what is wrong first, then a line a partition."""

import time
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from kafkasrcd.daemon.status import PartitionStatus, Status
from kafkasrcd.storage.intents import Scope

_PIPE_WIDTH: Final = 1_000
"""Into a pipe or a file goes everything, at the width it has."""

_MOST_LETTER_LINES: Final = 5
"""Of kinds of dead letters; what is wrong with the daemon must not scroll away."""


def print_status(status: Status) -> None:
    """Print it once to standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    # Sentences are not broken: a terminal does that itself, and grep finds a line that is one.
    console.print(status_view(status, width=console.width), soft_wrap=True)


def status_view(status: Status, width: int) -> RenderableType:
    """The whole status; wide terminals have more columns."""
    lines: list[RenderableType] = [_headline(status), *(_problem(problem) for problem in status.problems)]
    lines += [
        _problem(
            f"{partition.topic}[{partition.partition}] {partition.state} {_since(partition, status)}: "
            f"{partition.problem}"
        )
        for partition in status.partitions
        if partition.problem
    ]
    lines += _pauses(status)
    lines += _dead_letters(status)
    if status.partitions:
        lines.append(_partitions(status, wide=width >= 156))
    lines.append(_processes(status))
    return Group(*lines)


def _headline(status: Status) -> Text:
    rate = sum(partition.rate for partition in status.partitions)
    lag = sum(partition.lag or 0 for partition in status.partitions)
    troubled = len(status.problems) + sum(1 for partition in status.partitions if partition.problem)
    health = ("bold red", f"{troubled} problem{'s' if troubled > 1 else ''}") if troubled else ("bold green", "healthy")
    return Text.assemble(
        (f"{status.group_id} ", "bold"),
        (f"{status.state}", ""),
        ", ",
        (health[1], health[0]),
        f": {len(status.partitions)} partitions, {rate:,.0f} msg/s, lag {lag:,}",
    )


def _problem(text: str) -> Text:
    return Text.assemble(("! ", "bold red"), text)


def _pauses(status: Status) -> list[RenderableType]:
    """As they were told: a topic's once. The breaker's is a problem, and stands there already."""
    told = {
        partition.paused.scope: partition.paused
        for partition in status.partitions
        if partition.paused is not None and partition.paused.reason not in partition.problem
    }
    return [
        _notice(
            f"{'all topics' if pause.scope == str(Scope()) else pause.scope} paused by {pause.by} since "
            f"{_clock(pause.since_ms, status.now_ms)}: {pause.reason} — {pause.way_on}"
        )
        for pause in told.values()
    ]


def _dead_letters(status: Status) -> list[RenderableType]:
    """Nothing is wrong with the daemon where there are some; someone has to look all the same."""
    lines: list[RenderableType] = []
    for found in status.dead_letters[:_MOST_LETTER_LINES]:
        letters = f"{found.count:,} dead letter{'s' if found.count > 1 else ''}"
        lines.append(_notice(f"{letters} of {found.topic}: {found.error} (kafkasrcd dead-letters list)"))
    others = status.dead_letters[_MOST_LETTER_LINES:]
    if others:
        rest = f"{sum(found.count for found in others):,} dead letters"
        lines.append(_notice(f"{rest} of other topics and errors (kafkasrcd dead-letters list)"))
    if status.retrying:
        records = f"{sum(found.count for found in status.retrying):,} records are put aside, to be tried again"
        most = status.retrying[0]
        why = f"{most.error} of {most.topic}" if len(status.retrying) == 1 else f"most for {most.error} of {most.topic}"
        lines.append(_notice(f"{records}: {why} (kafkasrcd dead-letters list --state retrying)"))
    return lines


def _notice(text: str) -> Text:
    return Text.assemble(("! ", "bold yellow"), text)


def _partitions(status: Status, *, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("partition", no_wrap=True)
    table.add_column("state", no_wrap=True)
    names = ["processed", "committed", "lag", "msg/s"]
    if wide:
        names = [
            "position",
            *names,
            "messages",
            "failed",
            "skipped",
            "dead",
            "MB",
            "commit",
            "handler",
            "worker",
            "cpu%",
            "MB rss",
            "restarts",
        ]
    else:
        names += ["failed", "pid", "cpu%"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for partition in status.partitions:
        table.add_row(
            f"{partition.topic}[{partition.partition}]",
            Text(partition.state, style=_STATE_STYLES.get(partition.state, "")),
            *_figures(partition, status, wide=wide),
        )
    return table


def _figures(partition: PartitionStatus, status: Status, *, wide: bool) -> list[str]:
    worker = partition.worker
    core = [
        _offset(partition.processed),
        _offset(partition.committed),
        _offset(partition.lag),
        f"{partition.rate:,.0f}",
    ]
    if not wide:
        return [*core, f"{partition.failures:,}", _offset_plain(worker.pid), f"{worker.cpu_percent:.0f}"]
    commit = "-" if partition.last_commit_ms is None else _duration(status.now_ms - partition.last_commit_ms)
    return [
        _offset(partition.position),
        *core,
        f"{partition.messages:,}",
        f"{partition.failures:,}",
        f"{partition.skipped:,}",
        f"{partition.dead_lettered:,}",
        f"{partition.bytes / 1e6:,.1f}",
        commit,
        "all" if len(partition.handlers) > 1 else "".join(map(str, partition.handlers)) or "-",
        _offset_plain(worker.pid),
        f"{worker.cpu_percent:.0f}",
        f"{worker.rss_bytes / 1e6:.0f}",
        str(worker.restarts),
    ]


def _processes(status: Status) -> Text:
    """The supervisor, then a line a handler process."""
    lines = [
        f"supervisor: pid {status.pid}, up {_duration(status.now_ms - status.started_ms)}, "
        f"{status.total_commits:,} commits, {status.rebalances} rebalances"
    ]
    for handler in status.handlers:
        pid = _offset_plain(handler.pid)
        lines.append(
            f"handler {handler.slot}: {handler.state}, pid {pid}, {handler.partitions} partitions, "
            f"{handler.cpu_percent:.0f}% cpu, {handler.rss_bytes / 1e6:.0f} MB, {handler.restarts} restarts"
        )
    return Text("\n".join(lines), style="dim")


_STATE_STYLES = {"running": "green", "failed": "bold red", "lost": "red", "draining": "yellow", "paused": "yellow"}


def _offset(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _offset_plain(value: int | None) -> str:
    return "-" if value is None else str(value)


def _since(partition: PartitionStatus, status: Status) -> str:
    return f"since {_clock(partition.since_ms, status.now_ms)} ({_duration(status.now_ms - partition.since_ms)})"


def _clock(at_ms: int, now_ms: int) -> str:
    """A time of day, with the day where it is not this one."""
    at, now = time.localtime(at_ms / 1000), time.localtime(now_ms / 1000)
    return time.strftime("%H:%M:%S" if at[:3] == now[:3] else "%Y-%m-%d %H:%M:%S", at)


def _duration(milliseconds: float) -> str:
    seconds = max(0, int(milliseconds / 1000))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
