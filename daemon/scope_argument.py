"""The argument that says which partitions a command is about: ``orders``, ``orders:3``, ``orders:0-3,7``, ``--all``."""

import re
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, Final, TypeVar

import click

from kafkasrcd.storage.intents import Scope

R = TypeVar("R")

_TOPIC: Final = re.compile(r"[a-zA-Z0-9._-]{1,249}")
_RANGE: Final = re.compile(r"([0-9]{1,10})(?:-([0-9]{1,10}))?")
_MOST_PARTITION: Final = 2**31 - 1
_MOST_PARTITIONS: Final = 10_000
"""Of one argument: a slip of the hand, or a case for the whole topic."""


def with_scopes(command: Callable[..., R]) -> Callable[..., R]:
    """Give a command ``TOPIC[:PARTITIONS]`` and ``--all``, and what they lead to as ``scopes``: at least one, each
    once."""

    @click.argument("scopes", metavar="[TOPIC[:PARTITIONS]]...", nargs=-1, callback=_scopes)
    @click.option("--all", "everything", is_flag=True, help="All topics of the group.")
    @wraps(command)
    def with_options(*args: Any, **options: Any) -> R:
        everything: bool = options.pop("everything")
        scopes: tuple[Scope, ...] = options.pop("scopes")
        if everything == bool(scopes):
            raise click.UsageError("give --all, or topics as in orders, orders:3 or orders:0-3,7, and not both")
        return command(*args, scopes=scopes or (Scope(),), **options)

    return with_options


def _scopes(context: click.Context, argument: click.Parameter, texts: tuple[str, ...]) -> tuple[Scope, ...]:
    return tuple(dict.fromkeys(scope for text in texts for scope in _read(text)))


def _read(text: str) -> Iterator[Scope]:
    topic, colon, partitions = text.partition(":")
    if not _TOPIC.fullmatch(topic) or topic in {".", ".."}:
        raise click.BadParameter(f"{text!r}: {topic!r} cannot be a topic's name")
    if not colon:
        yield Scope(topic)
        return
    found = 0
    for part in partitions.split(","):
        numbers = _RANGE.fullmatch(part)
        first, last = (0, -1) if numbers is None else (int(numbers[1]), int(numbers[2] or numbers[1]))
        if not first <= last <= _MOST_PARTITION:
            raise click.BadParameter(f"{text!r}: {part!r} is no partition; expected numbers as in {topic}:3 or 0-3,7")
        found += last - first + 1
        if found > _MOST_PARTITIONS:
            raise click.BadParameter(f"{text!r} names more than {_MOST_PARTITIONS:,} partitions: give {topic} alone")
        yield from (Scope(topic, number) for number in range(first, last + 1))
