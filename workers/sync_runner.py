"""Runs plain (not ``async``) handlers: one record, or one batch, at a time in this process."""

import select
from itertools import islice, repeat
from time import CLOCK_BOOTTIME, clock_gettime_ns
from typing import Any, Final

from kafkasrcd.errors import KafkasrcdError, RingCorrupted
from kafkasrcd.message import Message
from kafkasrcd.storage.dead_letters import DeadLetter, Redelivered
from kafkasrcd.workers.clock import boottime_ns
from kafkasrcd.workers.commits import HeldUp
from kafkasrcd.workers.cursor import PartitionCursor
from kafkasrcd.workers.handler_bindings import IDLE_MS, LEASE_WAIT_MS, HandlerBindings, lease_wait_ms
from kafkasrcd.workers.handler_target import refuse_awaitable
from kafkasrcd.workers.partition_memory import LEASE
from kafkasrcd.workers.redelivery import Redelivery
from kafkasrcd.workers.ring import BURYING, CALLED_AT, HANDLED, IN_FLIGHT, LETTER, PROCESSED, STARTED

_TURN_NS: Final = 10_000_000
"""A partition's turn while others wait: a thousand no-op records, or one slow one."""


def run(bindings: HandlerBindings) -> None:
    """Serve the partitions in turns until told to end."""
    poller = select.poll()
    poller.register(bindings.bell, select.POLLIN)
    poller.register(bindings.channel, select.POLLIN)
    while bindings.receive():
        wait_ms = IDLE_MS
        for cursor in bindings.cursors():
            wait_ms = min(wait_ms, _turn(bindings, cursor))
        wait_ms = min(wait_ms, bindings.commits.turn())
        if wait_ms:
            if bindings.await_frames():
                poller.poll(wait_ms)
            bindings.awake()
    bindings.commits.end()


def _turn(bindings: HandlerBindings, cursor: PartitionCursor) -> float:
    """One partition's turn; milliseconds until its next, 0 where there is more to do now."""
    cursor.release_done()  # what message.commit() has moved meanwhile
    if cursor.failed is not None:
        return IDLE_MS
    if not cursor.memory.leased:
        return lease_wait_ms(cursor)
    if cursor.retry_at_ns:
        waiting_ns = cursor.retry_at_ns - boottime_ns()
        if waiting_ns > 0:
            return waiting_ns / 1e6
        cursor.retry_at_ns = 0
    try:
        if cursor.letter is not None:
            return _bury(bindings, cursor, cursor.letter)
        if cursor.due:
            _redeliver(bindings, cursor)
        if cursor.retry_at_ns:
            return 0
        wait_ms = _one_batch(bindings, cursor) if cursor.target.is_batch else _single_records(cursor)
        return 0 if cursor.due else wait_ms
    except RingCorrupted as error:
        bindings.report_broken(cursor, error)
        return IDLE_MS
    except HeldUp:
        return 0
    finally:
        bindings.report_failed(cursor)


def _single_records(cursor: PartitionCursor) -> float:
    """The hot path: what can be is a local name, and a good record pays for its own checks only."""
    if not cursor.load() or cursor.columns is None:
        return IDLE_MS
    columns = cursor.columns
    function = cursor.call
    decode = cursor.target.decode
    cells = cursor.cells
    lease = cursor.lease_cells
    topic = cursor.topic
    partition = cursor.partition
    first = index = cursor.index
    handled_before = cells[HANDLED] - first
    given_up = 0
    wait_ms = 0.0
    turn_ends = boottime_ns() + _TURN_NS
    nothing: repeat[bytes | None] = repeat(None)
    values: Any = columns.values
    keys, all_headers = columns.keys or nothing, columns.headers or nothing
    records = zip(columns.offsets, values, keys, columns.timestamps, all_headers, strict=False)
    for offset, value, key, timestamp, headers in islice(records, first, None):
        cells[IN_FLIGHT] = offset
        # The clock is read after the store above: see PartitionMemory.in_flight.
        now = clock_gettime_ns(CLOCK_BOOTTIME)
        if now >= lease[LEASE]:
            wait_ms = LEASE_WAIT_MS
            break
        if now >= turn_ends:
            break
        try:
            payload = None if value is None else decode(value)
        except Exception as error:  # noqa: BLE001 - whatever the decoder raises is about the record
            cursor.letter = cursor.undecodable(columns, index, error)
            given_up = cursor.failed is None
            break
        try:
            returned = function(Message(payload, key, topic, partition, offset, timestamp, headers))
            if returned is not None:
                refuse_awaitable(returned)
        except HeldUp:
            if cursor.columns is columns:  # not rewound
                cursor.index = index
                cursor.put_back()
            raise
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything
            backoff_ns = cursor.raised([offset], error)
            if backoff_ns is not None:
                cursor.retry_at_ns = boottime_ns() + backoff_ns
            else:
                cursor.letter = cursor.give_up(columns, index, error)
                given_up = cursor.failed is None
            break
        index += 1
        cells[HANDLED] = handled_before + index
        cells[PROCESSED] = offset + 1
    cursor.put_back()
    cursor.index = index + given_up
    cursor.release_done()
    return wait_ms


