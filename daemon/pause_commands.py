"""``kafkasrcd pause`` and ``resume``: what they say is kept in the offset store, and daemons look there.

Beside running daemons, wherever they run, and without one. Neither makes a store, or brings one up to date.
"""

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import click

from kafkasrcd.daemon.configuration_options import STORE_SETTINGS, with_configuration
from kafkasrcd.daemon.existing_store import existing_store
from kafkasrcd.daemon.reason_option import reason_option
from kafkasrcd.daemon.scope_argument import with_scopes
from kafkasrcd.daemon.who import who
from kafkasrcd.errors import KafkasrcdError
from kafkasrcd.storage.intents import WHOLE_TOPIC, Intent, IntentKind, Scope

if TYPE_CHECKING:
    from kafkasrcd.daemon.configuration import Configuration
    from kafkasrcd.storage.intent_store import IntentStore
    from kafkasrcd.storage.offset_store import TopicPartition


@click.command()
@with_scopes
@reason_option("Why, for who looks at `kafkasrcd status`.")
@with_configuration(only=STORE_SETTINGS)
def pause(configuration: "Configuration", scopes: tuple[Scope, ...], reason: str) -> None:
    """Pause partitions of the group, as in `pause orders:0-3,7` or `pause orders`, until `kafkasrcd resume`.

    What handlers hold is finished, and no further record is begun, within about a second and on whichever host. The
    partitions stay assigned; other ones go on. A pause lasts through restarts and rebalances, and may be given while
    nothing runs.
    """
    with _opened(configuration) as store:
        known = store.partitions()
        now_ms = int(time.time() * 1000)
        store.set(
            Intent(kind=IntentKind.PAUSE, scope=scope, set_by=who(), set_ms=now_ms, reason=reason) for scope in scopes
        )
    for scope in scopes:
        click.echo(f"{_named(scope)} paused")
    strange = [str(scope) for scope in scopes if not _is_known(scope, known)]
    if strange:
        click.echo(
            f"kafkasrcd: group {configuration.settings.group_id!r} has not worked on {_listed(strange)} so far; paused "
            "all the same, for when it does",
            err=True,
        )


@click.command()
@with_scopes
@with_configuration(only=STORE_SETTINGS)
def resume(configuration: "Configuration", scopes: tuple[Scope, ...]) -> None:
    """Have paused partitions go on where they stood, whoever paused them.

    A topic's name stands for its partitions, too, and --all for everything that is paused. Exits with 1 where a
    partition stays paused, since all of its topic is.
    """
    with _opened(configuration) as store:
        cleared = store.clear(IntentKind.PAUSE, scopes)
        left = {intent.scope: intent for intent in store.intents() if intent.kind is IntentKind.PAUSE}
    for intent in cleared:
        click.echo(f"{_named(intent.scope)} resumed; paused by {intent.set_by}: {intent.reason}")
    kept: list[str] = []
    for scope in scopes:
        around = [left[each] for each in scope.around() if each in left]
        if around:
            kept.append(
                f"{scope} stays paused, with {_named(around[0].scope)}, by {around[0].set_by}: {around[0].reason}; "
                f"`kafkasrcd resume {around[0].scope}` ends that"
            )
        elif not any(scope in intent.scope.around() for intent in cleared):
            click.echo("nothing was paused" if scope == Scope() else f"{scope} was not paused")
    if kept:
        raise KafkasrcdError("\n".join(kept))


def _named(scope: Scope) -> str:
    return "all topics" if scope == Scope() else str(scope)


def _is_known(scope: Scope, partitions: "Iterable[TopicPartition]") -> bool:
    return scope == Scope() or any(
        each.topic == scope.topic and scope.partition in (WHOLE_TOPIC, each.partition) for each in partitions
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" and others" if len(names) > 5 else "")


def _opened(configuration: "Configuration") -> "AbstractContextManager[IntentStore]":
    """The group's intents; as ``existing_store``."""
    from kafkasrcd.storage.opening import open_intents

    return existing_store(configuration, open_intents)
