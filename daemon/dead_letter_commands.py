"""``kafkasrcd dead-letters``: looking at letters, and doing something about them.

All of it works beside a running daemon, and without one. None of it makes a store, or brings one up to date.
"""

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import click
import msgspec

from kafkasrcd.daemon.configuration_options import STORE_SETTINGS, with_configuration
from kafkasrcd.daemon.dead_letter_selection import in_words, refuse_both, with_filter, with_letter_ids
from kafkasrcd.daemon.existing_store import existing_store
from kafkasrcd.daemon.reason_option import reason_option
from kafkasrcd.daemon.who import who
from kafkasrcd.errors import KafkasrcdError
from kafkasrcd.storage.dead_letters import LetterFilter, LetterState, StoredLetter

if TYPE_CHECKING:
    from kafkasrcd.daemon.configuration import Configuration
    from kafkasrcd.settings import Settings
    from kafkasrcd.storage.dead_letter_store import DeadLetterStore

_LISTED: Final = 50
"""Of a table; a terminal holds no more."""
_ASKED_AT_ONCE: Final = 500
"""IDs in one statement, which has a limit."""
_NOT_OVER: Final = (LetterState.OPEN, LetterState.RETRYING, LetterState.REPLAYING)
_TWICE: Final = "their topic may have them already, and have them twice then"


def _to_topic(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    if text is None:
        return None
    if text.isdigit():
        raise click.BadParameter(f"{text!r} looks like an ID: IDs stand before --to-topic")
    if not text.isprintable():
        raise click.BadParameter("expected a topic's name")
    return text


yes_option = click.option("--yes", is_flag=True, help="Do not ask, where no IDs are given.")


@click.group()
def dead_letters() -> None:
    """Look at records that were not handled, and replay or discard them.

    They are those of the group in the configuration's offset store; beside a running daemon or without one.
    """


@dead_letters.command("list")
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line, for machines.")
@click.option(
    "--limit",
    type=click.IntRange(1),
    metavar="N",
    help=f"No more than this, the oldest. [default: {_LISTED}; with --json all]",
)
@with_configuration(only=STORE_SETTINGS)
@with_filter(states=tuple(LetterState), every_state=True)
def list_letters(configuration: "Configuration", wanted: LetterFilter, as_json: bool, limit: int | None) -> None:
    """List dead letters, a line each.

    With --json an object a line: version (1, and higher where a field is taken away or means something else), id,
    state, topic, partition, offset, timestamp_ms (the record's, -1 for none), error, reason, attempts, first_failed_ms,
    last_failed_ms, host, kafkasrcd, value_format, schema_id; changed_ms, changed_by and note of the last change;
    due_ms, when it is handled again, or null. Times are milliseconds since 1970.
    """
    with _opened(configuration) as store:
        if as_json:
            from kafkasrcd.daemon.dead_letter_lines import brief_line

            for stored in store.find(wanted, limit):
                click.echo(brief_line(stored))
            return
        found = list(store.find(wanted, limit or _LISTED))
        total = store.count(wanted)
        replaying = msgspec.structs.replace(wanted, states=(LetterState.REPLAYING,), has_due=False)
        left = store.count(replaying)
        given = store.count(msgspec.structs.replace(replaying, has_due=True))
    group_id = configuration.settings.group_id
    if found:
        from kafkasrcd.daemon.dead_letter_view import print_letters

        print_letters(found, states=wanted.states != (LetterState.OPEN,))
    else:
        click.echo(f"no {in_words(wanted, group_id)}")
    if total > len(found):
        click.echo(f"… and {total - len(found):,} more: --limit {total}")
    if given:
        click.echo(f"{_letters(given)} given to the daemon that has their partitions, to be handled again")
    if left:
        click.echo(
            f"! {_letters(left)} left replaying, by a command that was killed or still runs. `kafkasrcd "
            f"dead-letters replay --state replaying --to-topic` takes up again what was left: {_TWICE}"
        )


@dead_letters.command()
@click.argument("letter_id", metavar="ID", type=click.IntRange(1, 2**63 - 1))
@click.option("--json", "as_json", is_flag=True, help="As a line of `export`.")
@with_configuration(only=STORE_SETTINGS)
def show(configuration: "Configuration", letter_id: int, as_json: bool) -> None:
    """Show everything about one dead letter: record, error, traceback."""
    with _opened(configuration) as store:
        (stored,) = _named(store, [letter_id], configuration.settings.group_id)
    if as_json:
        from kafkasrcd.daemon.dead_letter_lines import whole_line

        click.echo(whole_line(stored))
    else:
        from kafkasrcd.daemon.dead_letter_view import print_letter

        print_letter(stored)


@dead_letters.command()
@with_letter_ids
@reason_option("Why; kept with the letter.")
@yes_option
@with_configuration(only=STORE_SETTINGS)
@with_filter(states=_NOT_OVER, every_state=False)
def discard(
    configuration: "Configuration", wanted: LetterFilter, letter_ids: tuple[int, ...], reason: str, yes: bool
) -> None:
    """Discard dead letters: by ID, or all that the filter means.

    They stay in the store as discarded, with the reason and who did it, and are not open any more.
    """
    refuse_both(letter_ids, wanted)
    group_id = configuration.settings.group_id
    with _opened(configuration) as store:
        chosen = _chosen(store, letter_ids, wanted, group_id)
        if not letter_ids and not _agreed("discard", in_words(wanted, group_id), "", len(chosen), yes):
            return
        by, done = who(), 0
        with _one_by_one("discarding", chosen) as letters:
            for letter_id in letters:
                done += store.change(letter_id, wanted.states, LetterState.DISCARDED, by=by, note=reason)
    click.echo(f"{_letters(done)} discarded")
    _complain_unless_all(done, len(chosen), "discarded")


@dead_letters.command()
@with_letter_ids
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Into a new file that only its owner may read. [default: standard output]",
)
@with_configuration(only=STORE_SETTINGS)
@with_filter(states=tuple(LetterState), every_state=True)
def export(
    configuration: "Configuration", wanted: LetterFilter, letter_ids: tuple[int, ...], output: Path | None
) -> None:
    """Write whole dead letters as JSON lines.

    Each is as of `list --json`, and has besides: traceback; key and value in base64, or null; headers, an array of
    [name, value in base64 or null].
    """
    from kafkasrcd.daemon.dead_letter_lines import whole_line
    from kafkasrcd.daemon.progress_bar import progress_bar

    refuse_both(letter_ids, wanted)
    with _opened(configuration) as store:
        found: Iterable[StoredLetter]
        found = _named(store, letter_ids, configuration.settings.group_id) if letter_ids else store.find(wanted)
        total = len(letter_ids) or store.count(wanted)
        # Lines on the terminal show how far it is themselves.
        shown = 0 if output is None and sys.stdout.isatty() else total
        with _file(output) as file, progress_bar("exporting", shown) as done:
            for stored in found:
                file.write(whole_line(stored) + b"\n")
                done()


