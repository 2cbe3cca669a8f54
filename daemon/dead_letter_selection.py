"""Which dead letters a command means: the options they have in common."""

import re
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import wraps
from typing import Any, Final, TypeVar

import click

from kafkasrcd.storage.dead_letters import LetterFilter, LetterState

R = TypeVar("R")

ALL: Final = "all"
_UNIT_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_MOST_ID: Final = 2**63 - 1
_MOST_PARTITION: Final = 2**31 - 1


def with_letter_ids(command: Callable[..., R]) -> Callable[..., R]:
    """Give a command the argument ``letter_ids``, any number of them."""
    return click.argument("letter_ids", metavar="[ID]...", nargs=-1, type=click.IntRange(1, _MOST_ID))(command)


def with_filter(*, states: Sequence[LetterState], every_state: bool) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Give a command ``--topic`` and the like, and what they lead to, a LetterFilter, as ``wanted``.

    ``--state`` is one of ``states``, the first where it is not given; with ``every_state`` also ``all``.
    """
    names = [state.value for state in states] + ([ALL] if every_state else [])

    def decorate(command: Callable[..., R]) -> Callable[..., R]:
        @click.option("--topic", callback=_text, metavar="TOPIC", help="Records of this topic only.")
        @click.option(
            "--partition", type=click.IntRange(0, _MOST_PARTITION), metavar="N", help="Of this partition only."
        )
        @click.option("--error", callback=_text, metavar="CLASS", help="With this error only, as `list` has it.")
        @click.option(
            "--since",
            "since_ms",
            callback=_since,
            metavar="TIME",
            help="Failed since then only: 30m, 2h or 7d ago, or a time with its zone, as in 2026-01-31T12:00:00Z.",
        )
        @click.option(
            "--state", type=click.Choice(names), default=names[0], show_default=True, help="In this state only."
        )
        @wraps(command)
        def with_options(*args: Any, **options: Any) -> R:
            state: str = options.pop("state")
            wanted = LetterFilter(
                topic=options.pop("topic"),
                partition=options.pop("partition"),
                error=options.pop("error"),
                since_ms=options.pop("since_ms"),
                states=() if state == ALL else (LetterState(state),),
            )
            return command(*args, wanted=wanted, **options)

        return with_options

    return decorate


def refuse_both(letter_ids: Sequence[int], wanted: LetterFilter) -> None:
    """IDs name letters already: with filters beside them nobody knows what was meant. Raises UsageError."""
    if letter_ids and wanted != LetterFilter(states=wanted.states):
        raise click.UsageError("give IDs, or --topic, --partition, --error and --since, and not both")


def in_words(wanted: LetterFilter, group_id: str) -> str:
    """``open dead letters of group 'billing' with topic orders``."""
    states = " or ".join(state.value for state in wanted.states)
    parts = [
        *([f"topic {wanted.topic}"] if wanted.topic is not None else []),
        *([f"partition {wanted.partition}"] if wanted.partition is not None else []),
        *([f"error {wanted.error}"] if wanted.error is not None else []),
        *([f"failed since {_moment(wanted.since_ms)}"] if wanted.since_ms is not None else []),
    ]
    return f"{states + ' ' if states else ''}dead letters of group {group_id!r}" + (
        f" with {', '.join(parts)}" if parts else ""
    )


def _moment(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000).astimezone().isoformat(timespec="seconds")


def _since(context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    ago = re.fullmatch(r"([0-9]{1,9})([smhd])", text.strip())
    if ago is not None:
        return max(0, int((time.time() - int(ago[1]) * _UNIT_SECONDS[ago[2]]) * 1000))
    try:
        at = datetime.fromisoformat(text.strip())
    except ValueError:
        raise click.BadParameter(f"{text!r} is no time: 30m, 2h or 7d ago, or as in 2026-01-31T12:00:00Z") from None
    if at.tzinfo is None:
        raise click.BadParameter(f"{text!r} has no time zone: end it with Z, or as in +01:00")
    try:
        return max(0, int(at.timestamp() * 1000))
    except OverflowError:
        raise click.BadParameter(f"{text!r} is out of range") from None


def _text(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    """What a database can be asked for."""
    if text is not None and ("\0" in text or not text.isprintable()):
        raise click.BadParameter("expected a name in printable characters")
    return text