def _bury(bindings: HandlerBindings, cursor: PartitionCursor, letter: DeadLetter) -> float:
    """Keep the dead letter of the record that was given up; nothing after it is handled before."""
    cursor.cells[IN_FLIGHT] = letter.offset
    if not cursor.memory.leased:
        cursor.put_back()
        return LEASE_WAIT_MS
    cursor.cells[BURYING] = 1
    try:
        letter = cursor.whole(letter)
        bindings.commits.bury(cursor, letter)
    except HeldUp:
        cursor.put_back()
        raise
    except KafkasrcdError as error:
        cursor.put_back()
        cursor.retry_at_ns = boottime_ns() + bindings.letter_refused(cursor, letter, error)
    else:
        bindings.letter_buried(cursor, letter)
        cursor.put_back()
    finally:
        cursor.cells[BURYING] = 0
    return 0


def _redeliver(bindings: HandlerBindings, cursor: PartitionCursor) -> None:
    """The first letter that is due: its record is handled, and what became of it written down."""
    cells, due = cursor.cells, cursor.due[0]
    cells[LETTER] = due.id
    cells[BURYING] = 1
    cells[IN_FLIGHT] = cells[PROCESSED]
    try:
        if not cursor.memory.leased:
            return
        if cursor.redelivery is None:
            found = bindings.commits.letter(cursor, due.id)
            cursor.redelivery = bindings.redeliveries.take(cursor, due, found)
        letter = cursor.redelivery
        if letter is not None:
            outcome = letter.outcome or letter.read() or _call_again(cursor, letter)
            letter.settled(ours=bindings.commits.settle(cursor, outcome))
            bindings.letter_written(cursor)
    except HeldUp:
        cursor.redelivery = None
        raise
    except KafkasrcdError as error:
        if cursor.redelivery is not None and cursor.redelivery.outcome is not None:
            what = f"what became of {cursor.redelivery.what} cannot be written down"
            cursor.retry_at_ns = boottime_ns() + bindings.not_written(cursor, what, error)
        else:
            bindings.letter_waits(cursor, due.id, error)
            _next_letter(bindings, cursor, dropped=True)
    else:
        _next_letter(bindings, cursor, dropped=letter is None)
    finally:
        cells[BURYING] = cells[LETTER] = 0
        cursor.put_back()


def _call_again(cursor: PartitionCursor, letter: Redelivery) -> Redelivered:
    cells = cursor.cells
    cells[CALLED_AT] = boottime_ns()
    cells[BURYING] = 0
    try:
        refuse_awaitable(cursor.call(letter.argument))
    except HeldUp:
        raise
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        return letter.raised(error)
    finally:
        cells[CALLED_AT] = 0
        cells[BURYING] = 1
    return letter.handled()


def _next_letter(bindings: HandlerBindings, cursor: PartitionCursor, *, dropped: bool) -> None:
    cursor.redelivery = None
    cursor.due.popleft()
    bindings.letter_done(cursor, dropped=dropped)


def _one_batch(bindings: HandlerBindings, cursor: PartitionCursor) -> float:
    batch = bindings.batch(cursor)
    due_ns = batch.gather()
    if cursor.letter is not None:
        return 0
    if due_ns:
        return IDLE_MS if due_ns < 0 else due_ns / 1e6
    messages = batch.messages
    cursor.cells[STARTED] = max(cursor.cells[STARTED], messages[-1].offset + 1)
    cursor.cells[IN_FLIGHT] = messages[0].offset
    if not cursor.memory.leased:
        cursor.put_back()
        return LEASE_WAIT_MS
    try:
        refuse_awaitable(cursor.call(messages))
    except HeldUp:
        raise
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        batch.raised(error)
    else:
        batch.succeeded()
    return 0