@dead_letters.command()
@with_letter_ids
@click.option(
    "--to-topic",
    is_flag=False,
    flag_value="",
    callback=_to_topic,
    metavar="[TOPIC]",
    help="Produce each record as it was into its own topic, or into this one; {topic} stands for its own. IDs before.",
)
@click.option("--no-wait", is_flag=True, help="Leave them to the daemon, and do not wait for what becomes of them.")
@yes_option
@with_configuration()
@with_filter(states=_NOT_OVER, every_state=False)
def replay(
    configuration: "Configuration",
    wanted: LetterFilter,
    letter_ids: tuple[int, ...],
    to_topic: str | None,
    no_wait: bool,
    yes: bool,
) -> None:
    """Have the records of dead letters handled again: by ID, or all that the filter means.

    By the handler, in the daemon that has their partitions: beside the records that come, in the order and the
    transactions of these, once. Each letter is replayed then, or open again, with what the handler raised. A command
    that ends, however it ends, leaves them to the daemon.

    --to-topic produces each as it was: key, value, own headers, timestamp; in its own topic into its own partition.
    Each letter is replayed once brokers have the record, or open again, with the reason. One whose command was killed
    stays replaying: `--state replaying` takes it up again, which may produce it twice. Exits with 1 where a letter was
    not replayed, with 69 where no broker answers.
    """
    refuse_both(letter_ids, wanted)
    if no_wait and to_topic is not None:
        raise click.UsageError("--no-wait leaves letters to the daemon, and --to-topic does not: give one of the two")
    settings = configuration.settings
    with _opened(configuration) as store:
        chosen = _chosen(store, letter_ids, wanted, settings.group_id)
        if LetterState.REPLAYING in wanted.states and chosen:
            click.echo(f"! {_letters(len(chosen))} left replaying: {_TWICE}", err=True)
        into = " through the handler"
        if to_topic is not None:
            into = f" into topic {to_topic}" if to_topic else " into their own topics"
        if not letter_ids and not _agreed("replay", in_words(wanted, settings.group_id), into, len(chosen), yes):
            return
        if to_topic is None:
            _hand_over(store, chosen, wanted.states[0], wait=not no_wait)
        else:
            _produce(store, chosen, wanted.states[0], to_topic, settings)


def _hand_over(store: "DeadLetterStore", chosen: Sequence[int], before: LetterState, *, wait: bool) -> None:
    from kafkasrcd.daemon.dead_letter_handover import Handover
    from kafkasrcd.daemon.progress_bar import progress_bar
    from kafkasrcd.daemon.stop_between import stop_between_steps

    handover = Handover(store, _command(), _say)
    given = handover.give(chosen, before)
    if not wait:
        click.echo(f"{_letters(given)} given to the daemon")
        return
    with stop_between_steps() as stopped, progress_bar("replaying", given) as done:
        handover.wait(done, stopped)
    replayed, left = handover.count(LetterState.REPLAYED), handover.count(LetterState.REPLAYING)
    _summary(replayed)
    if left:
        raise KafkasrcdError(
            f"{_letters(left)} of {len(chosen):,} not replayed yet, and left to the daemon; "
            "`kafkasrcd dead-letters list --state replaying` has them"
        )
    _complain_unless_all(replayed, len(chosen), "replayed: `kafkasrcd dead-letters list` has the open ones, and why")


