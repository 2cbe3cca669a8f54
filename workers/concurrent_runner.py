"""Runs handlers that wait on others: ``async def`` functions, and plain ones in threads, many records at a time.

Records are handled one after the other within their ordering unit, and units beside each other, up to ``concurrency``
(or ``threads``) at once in this process. A unit is a lane: a slot of a partition, a key, or a single record. A retry's
wait holds up its own lane. Records are finished in any order; the contiguous prefix of a ring is what counts.

After the death of a process with many records in its hands nobody knows which of them ended it. So its successor
handles what was in its hands one at a time: the next death has one to blame.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from kafkasrcd.errors import HandlerError, KafkasrcdError, RingCorrupted
from kafkasrcd.message import Message
from kafkasrcd.settings import Ordering, Settings
from kafkasrcd.storage.dead_letters import DeadLetter
from kafkasrcd.workers.clock import boottime_ns
from kafkasrcd.workers.commits import HeldUp
from kafkasrcd.workers.cursor import PartitionCursor
from kafkasrcd.workers.frame import Columns
from kafkasrcd.workers.handler_bindings import IDLE_MS, HandlerBindings, lease_wait_ms
from kafkasrcd.workers.handler_target import HandlerTarget, refuse_awaitable
from kafkasrcd.workers.prefix import Prefix
from kafkasrcd.workers.redelivery import Redelivery
from kafkasrcd.workers.ring import BURYING, CALLED_AT, HANDLED, IN_FLIGHT, IN_HANDS, LETTER, PROCESSED, STARTED

_AHEAD: Final = 8
"""Records taken from a ring, waiting in lanes or being handled, for each that may be handled at once: behind a key with
many records in a row there are then still others."""
_LEAST_AHEAD: Final = 1_000
_TURN_NS: Final = 10_000_000
"""How long the loop is kept by handlers that never wait."""


async def run(bindings: HandlerBindings, settings: Settings) -> None:
    """Serve the slots until told to end."""
    with contextlib.ExitStack() as stack:
        await _Runner(bindings, settings, stack).run()


class _Runner:
    """One process's lanes."""

    def __init__(self, bindings: HandlerBindings, settings: Settings, stack: contextlib.ExitStack) -> None:
        handler = settings.handler
        self.bindings = bindings
        self.commits = bindings.commits
        self.ordering = handler.ordering
        self.one_call = asyncio.Lock() if self.commits.one_at_a_time else None
        self.wake = asyncio.Event()
        self.ready: deque[_Lane] = deque()
        """Lanes whose next record may begin."""
        self.in_hands = 0
        self.executor = None
        self._most = handler.concurrency
        if handler.threads > 1:
            self.executor = stack.enter_context(ThreadPoolExecutor(handler.threads, "handler"))
            self._most = max(self._most if bindings.has_async else 0, handler.threads)
        if self.commits.one_at_a_time:
            self._most = 1
        self.ahead = max(_LEAST_AHEAD, _AHEAD * self._most)
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots: dict[int, _Slot] = {}
        self._suspects: list[_Slot] = []
        """Those that were taken over from a process that died with records in its hands."""
        self.alone: set[Redelivery] = set()
        """Letters that may have ended a process, with others in its hands."""
        self._placing: set[asyncio.Task[None]] = set()
        self._defect: BaseException | None = None
        bindings.on_rewound = self._rewound

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self.bindings.bell, self.wake.set)
        loop.add_reader(self.bindings.channel.fileno(), self.wake.set)
        while self.bindings.receive():
            if self._defect is not None:
                raise self._defect  # not one lane that stands still in silence, but an end that is seen
            self.bindings.awake()
            self.wake.clear()
            self._follow_bindings()
            wait_ms = min((slot.turn() for slot in self._slots.values()), default=IDLE_MS)
            self.start_tasks()
            wait_ms = min(wait_ms, await self._commits_turn(), IDLE_MS)
            if not self.wake.is_set() and wait_ms and self.bindings.await_frames():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.wake.wait(), wait_ms / 1000)
            else:
                await asyncio.sleep(0)
        tasks = self._tasks | self._placing
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.commits.end_async()

    def start_tasks(self) -> None:
        """As many as may run and have something to do."""
        if self._defect is not None:
            self.wake.set()
            return
        while len(self._tasks) < min(self.limit, self.in_hands + len(self.ready)):
            task = asyncio.create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    @property
    def limit(self) -> int:
        """How many records may be in the handler's hands now."""
        while self._suspects and not self._suspects[-1].is_suspect:
            self._suspects.pop()
        return 1 if self._suspects or self.alone else self._most

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """``work`` that no record's handling is."""
        task = asyncio.create_task(work)
        self._placing.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._placing.discard(task)
        if task.cancelled():
            return
        self._defect = self._defect or task.exception()
        self.start_tasks()  # what became ready between this one's last look and its end

    async def _work(self) -> None:
        """Handle what is ready, one record after the other, until nothing is."""
        turn_ends = boottime_ns() + _TURN_NS
        while self.ready and self.in_hands < self.limit:
            lane = self.ready.popleft()
            await lane.slot.handle(lane)
            if (now := boottime_ns()) >= turn_ends:
                await asyncio.sleep(0)
                turn_ends = now + _TURN_NS

    async def _commits_turn(self) -> float:
        if self.one_call is None:
            return await self.commits.turn_async()
        async with self.one_call:
            return await self.commits.turn_async()

    def _follow_bindings(self) -> None:
        bound = {cursor.binding: cursor for cursor in self.bindings.cursors()}
        for binding in self._slots.keys() - bound.keys():
            self._slots.pop(binding).drop()
        for binding in bound.keys() - self._slots.keys():
            slot = self._slots[binding] = _Slot(self, bound[binding])
            if slot.is_suspect:
                self._suspects.append(slot)

    def _rewound(self) -> None:
        self.ready.clear()
        for slot in self._slots.values():
            slot.rewound()
        self.wake.set()

    def call(self, target: HandlerTarget, call: Callable[[Any], Any]) -> Callable[[Any], Awaitable[None]]:
        """``call`` as something to await."""

        async def directly(argument: Any) -> None:
            refuse_awaitable(call(argument))

        async def in_thread(argument: Any) -> None:
            refuse_awaitable(await asyncio.get_running_loop().run_in_executor(self.executor, call, argument))

        if target.is_async:
            return call
        return directly if self.executor is None else in_thread


