"""Recording where the store or the group refuses: what no real broker can be made to do at the right moment.

The recorder answers as it is told; partitions, shared memory and the assignment are real.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import cast

import pytest

from kafkasrcd.daemon.assignment import Assignment
from kafkasrcd.daemon.child_processes import ForkServer
from kafkasrcd.daemon.handler_pool import HandlerPool
from kafkasrcd.daemon.lifecycle import State
from kafkasrcd.daemon.partition import Partition
from kafkasrcd.daemon.reached import Reached
from kafkasrcd.daemon.recorder import Recorded, Recorder
from kafkasrcd.daemon.start_points import StartPoint
from kafkasrcd.errors import GroupError, StaleAssignment, StoreUnavailable
from kafkasrcd.settings import HandlerSettings, Settings
from kafkasrcd.storage.memory_store import MemoryOffsetStore
from kafkasrcd.storage.offset_store import WHOLE, Claim, Layout, TopicPartition
from kafkasrcd.workers.deadline import Deadline
from kafkasrcd.workers.partition_memory import POSITION

NAMES = [TopicPartition("orders", 0), TopicPartition("orders", 1)]
Offsets = Mapping[TopicPartition, Reached]


def accepted(offsets: Offsets) -> Recorded:
    return Recorded(dict(offsets), {}, {})


class ToldRecorder(Recorder):
    """Answers each ``record`` by the next of ``answers``, and accepts when there are no more."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, "test", WHOLE)
        self.asked: list[dict[TopicPartition, int]] = []
        self.answers: list[Exception | Callable[[Offsets], Recorded]] = []

    async def record(self, offsets: Offsets) -> Recorded:
        self.asked.append({name: reached.next_offset for name, reached in offsets.items()})
        answer = self.answers.pop(0) if self.answers else accepted
        if isinstance(answer, Exception):
            raise answer
        return answer(offsets)


class Owned:
    """An assignment of two partitions at work, of which 5 offsets each are processed and not recorded."""

    def __init__(self, recorder: "type[ToldRecorder]") -> None:
        settings = Settings(topics=["orders"], handler=HandlerSettings(target="unused:unused", processes=1))
        self.recorder = recorder(settings)
        fork_server = ForkServer()
        self.assignment = assignment = Assignment(settings, fork_server, self.recorder)
        assignment.handlers = HandlerPool(settings, WHOLE, Path(), fork_server, "", assignment)
        self.partitions: list[Partition] = []
        for name in NAMES:
            partition = assignment.partitions[name] = Partition(name, settings)
            partition.begin(StartPoint(7, 0), WHOLE)
            assert partition.memory is not None
            partition.memory.cells[POSITION] = 5
            for state in (State.STARTING, State.RUNNING):
                partition.enter(state)
            self.partitions.append(partition)

    async def close(self) -> None:
        await self.assignment.drain(Deadline(0))
        await self.assignment.handlers.stop(0)


def run(scenario: Callable[[Owned], Coroutine[None, None, None]], recorder: type[ToldRecorder] = ToldRecorder) -> None:
    async def whole() -> None:
        owned = Owned(recorder)
        try:
            await scenario(owned)
        finally:
            owned.recorder.answers.clear()
            await owned.close()

    asyncio.run(whole())


def test_a_final_commit_that_a_rebalance_overtakes_is_made_again() -> None:
    async def scenario(owned: Owned) -> None:
        owned.recorder.answers = [GroupError("ILLEGAL_GENERATION"), GroupError("REBALANCE_IN_PROGRESS")]
        assert await owned.assignment.drain(Deadline(10))
        assert owned.recorder.asked == [dict.fromkeys(NAMES, 5)] * 3
        assert not owned.assignment.partitions

    run(scenario)


def test_what_kafka_refused_of_a_final_commit_is_committed_again() -> None:
    def refuses_one(offsets: Offsets) -> Recorded:
        return Recorded({NAMES[0]: offsets[NAMES[0]]}, {}, {NAMES[1]: "ILLEGAL_GENERATION"})

    async def scenario(owned: Owned) -> None:
        owned.recorder.answers = [refuses_one]
        assert await owned.assignment.drain(Deadline(10))
        assert owned.recorder.asked == [dict.fromkeys(NAMES, 5), {NAMES[1]: 5}]

    run(scenario)


def test_a_store_that_is_back_is_noticed_also_where_nothing_is_left_to_record() -> None:
    """Nothing is handed off while it is away, so nothing new would ever come to be recorded."""

    async def scenario(owned: Owned) -> None:
        await owned.assignment.recording.record_processed()
        owned.assignment.recording.store_problem = "it was away when a partition was given back"
        owned.recorder.answers = [StoreUnavailable("still away")]
        await owned.assignment.recording.record_processed()
        assert owned.assignment.recording.store_problem == "still away"
        await owned.assignment.recording.record_processed()
        assert owned.assignment.recording.store_problem == ""

    run(scenario)