def _produce(
    store: "DeadLetterStore", chosen: Sequence[int], before: LetterState, to_topic: str, settings: "Settings"
) -> None:
    from kafkasrcd.daemon.dead_letter_producer import LetterProducer
    from kafkasrcd.daemon.dead_letter_replay import Outcome, Replay
    from kafkasrcd.workers.dead_letter_topic import topic_of

    producer = LetterProducer(settings)
    replaying = Replay(store, producer, _command(), lambda letter: topic_of(to_topic or "{topic}", letter.topic), _say)
    outcomes: Counter[Outcome] = Counter()
    try:
        with _one_by_one("replaying", chosen) as letters:
            for letter_id in letters:
                outcomes[replaying.replay(letter_id, before)] += 1
    except KafkasrcdError:
        _summary(outcomes[Outcome.REPLAYED])
        raise
    _summary(outcomes[Outcome.REPLAYED])
    _complain_unless_all(outcomes[Outcome.REPLAYED], len(chosen), "replayed")


def _opened(configuration: "Configuration") -> "AbstractContextManager[DeadLetterStore]":
    """The group's letters; as ``existing_store``."""
    from kafkasrcd.storage.opening import open_dead_letters

    return existing_store(configuration, open_dead_letters)


def _named(store: "DeadLetterStore", letter_ids: Sequence[int], group_id: str) -> list[StoredLetter]:
    """Each once. Raises KafkasrcdError where one is not there."""
    ids = sorted(set(letter_ids))
    found: list[StoredLetter] = []
    for at in range(0, len(ids), _ASKED_AT_ONCE):
        found += store.find(LetterFilter(ids=tuple(ids[at : at + _ASKED_AT_ONCE])))
    missing = sorted(set(ids) - {stored.id for stored in found})
    if missing:
        raise KafkasrcdError(
            f"group {group_id!r} has no dead letter {', '.join(map(str, missing[:5]))}"
            f"{' and others' if len(missing) > 5 else ''}: `kafkasrcd dead-letters list --state all` has all there are"
        )
    return found


def _chosen(store: "DeadLetterStore", letter_ids: Sequence[int], wanted: LetterFilter, group_id: str) -> list[int]:
    """What a command is about, before it begins. Raises KafkasrcdError where a named one is in another state."""
    if not letter_ids:
        return store.ids(wanted)
    from kafkasrcd.daemon.dead_letter_view import moment

    found = _named(store, letter_ids, group_id)
    for stored in found:
        if stored.state not in wanted.states:
            by = f" by {stored.changed_by}" if stored.changed_by else ""
            cure = f"; --state {stored.state} takes it" if stored.state in _NOT_OVER else ""
            raise KafkasrcdError(
                f"dead letter {stored.id} is {stored.state}, since {moment(stored.changed_ms)}{by}, and not "
                f"{' or '.join(wanted.states)}{cure}; nothing was changed"
            )
    return [stored.id for stored in found]


def _agreed(verb: str, what: str, into: str, count: int, yes: bool) -> bool:
    """Whether to do it to those; False where there are none. Raises click.Abort after a no."""
    if not count:
        click.echo(f"no {what}: nothing to {verb}")
        return False
    if yes:
        return True
    if not sys.stdin.isatty():
        raise click.UsageError(f"{verb} {count:,} {what}{into}? Nobody can be asked: add --yes, or name IDs")
    return click.confirm(f"{verb} {count:,} {what}{into}?", abort=True, err=True)


@contextlib.contextmanager
def _one_by_one(doing: str, ids: Sequence[int]) -> Generator[Iterator[int]]:
    """Each of ``ids``, until someone says to stop; then what is in hand is finished first."""
    from kafkasrcd.daemon.progress_bar import progress_bar
    from kafkasrcd.daemon.stop_between import stop_between_steps

    with stop_between_steps() as stopped, progress_bar(doing, len(ids)) as done:

        def each() -> Iterator[int]:
            for letter_id in ids:
                if stopped():
                    return
                yield letter_id
                done()

        yield each()


def _complain_unless_all(done: int, wanted: int, what: str) -> None:
    if done < wanted:
        raise KafkasrcdError(f"{_letters(wanted - done)} of {wanted:,} not {what}")


def _summary(replayed: int) -> None:
    click.echo(f"{_letters(replayed)} replayed")


def _say(line: str) -> None:
    click.echo(f"kafkasrcd: {line}", err=True)


def _letters(count: int) -> str:
    return f"{count:,} dead letter{'' if count == 1 else 's'}"


def _command() -> str:
    """Names this command, and no other."""
    return f"{who()}, pid {os.getpid()} at {time.strftime('%Y-%m-%dT%H:%M:%S%z')}"


@contextlib.contextmanager
def _file(path: Path | None) -> Generator[IO[bytes]]:
    """Standard output, or a new file; one that is not complete is taken away again."""
    if path is None:
        yield sys.stdout.buffer
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise KafkasrcdError(f"{path} is there already, and is not written over: name another file") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # whoever discards next has it
    except BaseException:
        path.unlink(missing_ok=True)
        raise