class _Lane:
    """An ordering unit of one slot: what waits in it, in order; nothing where the handler takes batches."""

    __slots__ = ("again", "busy", "generation", "letter", "name", "records", "slot")

    def __init__(self, slot: "_Slot", name: bytes | None) -> None:
        self.slot = slot
        self.generation = slot.generation
        self.name = name
        self.records: deque[tuple[Columns, int]] = deque()
        self.busy = False
        """Ready, in a handler's hands, or waiting to be tried again."""
        self.letter: DeadLetter | None = None
        """To be buried before its next record."""
        self.again: deque[Redelivery] = deque()
        """Letters whose records come before its next one."""


class _Slot:
    """One ring's records on their way through lanes."""

    def __init__(self, runner: _Runner, cursor: PartitionCursor) -> None:
        self.runner = runner
        self.cursor = cursor
        self._call = runner.call(cursor.target, cursor.call)
        self._batch = runner.bindings.batch(cursor)
        self.generation = 0
        """Goes up when the cursor is rewound: lanes of before, and what is under way in them, do not count any more."""
        self._whole = _Lane(self, None)
        """The one lane of a slot in partition order, and of one whose handler takes batches."""
        self._lanes: dict[bytes, _Lane] = {}
        self._in_hands = 0
        self._calls: dict[int, int] = {}
        """When each record (or batch, by its first) that is in the handler's hands was given to it; oldest first."""
        self._dropped = False
        self._refill_below = 1 if runner.ordering is Ordering.PARTITION else runner.ahead // 2
        self._held: list[_Lane] = []
        """Lanes that may go on once the slot has its lease again."""
        self._letters: dict[int, None] = {}
        """Those in hand."""
        self._is_placing = False
        if not cursor.target.is_batch:
            cursor.prefix = Prefix()

    @property
    def is_suspect(self) -> bool:
        """Whether records are left of those that a process before this one may have ended by."""
        cursor = self.cursor
        return not self._dropped and cursor.failed is None and cursor.cells[PROCESSED] < cursor.suspect_until

    def drop(self) -> None:
        """The slot is not this process's any more; nothing of it is in the handler's hands."""
        self._dropped = True
        self._forget()
        self.runner.ready = deque(lane for lane in self.runner.ready if lane.slot is not self)

    def turn(self) -> float:
        """Take what is there; milliseconds until the next turn that nothing wakes."""
        cursor = self.cursor
        cursor.release_done()
        if cursor.failed is not None:
            self.runner.bindings.report_failed(cursor)
            return IDLE_MS
        if not cursor.memory.leased:
            return lease_wait_ms(cursor)
        self.runner.ready.extend(self._held)
        self._held.clear()
        if cursor.due and not self._is_placing:
            self._is_placing = True
            self.runner.begin(self._place_letters())
        try:
            return self._gather() if cursor.target.is_batch else self._fill()
        except RingCorrupted as error:
            self.runner.bindings.report_broken(cursor, error)
            return IDLE_MS

    def rewound(self) -> None:
        """Everything is read again."""
        self._forget()

    def _forget(self) -> None:
        self.generation += 1
        self._held.clear()
        self._lanes.clear()
        self._whole = _Lane(self, None)
        self.runner.alone = {letter for letter in self.runner.alone if letter.cursor is not self.cursor}

    # ---- single records ------------------------------------------------------------------------------------------

    def _fill(self) -> float:
        cursor = self.cursor
        prefix = cursor.prefix
        if prefix is None:
            raise AssertionError("a slot of single records has a prefix")
        waiting_ns = cursor.retry_at_ns - boottime_ns()
        if waiting_ns > 0:
            return waiting_ns / 1e6
        cursor.retry_at_ns = 0
        # In partition order one frame is enough: nothing can pass what waits.
        ahead = 1 if self.runner.ordering is Ordering.PARTITION else self.runner.ahead
        while prefix.unfinished < ahead and cursor.load() and cursor.columns is not None:
            columns = cursor.columns
            for index in range(cursor.index, len(columns.values)):
                self._put(columns, index)
            cursor.index = len(columns.values)
        cursor.full = prefix.unfinished >= ahead
        return IDLE_MS

    def _put(self, columns: Columns, index: int) -> None:
        lane = self._lane(columns.raw_key(index))
        lane.records.append((columns, index))
        self._make_ready(lane)

    def _lane(self, key: bytes | None) -> _Lane:
        """Of a record with this key."""
        ordering = self.runner.ordering
        if ordering is Ordering.PARTITION or self.cursor.target.is_batch:
            return self._whole
        if ordering is Ordering.NONE or key is None:
            return _Lane(self, None)
        return self._lanes.get(key) or self._lanes.setdefault(key, _Lane(self, key))

    def _make_ready(self, lane: _Lane) -> None:
        if not lane.busy and (lane.records or lane.again):
            lane.busy = True
            self.runner.ready.append(lane)

    async def handle(self, lane: _Lane) -> None:
        """The lane's next record, or the slot's batch."""
        async with self.runner.one_call or contextlib.nullcontext():
            if lane.generation == self.generation:  # it may have been rewound while this waited for its turn
                if lane.letter is not None:
                    await self._bury(lane, lane.letter)
                elif lane.again:
                    await self._redeliver(lane, lane.again[0])
                else:
                    await (self._handle_batch(lane) if self.cursor.target.is_batch else self._handle_record(lane))

    async def _handle_record(self, lane: _Lane) -> None:
        cursor = self.cursor
        columns, index = lane.records[0]
        offset = columns.offsets[index]
        if not self._take(offset):
            self._later(lane)
            return
        backoff_ns: int | None = None
        letter: DeadLetter | None = None
        finished = False
        value: Any = columns.values[index]
        try:
            payload = None if value is None else cursor.target.decode(value)
        except Exception as error:  # noqa: BLE001 - whatever the decoder raises is about the record
            letter = cursor.undecodable(columns, index, error)
        else:
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
                await self._guarded(message)
                finished = True
            except HeldUp:
                self._give_back(offset)
                self._after_hold(lane)
                return
            except Exception as error:  # noqa: BLE001 - the user's code may raise anything
                if lane.generation == self.generation:
                    backoff_ns = cursor.raised([offset], error)
                    if backoff_ns is None:
                        letter = cursor.give_up(columns, index, error)
        if lane.generation != self.generation:
            self._give_back(offset)
            return
        if finished:
            cursor.cells[HANDLED] += 1
            cursor.finish(offset)
            cursor.release_done()
        self._give_back(offset)
        if backoff_ns is not None:
            asyncio.get_running_loop().call_later(backoff_ns / 1e9, self._again, lane)
            return
        if letter is not None:
            lane.letter = letter
            self.runner.ready.append(lane)
        elif cursor.failed is not None:
            self.runner.bindings.report_failed(cursor)
        else:
            self._go_on(lane)

    def _go_on(self, lane: _Lane) -> None:
        """Its first record is finished."""
        cursor = self.cursor
        lane.records.popleft()
        self._leave(lane)
        if cursor.full and cursor.prefix is not None and cursor.prefix.unfinished < self._refill_below:
            self.turn()
            self.runner.start_tasks()
            self.runner.wake.set()  # to announce that this one sleeps, where it does

    def _leave(self, lane: _Lane) -> None:
        """Nothing of it is in hand now."""
        lane.busy = False
        if lane.records or lane.again:
            self._make_ready(lane)
        elif lane.name is not None:
            del self._lanes[lane.name]

    async def _bury(self, lane: _Lane, letter: DeadLetter) -> None:
        """Keep the dead letter of the lane's first record, or of its batch's."""
        cursor, bindings = self.cursor, self.runner.bindings
        if not self._take(letter.offset, is_call=False):
            self._later(lane)
            return
        try:
            if letter.offset in cursor.left_out:
                letter = await asyncio.to_thread(cursor.whole, letter)
                if lane.generation != self.generation:
                    self._give_back(letter.offset)
                    return
            await self.runner.commits.bury_async(cursor, letter)
        except HeldUp:
            self._give_back(letter.offset)
            self._after_hold(lane)
            return
        except KafkasrcdError as error:
            self._give_back(letter.offset)
            if lane.generation == self.generation:
                wait_ns = bindings.letter_refused(cursor, letter, error)
                asyncio.get_running_loop().call_later(wait_ns / 1e9, self._again, lane)
            return
        if lane.generation != self.generation:
            self._give_back(letter.offset)
            return
        lane.letter = None
        bindings.letter_buried(cursor, letter)
        self._give_back(letter.offset)
        if cursor.target.is_batch:
            lane.busy = False
            self.runner.wake.set()
        else:
            self._go_on(lane)

    # ---- batches -------------------------------------------------------------------------------------------------

    def _gather(self) -> float:
        if self._whole.again:
            self._make_ready(self._whole)
        self.cursor.full = self._whole.busy
        if self._whole.busy:
            return IDLE_MS
        waiting_ns = self.cursor.retry_at_ns - boottime_ns()
        if waiting_ns > 0:
            return waiting_ns / 1e6
        self.cursor.retry_at_ns = 0
        due_ns = self._batch.gather()
        if self.cursor.letter is not None:
            self.cursor.full = self._whole.busy = True
            self._whole.letter = self.cursor.letter
            self.runner.ready.append(self._whole)
            return IDLE_MS
        if self.cursor.failed is not None:
            self.runner.bindings.report_failed(self.cursor)
            return IDLE_MS
        if due_ns:
            return IDLE_MS if due_ns < 0 else due_ns / 1e6
        self.cursor.full = self._whole.busy = True
        self.runner.ready.append(self._whole)
        return IDLE_MS

    async def _handle_batch(self, lane: _Lane) -> None:
        batch = self._batch
        messages = batch.messages
        if not messages:
            return
        if not self._take(messages[0].offset):
            self._later(lane)
            return
        self.cursor.cells[STARTED] = max(self.cursor.cells[STARTED], messages[-1].offset + 1)
        try:
            await self._guarded(messages)
        except HeldUp:
            pass
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything
            if lane.generation == self.generation:
                batch.raised(error)
        else:
            if lane.generation == self.generation:
                batch.succeeded()
        self._give_back(messages[0].offset)
        lane.busy = False
        self.runner.wake.set()

    # ---- letters -------------------------------------------------------------------------------------------------

    async def _place_letters(self) -> None:
        """Look up the letters that are due, and put each into the lane of its record."""
        cursor, bindings, generation = self.cursor, self.runner.bindings, self.generation
        try:
            while cursor.due and generation == self.generation:
                due = cursor.due.popleft()
                letter: Redelivery | None = None
                async with self.runner.one_call or contextlib.nullcontext():
                    try:
                        found = await self.runner.commits.letter_async(cursor, due.id)
                        letter = bindings.redeliveries.take(cursor, due, found)
                    except KafkasrcdError as error:
                        bindings.letter_waits(cursor, due.id, error)
                    except HeldUp:
                        pass  # the transaction is gone, which was said; the letter is due as before
                if generation != self.generation:
                    return
                if letter is None:
                    bindings.letter_done(cursor, dropped=True)
                    continue
                if letter.alone:
                    self.runner.alone.add(letter)
                lane = self._lane(letter.key)
                lane.again.append(letter)
                self._make_ready(lane)
                self.runner.start_tasks()
        finally:
            self._is_placing = False

    async def _redeliver(self, lane: _Lane, letter: Redelivery) -> None:
        """Handle its record, and write down what became of it."""
        cursor, bindings = self.cursor, self.runner.bindings
        if not self._take_letter(letter):
            self._later(lane)
            return
        wait_ns: int | None = None
        dropped = False
        try:
            outcome = letter.outcome or await asyncio.to_thread(letter.read)
            if outcome is None:
                self._call_letter(letter, boottime_ns())
                try:
                    await self._guarded(letter.argument)
                except HeldUp:
                    raise
                except Exception as error:  # noqa: BLE001 - the user's code may raise anything
                    outcome = letter.raised(error)
                else:
                    outcome = letter.handled()
                self._call_letter(letter, 0)
            if lane.generation == self.generation:
                letter.settled(ours=await self.runner.commits.settle_async(cursor, outcome))
                bindings.letter_written(cursor)
        except HeldUp:
            letter.outcome = None
            self._give_back_letter(letter)
            self._after_hold(lane)
            return
        except KafkasrcdError as error:
            if letter.outcome is None:
                bindings.letter_waits(cursor, letter.id, error)
                dropped = True
            elif lane.generation == self.generation:
                wait_ns = bindings.not_written(cursor, f"what became of {letter.what} cannot be written down", error)
        self._give_back_letter(letter)
        if lane.generation != self.generation:
            return
        if wait_ns is not None:
            asyncio.get_running_loop().call_later(wait_ns / 1e9, self._again, lane)
            return
        lane.again.popleft()
        self.runner.alone.discard(letter)
        bindings.letter_done(cursor, dropped=dropped)
        self._leave(lane)
        self.runner.wake.set()

    # ---- in and out of the handler's hands -----------------------------------------------------------------------

    async def _guarded(self, argument: Any) -> None:
        try:
            await self._call(argument)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled this lane: something that the handler waited for was.
            raise HandlerError("what it waited for was cancelled") from error

    def _take(self, offset: int, *, is_call: bool = True) -> bool:
        """Into the handler's hands or, where it is no call yet, into ours; False where the slot stands still. The cell
        first, then the lease."""
        cursor = self.cursor
        cells = cursor.cells
        if self._in_hands == 0:
            cells[IN_FLIGHT] = offset
        if cursor.failed is not None or not cursor.memory.leased:
            if self._in_hands == 0:
                cursor.put_back()
            return False
        self._in_hands += 1
        self.runner.in_hands += 1
        cells[IN_HANDS] = self._in_hands
        if is_call:
            self._calls[offset] = boottime_ns()
        cells[CALLED_AT] = next(iter(self._calls.values()), 0)
        cells[BURYING] = not self._calls
        if offset >= cells[STARTED]:
            cells[STARTED] = offset + 1
        return True

    def _give_back(self, offset: int) -> None:
        self._in_hands -= 1
        self.runner.in_hands -= 1
        self.cursor.cells[IN_HANDS] = self._in_hands
        self._calls.pop(offset, None)
        self.cursor.cells[CALLED_AT] = next(iter(self._calls.values()), 0)
        self.cursor.cells[BURYING] = self._in_hands > 0 and not self._calls
        if self._in_hands == 0:
            self.cursor.put_back()

    def _take_letter(self, letter: Redelivery) -> bool:
        """As ``_take``. The offset that stands for it keeps a drain waiting, and no record is blamed by it."""
        cells = self.cursor.cells
        if not self._take(cells[PROCESSED], is_call=False):
            return False
        self._letters[letter.id] = None
        cells[LETTER] = next(iter(self._letters))
        return True

    def _call_letter(self, letter: Redelivery, at_ns: int) -> None:
        """Its call has begun at boot time ``at_ns``; 0 is that it has ended."""
        calls, cells = self._calls, self.cursor.cells
        if at_ns:
            calls[-letter.id] = at_ns  # negative, as no offset is
        else:
            calls.pop(-letter.id, None)
        cells[CALLED_AT] = next(iter(calls.values()), 0)
        cells[BURYING] = not calls

    def _give_back_letter(self, letter: Redelivery) -> None:
        self._letters.pop(letter.id, None)
        self.cursor.cells[LETTER] = next(iter(self._letters), 0)
        self._give_back(-letter.id)

    def _later(self, lane: _Lane) -> None:
        """The slot stands still now; where only its lease is missing, it is looked at again soon."""
        self._held.append(lane)
        self.runner.wake.set()

    def _after_hold(self, lane: _Lane) -> None:
        """The call was not made, or is undone: again once the slot may go on, unless it was rewound."""
        if lane.generation == self.generation:
            wait_seconds = max(0.0, (self.cursor.retry_at_ns - boottime_ns()) / 1e9)
            asyncio.get_running_loop().call_later(wait_seconds, self._again, lane)

    def _again(self, lane: _Lane) -> None:
        if lane.generation == self.generation:
            self.runner.ready.append(lane)
            self.runner.start_tasks()