@pytest.mark.parametrize(("epoch", "contested"), [(7, "claimed by another"), (8, "")])
def test_a_refusal_is_about_the_epoch_it_was_asked_for(epoch: int, contested: str) -> None:
    async def scenario(owned: Owned) -> None:
        partition = owned.partitions[0]

        def refuses(offsets: Offsets) -> Recorded:
            assert partition.memory is not None
            partition.memory.epoch = epoch  # 8: it was claimed again in the meantime, by this member
            return Recorded({}, {NAMES[0]: StaleAssignment("claimed by another")}, {})

        owned.recorder.answers = [refuses]
        await owned.assignment.recording.record([partition], None)
        assert partition.contested == contested

    run(scenario)


def test_membership_is_proven_by_a_commit_that_is_taken() -> None:
    async def scenario(owned: Owned) -> None:
        owned.recorder.answers = [GroupError("no broker"), lambda _: Recorded({}, {}, {NAMES[0]: "UNKNOWN_MEMBER_ID"})]
        assert [await owned.assignment.recording.prove_membership() for _ in range(3)] == [False, False, True]

    run(scenario)


class AskedRecorder(ToldRecorder):
    """Refuses each record as another's, says of the group what ``group`` has next, and never gets to claim."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.group: list[bool | None] = []
        self.claimed: list[TopicPartition] = []

    async def record(self, offsets: Offsets) -> Recorded:
        return Recorded({}, dict.fromkeys(offsets, StaleAssignment("claimed by another")), {})

    async def is_assigned(self, name: TopicPartition) -> bool | None:
        return self.group.pop(0)

    async def claim(
        self, names: Sequence[TopicPartition], moved: Mapping[TopicPartition, int]
    ) -> dict[TopicPartition, StartPoint]:
        self.claimed += names
        raise StoreUnavailable("not now")


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_partition_that_the_group_says_is_ours_is_claimed_anew() -> None:
    async def scenario(owned: Owned) -> None:
        recorder = cast(AskedRecorder, owned.recorder)
        recorder.group = [None, True]
        partition = owned.partitions[0]
        await owned.assignment.recording.record([partition], None)
        await _until(lambda: recorder.claimed)
        assert recorder.claimed == [NAMES[0]]
        assert not recorder.group
        assert partition.state is State.CLAIMING
        assert owned.partitions[1].state is State.RUNNING

    run(scenario, AskedRecorder)


def test_a_partition_that_the_group_says_is_anothers_is_lost() -> None:
    async def scenario(owned: Owned) -> None:
        recorder = cast(AskedRecorder, owned.recorder)
        recorder.group = [None, False]
        partition = owned.partitions[0]
        await owned.assignment.recording.record([partition], None)
        await _until(lambda: "asked whose it is" in partition.advice)
        await _until(lambda: partition.state is State.RELEASED)
        assert not recorder.claimed
        assert list(owned.assignment.partitions) == [NAMES[1]]

    run(scenario, AskedRecorder)


def test_a_partition_that_is_claimed_by_another_again_and_again_is_failed() -> None:
    """As where two clusters with groups of one name share a store: both are right."""

    async def scenario(owned: Owned) -> None:
        partition = owned.partitions[0]
        while partition.backoff.next_delay() is not None:
            pass
        await owned.assignment.recording.record([partition], None)
        await _until(lambda: partition.state is State.FAILED)
        assert "one Kafka cluster" in partition.advice

    run(scenario, AskedRecorder)


def test_a_claim_under_way_is_over_before_its_partition_is_given_back() -> None:
    """It would fence the next owner."""

    class SlowStore(MemoryOffsetStore):
        def claim(
            self, topic_partitions: Sequence[TopicPartition], owner: str, layout: Layout = WHOLE
        ) -> dict[TopicPartition, Claim]:
            under_way.set()
            assert goes_on.wait(10)
            claimed.set()
            return super().claim(topic_partitions, owner, layout)

    under_way, goes_on, claimed, given_back = (threading.Event() for _ in range(4))

    async def scenario(owned: Owned) -> None:
        await owned.recorder.open(lambda: SlowStore("group"))
        name = TopicPartition("orders", 2)
        owned.assignment.on_assigned([name])
        await _until(under_way.is_set)
        owned.assignment.on_revoked([name], given_back.set)
        await _until(lambda: owned.assignment.partitions[name].state is State.DRAINING)
        await asyncio.sleep(0.05)
        assert not given_back.is_set()
        goes_on.set()
        await _until(given_back.is_set)
        assert claimed.is_set()

    run(scenario)
