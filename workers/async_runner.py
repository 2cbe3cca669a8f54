"""Runs ``async def`` handlers: the partitions of this process concurrently on one event loop, each one record (or one
batch) at a time.

A plain handler for another topic of the same configuration is called on the loop, and holds up the others while it
runs.
"""

import asyncio
from typing import Any, Final

from kafkasrcd.errors import HandlerError, RingCorrupted
from kafkasrcd.message import Message
from kafkasrcd.workers.clock import boottime_ns
from kafkasrcd.workers.cursor import PartitionCursor
from kafkasrcd.workers.handler_bindings import IDLE_MS, LEASE_WAIT_MS, HandlerBindings
from kafkasrcd.workers.handler_target import HandlerTarget, refuse_awaitable
from kafkasrcd.workers.ring import IN_FLIGHT

_TURN_NS: Final = 10_000_000
"""How long one partition may keep the loop where its handler never waits."""


async def run(bindings: HandlerBindings) -> None:
    """Serve the partitions until told to end."""
    loop = asyncio.get_running_loop()
    wake = asyncio.Event()
    loop.add_reader(bindings.bell, wake.set)
    loop.add_reader(bindings.channel.fileno(), wake.set)
    tasks: dict[int, asyncio.Task[None]] = {}
    bells: dict[int, asyncio.Event] = {}
    while bindings.receive():
        for task in tasks.values():
            if task.done():
                task.result()  # a defect: not one partition that stands still in silence, but an end that is seen
        bound = {cursor.binding: cursor for cursor in bindings.cursors()}
        for binding in tasks.keys() - bound.keys():
            tasks.pop(binding).cancel()
            del bells[binding]
        for binding in bound.keys() - tasks.keys():
            bells[binding] = asyncio.Event()
            tasks[binding] = asyncio.create_task(_serve(bindings, bound[binding], bells[binding]))
            tasks[binding].add_done_callback(lambda _: wake.set())
        bindings.awake()
        for bell in bells.values():
            bell.set()
        wake.clear()
        await wake.wait()
    for task in tasks.values():
        task.cancel()


async def _serve(bindings: HandlerBindings, cursor: PartitionCursor, bell: asyncio.Event) -> None:
    """One partition, for as long as it is bound."""
    while True:
        try:
            wait_ms = await _turn(bindings, cursor)
        except RingCorrupted as error:
            bindings.report_broken(cursor, error)
            return
        if cursor.failed is not None:
            bindings.report_failed(cursor)
            return
        bell.clear()
        if wait_ms and (cursor.held_back or cursor.reader.await_frame()):
            try:
                await asyncio.wait_for(bell.wait(), wait_ms / 1000)
            except TimeoutError:
                pass
        else:
            await asyncio.sleep(0)
        cursor.reader.awake()


async def _turn(bindings: HandlerBindings, cursor: PartitionCursor) -> float:
    if not cursor.memory.leased:
        return LEASE_WAIT_MS
    if cursor.retry_at_ns:
        waiting_ns = cursor.retry_at_ns - boottime_ns()
        if waiting_ns > 0:
            return waiting_ns / 1e6
        cursor.retry_at_ns = 0
    return await (_one_batch(bindings, cursor) if cursor.target.is_batch else _single_records(cursor))


async def _call(target: HandlerTarget, argument: object) -> None:
    if not target.is_async:
        refuse_awaitable(target.function(argument))
        return
    try:
        await target.function(argument)
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # Nobody cancelled this partition: something that the handler waited for was.
        raise HandlerError("what it waited for was cancelled") from error


async def _single_records(cursor: PartitionCursor) -> float:
    turn_ends = boottime_ns() + _TURN_NS
    while boottime_ns() < turn_ends:
        if not cursor.load() or cursor.columns is None:
            return IDLE_MS
        columns = cursor.columns
        index = cursor.index
        offset = columns.offsets[index]
        value: Any = columns.values[index]
        cursor.cells[IN_FLIGHT] = offset
        if not cursor.memory.leased:
            cursor.put_back()
            return LEASE_WAIT_MS
        try:
            payload = None if value is None else cursor.target.decode(value)
        except Exception as error:  # noqa: BLE001 - whatever the decoder raises is about the record
            cursor.undecodable(offset, value, error)
            cursor.put_back()
            if cursor.failed is None:
                cursor.index += 1
            return 0
        message = Message(
            payload,
            None if columns.keys is None else columns.keys[index],
            cursor.topic,
            cursor.partition,
            offset,
            columns.timestamps[index],
            None if columns.headers is None else columns.headers[index],
        )
        try:
            await _call(cursor.target, message)
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything
            given_up = cursor.raised([offset], error) and cursor.failed is None
            cursor.put_back()
            cursor.index += given_up
            cursor.release_processed()
            return 0
        cursor.succeeded(offset, 1)
        cursor.index += 1
        cursor.release_processed()
    return 0


async def _one_batch(bindings: HandlerBindings, cursor: PartitionCursor) -> float:
    batch = bindings.batch(cursor)
    due_ns = batch.gather()
    if due_ns:
        return IDLE_MS if due_ns < 0 else due_ns / 1e6
    cursor.cells[IN_FLIGHT] = batch.messages[0].offset
    if not cursor.memory.leased:
        cursor.put_back()
        return LEASE_WAIT_MS
    try:
        await _call(cursor.target, batch.messages)
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        batch.raised(error)
    else:
        batch.succeeded()
    return 0
