"""The breaker: what it counts, and what it does; partitions and their cells are real, the store answers as told."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence

import pytest

from kafkasrcd.daemon.breaker import Breaker
from kafkasrcd.daemon.dead_letter_window import MOST_RECORDS, DeadLetterWindow
from kafkasrcd.daemon.lifecycle import State
from kafkasrcd.daemon.pause_words import BREAKER
from kafkasrcd.errors import StoreUnavailable
from kafkasrcd.settings import HandlerSettings, Settings
from kafkasrcd.storage.intents import Intent, IntentKind, Scope
from kafkasrcd.workers.ring import DEAD_LETTERED, HANDLED, SKIPPED
from tests.test_recording import Owned, ToldRecorder

# ---- the window ------------------------------------------------------------------------------------------------------


def observed(*samples: tuple[float, int, int], least: int = 4) -> DeadLetterWindow:
    window = DeadLetterWindow(60.0, least)
    for sample in samples:
        window.observe(*sample)
    return window


def test_of_too_few_records_nothing_follows() -> None:
    assert not observed((0, 0, 0), (1, 3, 3)).exceeds(0.5)
    assert observed((0, 0, 0), (1, 4, 4)).exceeds(0.5)


@pytest.mark.parametrize(("dead", "exceeds"), [(50, False), (51, True)])
def test_more_than_the_ratio_is_too_many(dead: int, exceeds: bool) -> None:
    assert observed((0, 0, 0), (1, 100, dead)).exceeds(0.5) is exceeds


def test_a_ratio_of_nothing_allows_none_and_of_one_allows_all() -> None:
    assert observed((0, 0, 0), (1, 100, 1)).exceeds(0)
    assert not observed((0, 0, 0), (1, 100, 100)).exceeds(1)


def test_it_begins_with_what_was_there_before() -> None:
    assert observed((0, 500, 500)).counts == (0, 0)
    assert observed((0, 500, 500), (1, 510, 501)).counts == (1, 10)


def test_what_is_older_does_not_count() -> None:
    window = observed((0, 0, 0), (1, 100, 100), (59, 200, 100))
    assert window.counts == (100, 200)
    window.observe(61.5, 200, 100)
    assert window.counts == (0, 100)
    window.observe(200, 200, 100)
    assert window.counts == (0, 0)


def test_a_minute_of_good_records_does_not_let_thousands_of_bad_ones_go_by() -> None:
    window = DeadLetterWindow(60.0, 20)
    for turn in range(600):
        window.observe(turn / 10, turn * 1_000, 0)
    for turn in range(600, 700):
        bad = (turn - 599) * 100
        window.observe(turn / 10, 599_000 + bad, bad)
        if window.exceeds(0.5):
            break
    assert window.counts[0] <= MOST_RECORDS


def test_it_holds_no_more_than_it_needs() -> None:
    window = DeadLetterWindow(86_400.0, 20)
    for turn in range(100_000):
        window.observe(turn / 10, turn // 7, 0)
    assert len(window._samples) <= MOST_RECORDS + 1  # pyright: ignore[reportPrivateUsage]


# ---- what follows ----------------------------------------------------------------------------------------------------


class StoringRecorder(ToldRecorder):
    """Keeps intents in memory; away where it is told so."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.away = False
        self.stored: dict[Scope, Intent] = {}

    async def intents(self, told: Sequence[Intent] = ()) -> list[Intent]:
        await asyncio.sleep(0)
        if self.away:
            raise StoreUnavailable("away")
        for intent in told:
            self.stored.setdefault(intent.scope, intent)
        return list(self.stored.values())


