"""Open dead letters in the status: looked up now and then, and shown beside what is wrong."""

import asyncio

import pytest
from rich.console import Console

from kafkasrcd.daemon.open_letters import OpenLetters
from kafkasrcd.daemon.status import PartitionStatus, Status, WorkerStatus
from kafkasrcd.daemon.status_view import status_view
from kafkasrcd.errors import StoreUnavailable
from kafkasrcd.settings import HandlerSettings, OnFailure, Settings, StoreSettings
from kafkasrcd.storage.dead_letters import LetterCount, LetterState
from kafkasrcd.storage.memory_store import MemoryOffsetStore

FOUND = [LetterCount("orders", "ValueError", 3)]


class Store:
    """Answers what it is told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.answer: list[LetterCount] | None = FOUND

    async def count_letters(self, state: LetterState) -> list[LetterCount]:
        if state is not LetterState.OPEN:
            return []
        self.asked += 1
        if self.answer is None:
            raise StoreUnavailable("away")
        return self.answer


async def _turn(letters: OpenLetters, now: float, *, store_answers: bool = True) -> None:
    letters.watch(now, store_answers=store_answers)
    for _ in range(5):
        await asyncio.sleep(0)


def test_they_are_looked_up_every_10_seconds_and_a_store_that_is_away_changes_nothing() -> None:
    async def run() -> None:
        store = Store()
        letters = OpenLetters(Settings(), store.count_letters)
        now = asyncio.get_running_loop().time()
        await _turn(letters, now)
        assert (store.asked, letters.open) == (1, FOUND)
        await _turn(letters, now + 5)
        assert store.asked == 1
        await _turn(letters, now + 15, store_answers=False)
        assert store.asked == 1
        store.answer = None
        await _turn(letters, now + 15)
        assert (store.asked, letters.open) == (2, FOUND)
        letters.stop()

    asyncio.run(run())


@pytest.mark.parametrize(
    "settings",
    [
        Settings(handler=HandlerSettings(on_failure=OnFailure.STOP)),
        Settings(handler=HandlerSettings(dead_letter_store=False, dead_letter_topic="{topic}.DLQ")),
        Settings(store=StoreSettings(url="memory://")),
    ],
    ids=["stop", "topic only", "memory"],
)
def test_nobody_is_asked_where_the_store_keeps_none(settings: Settings) -> None:
    async def run() -> None:
        store = Store()
        letters = OpenLetters(settings, store.count_letters)
        await _turn(letters, asyncio.get_running_loop().time())
        assert (store.asked, letters.open) == (0, [])

    asyncio.run(run())


def test_the_memory_store_has_none() -> None:
    assert MemoryOffsetStore("billing").count_letters(LetterState.OPEN) == []


def shown(status: Status, width: int) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(status_view(status, width=width), soft_wrap=True)
    return captured.get()


def status_of(counts: list[LetterCount]) -> Status:
    worker = WorkerStatus(pid=7, restarts=0, cpu_percent=0.0, rss_bytes=0)
    partition = PartitionStatus(
        topic="orders",
        partition=0,
        state="running",
        since_ms=0,
        problem="",
        assignment_epoch=1,
        handlers=[0],
        position=100,
        processed=100,
        committed=100,
        high_watermark=100,
        lag=0,
        messages=100,
        succeeded=91,
        skipped=1234,
        dead_lettered=5678,
        failures=40,
        bytes=1,
        rate=0.0,
        bytes_rate=0.0,
        last_commit_ms=None,
        worker=worker,
    )
    return Status(
        kafkasrcd="1",
        group_id="billing",
        state="running",
        pid=1,
        started_ms=0,
        now_ms=0,
        problems=[],
        rebalances=1,
        total_commits=1,
        partitions=[partition],
        handlers=[],
        dead_letters=counts,
    )


def test_people_see_the_first_kinds_and_the_daemon_is_healthy() -> None:
    counts = [LetterCount("orders", f"Error{number}", 1_000 - number) for number in range(8)]
    lines = shown(status_of([*counts, LetterCount("orders", "Rare", 1)]), 100).splitlines()
    assert "healthy" in lines[0]
    assert lines[1] == "! 1,000 dead letters of orders: Error0 (kafkasrcd dead-letters list)"
    assert lines[6] == "! 2,983 dead letters of other topics and errors (kafkasrcd dead-letters list)"
    assert "! 1 dead letter of orders: Rare" in shown(status_of([LetterCount("orders", "Rare", 1)]), 100)


def test_wide_terminals_have_columns_for_them() -> None:
    status = status_of([])
    assert "1,234" not in shown(status, 100)
    heading, row = shown(status, 200).splitlines()[1:3]
    for name, figure in (("skipped", "1,234"), ("dead", "5,678")):
        assert heading.index(name) + len(name) == row.index(figure) + len(figure)
    assert all(len(line.rstrip()) <= 156 for line in shown(status, 156).splitlines()[1:3])