class Rig(Owned):
    """Two partitions at work, and a breaker over them."""

    def __init__(self) -> None:
        super().__init__(StoringRecorder)
        self.store = self.recorder
        assert isinstance(self.store, StoringRecorder)
        handler = HandlerSettings(max_dead_letter_ratio=0.5, dead_letter_min_records=10)
        pauses = self.assignment.pauses
        self.breaker = Breaker(Settings(handler=handler), self.assignment.partitions, pauses.trip)
        self.now = 0.0

    @property
    def states(self) -> list[State]:
        return [partition.state for partition in self.partitions]

    def turn(self, **counts: int) -> None:
        """So many records of the first partition more, then a look."""
        memory = self.partitions[0].memory
        assert memory is not None
        for cell, name in ((HANDLED, "handled"), (SKIPPED, "skipped"), (DEAD_LETTERED, "dead")):
            memory.slots[0].cells[cell] += counts.get(name, 0)
        self.now += 0.1
        self.breaker.look(self.now)

    async def look_up(self) -> None:
        self.assignment.pauses.watch(store_answers=True)
        for _ in range(10):
            await asyncio.sleep(0)


def run(scenario: Callable[[Rig, StoringRecorder], Coroutine[None, None, None]]) -> None:
    async def whole() -> None:
        rig = Rig()
        assert isinstance(rig.recorder, StoringRecorder)
        try:
            await scenario(rig, rig.recorder)
        finally:
            await rig.close()

    asyncio.run(whole())


def test_a_partition_that_fails_too_often_is_paused_and_the_store_told() -> None:
    async def scenario(rig: Rig, store: StoringRecorder) -> None:
        first = rig.partitions[0]
        rig.turn()
        rig.turn(handled=4, skipped=1, dead=5)
        assert rig.states == [State.RUNNING, State.RUNNING]
        rig.turn(dead=1)
        assert rig.states == [State.PAUSED, State.RUNNING]
        assert first.memory is not None
        assert first.memory.paused
        await rig.look_up()
        (intent,) = store.stored.values()
        assert (intent.kind, intent.scope, intent.set_by) == (IntentKind.PAUSE, Scope("orders", 0), BREAKER)
        assert intent.reason.startswith("6 of its last 11 records became dead letters, 55%")
        assert first.advice == f"{intent.reason}; mend it, then kafkasrcd resume orders:0"

    run(scenario)


def test_a_store_that_is_away_hinders_nothing_and_is_told_later() -> None:
    async def scenario(rig: Rig, store: StoringRecorder) -> None:
        first = rig.partitions[0]
        store.away = True
        rig.turn()
        rig.turn(dead=10)
        assert first.state is State.PAUSED
        await rig.look_up()
        await rig.look_up()
        assert first.state is State.PAUSED
        store.away = False
        await rig.look_up()
        assert first.state is State.PAUSED
        assert store.stored.keys() == {Scope("orders", 0)}

    run(scenario)


def test_after_a_resume_the_window_begins_anew() -> None:
    async def scenario(rig: Rig, store: StoringRecorder) -> None:
        first = rig.partitions[0]
        rig.turn()
        rig.turn(dead=10)
        await rig.look_up()
        rig.turn(dead=3)  # what was in the handler's hands
        store.stored.clear()
        await rig.look_up()
        assert rig.states == [State.RUNNING, State.RUNNING]
        assert first.memory is not None
        assert not first.memory.paused
        rig.turn(dead=1)
        rig.turn(dead=9)
        assert rig.states == [State.RUNNING, State.RUNNING]
        rig.turn(dead=1)
        assert rig.states == [State.PAUSED, State.RUNNING]

    run(scenario)


def test_a_person_who_pauses_what_the_breaker_has_paused_is_shown() -> None:
    async def scenario(rig: Rig, store: StoringRecorder) -> None:
        first = rig.partitions[0]
        rig.turn()
        rig.turn(dead=10)
        await rig.look_up()
        scope = Scope("orders", 0)
        said = Intent(kind=IntentKind.PAUSE, scope=scope, set_by="alice@a", set_ms=1, reason="I look")
        store.stored[scope] = said
        await rig.look_up()
        assert (first.state, first.paused, first.advice) == (State.PAUSED, said, "")

    run(scenario)
