"""The contract of ``OffsetStore``, over every implementation."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kafkasrcd.errors import ConfigurationError, OffsetWentBackwards, StaleAssignment, StoreError
from kafkasrcd.storage.memory_store import MemoryOffsetStore
from kafkasrcd.storage.offset_store import (
    WHOLE,
    Advance,
    Claim,
    Layer,
    Layout,
    OffsetStore,
    StoredOffset,
    TopicPartition,
)
from kafkasrcd.storage.opening import open_store
from kafkasrcd.storage.postgresql import PostgresqlDatabase
from kafkasrcd.storage.sql_store import SqlOffsetStore
from kafkasrcd.storage.sqlite import SqliteDatabase
from tests.postgres import PostgresServer

BUSY_TIMEOUT_MS = 5_000
ORDERS = [TopicPartition("orders", partition) for partition in range(4)]
FIRST = ORDERS[0]
PAYMENTS = TopicPartition("payments", 0)
BY_KEY = Layout("key", 4)
BY_KEY_OF_TWO = Layout("key", 2)

type_of_url: dict[str, type[OffsetStore]] = {
    "memory": MemoryOffsetStore,
    "sqlite": SqlOffsetStore,
    "postgresql": SqlOffsetStore,
}
KINDS = [
    pytest.param(kind, marks=pytest.mark.postgres) if kind == "postgresql" else pytest.param(kind)
    for kind in type_of_url
]


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        return server.url(server.create_database())
    return {"memory": "memory://", "sqlite": f"sqlite:///{tmp_path}/state/offsets.db"}[request.param]


@pytest.fixture
def store(url: str) -> Iterator[OffsetStore]:
    opened = open_store(url, "billing", BUSY_TIMEOUT_MS)
    assert type(opened) is type_of_url[url.partition(":")[0]]
    yield opened
    opened.close()


def epoch(claims: dict[TopicPartition, Claim], topic_partition: TopicPartition = FIRST) -> int:
    return claims[topic_partition].assignment_epoch


def recorded(store: OffsetStore) -> dict[TopicPartition, int | None]:
    return {row.topic_partition: row.next_offset for row in store.offsets()}


class TestClaim:
    def test_first_claim_has_nothing_recorded(self, store: OffsetStore) -> None:
        assert store.claim([FIRST], "host-a") == {FIRST: Claim(FIRST, 1, None)}

    def test_every_claim_has_a_higher_epoch_also_by_the_same_owner(self, store: OffsetStore) -> None:
        epochs = [epoch(store.claim([FIRST], owner)) for owner in ("host-a", "host-a", "host-b", "host-a")]
        assert epochs == sorted(set(epochs))

    def test_answers_what_the_owner_before_recorded(self, store: OffsetStore) -> None:
        store.advance([Advance(FIRST, epoch(store.claim([FIRST], "host-a")), 120)])
        assert store.claim([FIRST], "host-b")[FIRST].next_offset == 120

    def test_epochs_are_per_partition(self, store: OffsetStore) -> None:
        store.claim([FIRST], "host-a")
        claims = store.claim(ORDERS, "host-a")
        assert [epoch(claims, each) for each in ORDERS] == [2, 1, 1, 1]

    def test_a_partition_named_twice_is_claimed_once(self, store: OffsetStore) -> None:
        assert store.claim([FIRST, FIRST], "host-a") == {FIRST: Claim(FIRST, 1, None)}

    def test_of_nothing(self, store: OffsetStore) -> None:
        assert store.claim([], "host-a") == {}
        assert store.offsets() == []


class TestAdvance:
    def test_forward_and_to_the_same_offset(self, store: OffsetStore) -> None:
        mine = epoch(store.claim([FIRST], "host-a"))
        for next_offset in (0, 0, 1, 2**40, 2**40):
            assert store.advance([Advance(FIRST, mine, next_offset)]) == {}
            assert recorded(store) == {FIRST: next_offset}

    def test_of_an_earlier_owner_is_stale(self, store: OffsetStore) -> None:
        mine = epoch(store.claim([FIRST], "host-a"))
        store.advance([Advance(FIRST, mine, 120)])
        store.claim([FIRST], "host-b")
        refusals = store.advance([Advance(FIRST, mine, 121)])
        assert isinstance(refusals[FIRST], StaleAssignment)
        for part in ("orders[0]", "121", "epoch 1 ", "host-b", "epoch 2,", "120"):
            assert part in str(refusals[FIRST])
        assert recorded(store) == {FIRST: 120}

    def test_backwards_is_refused(self, store: OffsetStore) -> None:
        mine = epoch(store.claim([FIRST], "host-a"))
        store.advance([Advance(FIRST, mine, 120)])
        refusals = store.advance([Advance(FIRST, mine, 119)])
        assert isinstance(refusals[FIRST], OffsetWentBackwards)
        for part in ("orders[0]", "119", "120", "epoch 1 ", "host-a"):
            assert part in str(refusals[FIRST])
        assert recorded(store) == {FIRST: 120}

    def test_of_an_earlier_owner_is_stale_also_where_it_goes_backwards(self, store: OffsetStore) -> None:
        mine = epoch(store.claim([FIRST], "host-a"))
        store.advance([Advance(FIRST, mine, 120)])
        store.claim([FIRST], "host-b")
        for next_offset in (119, 120):
            assert isinstance(store.advance([Advance(FIRST, mine, next_offset)])[FIRST], StaleAssignment)

    def test_without_a_claim_is_stale(self, store: OffsetStore) -> None:
        refusals = store.advance([Advance(FIRST, 1, 5)])
        assert isinstance(refusals[FIRST], StaleAssignment)
        assert "orders[0]" in str(refusals[FIRST])
        assert store.offsets() == []

    def test_a_refusal_does_not_hold_up_the_others(self, store: OffsetStore) -> None:
        stale, backwards, good, other_topic = ORDERS[0], ORDERS[1], ORDERS[2], PAYMENTS
        claims = store.claim([*ORDERS, PAYMENTS], "host-a")
        store.advance([Advance(each, claim.assignment_epoch, 10) for each, claim in claims.items()])
        store.claim([stale], "host-b")
        refusals = store.advance(
            Advance(each, epoch(claims, each), 9 if each == backwards else 11)
            for each in (stale, backwards, good, other_topic)
        )
        assert {each: type(refused) for each, refused in refusals.items()} == {
            stale: StaleAssignment,
            backwards: OffsetWentBackwards,
        }
        assert recorded(store) == {stale: 10, backwards: 10, good: 11, ORDERS[3]: 10, other_topic: 11}

    def test_the_last_of_several_for_one_partition_counts(self, store: OffsetStore) -> None:
        before, after = (epoch(store.claim([FIRST], owner)) for owner in ("host-a", "host-a"))
        assert store.advance([Advance(FIRST, before, 7), Advance(FIRST, after, 9)]) == {}
        assert recorded(store) == {FIRST: 9}

    def test_of_nothing(self, store: OffsetStore) -> None:
        assert store.advance([]) == {}

    @pytest.mark.parametrize("logical", [-1, -2, -1001])
    def test_logical_offsets_of_librdkafka_are_no_offsets(self, store: OffsetStore, logical: int) -> None:
        mine = epoch(store.claim([FIRST], "host-a"))
        with pytest.raises(ValueError, match=r"orders\[0\]"):
            Advance(FIRST, mine, logical)
        with pytest.raises(ValueError, match=r"orders\[0\]"):
            store.restart({FIRST: (mine, logical)})
        assert recorded(store) == {FIRST: None}


class TestRestart:
    @pytest.mark.parametrize("elsewhere", [0, 119, 120, 121, 500])
    def test_anywhere_and_on_from_there(self, store: OffsetStore, elsewhere: int) -> None:
        mine = epoch(store.claim([FIRST], "host-a"))
        store.advance([Advance(FIRST, mine, 120)])
        assert store.restart({FIRST: (mine, elsewhere)}) == {}
        assert recorded(store) == {FIRST: elsewhere}
        assert store.advance([Advance(FIRST, mine, elsewhere + 1)]) == {}
        assert store.claim([FIRST], "host-b")[FIRST].next_offset == elsewhere + 1

    def test_of_an_earlier_owner_is_stale(self, store: OffsetStore) -> None:
        mine = epoch(store.claim([FIRST], "host-a"))
        store.claim([FIRST], "host-b")
        refusals = store.restart({FIRST: (mine, 5)})
        assert isinstance(refusals[FIRST], StaleAssignment)
        assert "host-b" in str(refusals[FIRST])
        assert recorded(store) == {FIRST: None}

    def test_without_a_claim_is_stale_and_the_others_restart(self, store: OffsetStore) -> None:
        mine = epoch(store.claim([FIRST], "host-a"))
        refusals = store.restart({PAYMENTS: (1, 5), FIRST: (mine, 5)})
        assert {each: type(refused) for each, refused in refusals.items()} == {PAYMENTS: StaleAssignment}
        assert recorded(store) == {FIRST: 5}

    def test_of_nothing(self, store: OffsetStore) -> None:
        assert store.restart({}) == {}


class TestLayouts:
    def test_nothing_recorded_in_any_slot(self, store: OffsetStore) -> None:
        assert store.claim([FIRST], "host-a", BY_KEY) == {FIRST: Claim(FIRST, 1, None)}
        assert recorded(store) == {FIRST: None}

    def test_everything_is_done_before_the_slot_that_is_furthest_behind(self, store: OffsetStore) -> None:
        layer = by_key(store, 50, 80, 60, 70)
        assert recorded(store) == {FIRST: 50}
        assert store.claim([FIRST], "host-b", BY_KEY) == {FIRST: Claim(FIRST, 2, 50, (layer,))}

    def test_slots_that_are_all_as_far_say_nothing_more(self, store: OffsetStore) -> None:
        by_key(store, 50, 50, 50, 50)
        assert store.claim([FIRST], "host-b", BY_KEY) == {FIRST: Claim(FIRST, 2, 50)}

    def test_a_claim_of_another_layout_is_told_what_the_slots_had_done(self, store: OffsetStore) -> None:
        layer = by_key(store, 50, 80, 60, 70)
        claim = store.claim([FIRST], "host-b", BY_KEY_OF_TWO)[FIRST]
        assert claim == Claim(FIRST, 2, 50, (layer,))
        # Until the new slots have passed it, also to whoever claims next.
        ahead = [Advance(FIRST, 2, next_offset, slot, BY_KEY_OF_TWO) for slot, next_offset in enumerate((65, 90))]
        assert store.advance(ahead) == {}
        assert store.claim([FIRST], "host-a")[FIRST] == Claim(
            FIRST, 3, 65, (Layer(BY_KEY_OF_TWO, (65, 90)), layer)
        )  # fmt: skip

    def test_what_says_nothing_more_is_forgotten(self, store: OffsetStore) -> None:
        by_key(store, 50, 80, 60, 70)
        store.advance([Advance(FIRST, epoch(store.claim([FIRST], "host-b")), 80)])
        assert store.claim([FIRST], "host-b") == {FIRST: Claim(FIRST, 3, 80)}

    def test_slots_of_an_earlier_time_go_on_where_everything_is_done(self, store: OffsetStore) -> None:
        by_key(store, 50, 80, 60, 70)
        store.advance([Advance(FIRST, epoch(store.claim([FIRST], "host-b")), 100)])
        assert store.claim([FIRST], "host-a", BY_KEY) == {FIRST: Claim(FIRST, 3, 100)}
        assert recorded(store) == {FIRST: 100}
        assert store.claim([FIRST], "host-a", BY_KEY) == {FIRST: Claim(FIRST, 4, 100)}

    def test_a_claim_makes_the_slots_of_every_layout_stale(self, store: OffsetStore) -> None:
        by_key(store, 50, 80, 60, 70)
        store.claim([FIRST], "host-b")
        refusals = store.advance([Advance(FIRST, 1, 90, 2, BY_KEY)])
        assert isinstance(refusals[FIRST], StaleAssignment)
        assert "host-b" in str(refusals[FIRST])

    def test_a_slot_of_a_layout_that_is_not_claimed_is_refused(self, store: OffsetStore) -> None:
        mine = epoch(store.claim([FIRST], "host-a", BY_KEY))
        assert store.advance([Advance(FIRST, mine, 7, 1, BY_KEY_OF_TWO)]).keys() == {FIRST}
        assert recorded(store) == {FIRST: None}

    @pytest.mark.parametrize(("slot", "layout"), [(4, BY_KEY), (-1, BY_KEY), (0, BY_KEY_OF_TWO), (0, WHOLE)])
    def test_a_slot_that_was_not_claimed_has_its_own_words(self, store: OffsetStore, slot: int, layout: Layout) -> None:
        layer = by_key(store, 50, 80, 60, 70)
        refusals = store.advance([Advance(FIRST, 1, 90, slot, layout)])
        assert isinstance(refusals[FIRST], StaleAssignment)
        assert f"slot {slot} of {layout.slots} by {layout.ordering}" in str(refusals[FIRST])
        assert store.claim([FIRST], "host-a", BY_KEY)[FIRST].layers == (layer,)

    def test_one_slot_that_is_refused_names_its_partition_and_the_others_are_recorded(self, store: OffsetStore) -> None:
        by_key(store, 50, 80, 60, 70)
        asked = [Advance(FIRST, 1, next_offset, slot, BY_KEY) for slot, next_offset in enumerate((81, 79, 82, 83))]
        refusals = store.advance(asked)
        assert isinstance(refusals[FIRST], OffsetWentBackwards)
        assert "80" in str(refusals[FIRST])
        assert store.claim([FIRST], "host-a", BY_KEY)[FIRST].layers == (Layer(BY_KEY, (81, 80, 82, 83)),)

    def test_a_restart_sets_every_slot_and_forgets_other_layouts(self, store: OffsetStore) -> None:
        by_key(store, 50, 80, 60, 70)
        mine = epoch(store.claim([FIRST], "host-b", BY_KEY_OF_TWO))
        assert store.restart({FIRST: (mine, 10)}, BY_KEY_OF_TWO) == {}
        assert store.claim([FIRST], "host-b", BY_KEY) == {FIRST: Claim(FIRST, 3, 10)}

    def test_a_restart_with_another_layout_than_the_claimed_one_keeps_owner_and_epoch(self, store: OffsetStore) -> None:
        by_key(store, 50, 80, 60, 70)
        assert store.restart({FIRST: (1, 10)}, BY_KEY_OF_TWO) == {}
        assert [(row.assignment_epoch, row.next_offset, row.owner) for row in store.offsets()] == [(1, 10, "host-a")]
        assert store.advance([Advance(FIRST, 1, 11, slot, BY_KEY_OF_TWO) for slot in range(2)]) == {}
        assert store.claim([FIRST], "host-b", BY_KEY) == {FIRST: Claim(FIRST, 2, 11)}

    def test_partitions_differ_in_their_layouts(self, store: OffsetStore) -> None:
        layer = by_key(store, 50, 80, 60, 70)
        store.advance([Advance(PAYMENTS, epoch(store.claim([PAYMENTS], "host-a"), PAYMENTS), 7)])
        assert store.claim([FIRST, PAYMENTS], "host-b", BY_KEY_OF_TWO) == {
            FIRST: Claim(FIRST, 2, 50, (layer,)),
            PAYMENTS: Claim(PAYMENTS, 2, 7),
        }


def by_key(store: OffsetStore, *next_offsets: int) -> Layer:
    """Have host-a claim FIRST by ``BY_KEY`` and get so far."""
    mine = epoch(store.claim([FIRST], "host-a", BY_KEY))
    assert store.restart({FIRST: (mine, min(next_offsets))}, BY_KEY) == {}
    advances = [Advance(FIRST, mine, next_offset, slot, BY_KEY) for slot, next_offset in enumerate(next_offsets)]
    assert store.advance(advances) == {}
    return Layer(BY_KEY, next_offsets)


class TestOffsets:
    def test_every_row_in_order(self, store: OffsetStore) -> None:
        store.claim([PAYMENTS, ORDERS[2]], "host-b")
        store.advance([Advance(FIRST, epoch(store.claim([FIRST], "host-a")), 7)])
        rows = [(row.topic_partition, row.assignment_epoch, row.next_offset, row.owner) for row in store.offsets()]
        assert rows == [(FIRST, 1, 7, "host-a"), (ORDERS[2], 1, None, "host-b"), (PAYMENTS, 1, None, "host-b")]

    @pytest.mark.parametrize("make", [MemoryOffsetStore, None], ids=["memory", "sqlite"])
    def test_rows_say_when_they_changed(self, make: type[MemoryOffsetStore] | None, tmp_path: Path) -> None:
        clock = iter((1_000, 2_000, 3_000))

        def now_ms() -> int:
            return next(clock)

        store: OffsetStore
        if make is None:
            store = SqlOffsetStore(
                SqliteDatabase(f"sqlite:///{tmp_path}/offsets.db", BUSY_TIMEOUT_MS), "billing", now_ms=now_ms
            )
        else:
            store = make("billing", now_ms=now_ms)
        mine = epoch(store.claim([FIRST], "host-a"))
        seen = [store.offsets()[0].updated_ms]
        store.advance([Advance(FIRST, mine, 7)])
        seen.append(store.offsets()[0].updated_ms)
        store.restart({FIRST: (mine, 3)})
        seen.append(store.offsets()[0].updated_ms)
        assert seen == [1_000, 2_000, 3_000]
        store.close()


class TestHistory:
    @pytest.fixture
    def clock(self) -> list[int]:
        """Milliseconds since 1970, 10 s into a minute."""
        return [1_700_000_050_000]

    @pytest.fixture
    def store(self, url: str, clock: list[int]) -> Iterator[OffsetStore]:
        with closing(with_clock(url, "billing", clock)) as opened:
            yield opened

    def test_is_empty_at_first(self, store: OffsetStore) -> None:
        store.claim([FIRST], "host-a")
        store.remember(ORDERS)
        store.remember([])
        assert store.history(FIRST) == []

    def test_has_one_entry_a_minute_and_partition(self, store: OffsetStore, clock: list[int]) -> None:
        started, mine = clock[0], epoch(store.claim([FIRST, PAYMENTS], "host-a"))
        for seconds in range(0, 120, 15):
            clock[0] = started + seconds * 1000
            assert store.advance([Advance(each, mine, seconds) for each in (FIRST, PAYMENTS)]) == {}
            store.remember([FIRST] if seconds < 60 else [FIRST, PAYMENTS])
        minute = started // 60_000 * 60_000
        assert store.history(FIRST) == [(minute, 0), (minute + 60_000, 60)]
        assert store.history(PAYMENTS) == [(minute + 60_000, 60)]

    def test_has_what_everything_is_done_before(self, store: OffsetStore) -> None:
        by_key(store, 50, 80, 60, 70)
        store.remember([FIRST])
        assert [next_offset for _, next_offset in store.history(FIRST)] == [50]

    def test_is_kept_for_a_day_whoever_writes_it_down(self, store: OffsetStore, clock: list[int]) -> None:
        started, mine = clock[0], epoch(store.claim([FIRST, PAYMENTS], "host-a"))
        day_ms = 24 * 3_600_000
        assert store.advance([Advance(each, mine, 7) for each in (FIRST, PAYMENTS)]) == {}
        for at_ms in (started, started + 60_000, started + day_ms):
            clock[0] = at_ms
            store.remember([FIRST, PAYMENTS])
        assert len(store.history(FIRST)) == 3
        clock[0] = started + day_ms + 60_000
        store.remember([PAYMENTS])
        assert [at_ms - started // 60_000 * 60_000 for at_ms, _ in store.history(FIRST)] == [60_000, day_ms]
        assert len(store.history(PAYMENTS)) == 3

    def test_is_of_one_group(self, store: OffsetStore, url: str, clock: list[int]) -> None:
        with closing(with_clock(url, "audit", clock)) as other:
            for each in (store, other):
                assert each.advance([Advance(FIRST, epoch(each.claim([FIRST], "host-a")), 7)]) == {}
            other.remember([FIRST])
            clock[0] += 48 * 3_600_000
            store.remember([FIRST])
            assert (len(store.history(FIRST)), len(other.history(FIRST))) == (1, 1)

    def test_goes_back_where_the_offset_does(self, store: OffsetStore, clock: list[int]) -> None:
        mine = epoch(store.claim([FIRST], "host-a"))
        for next_offset in (120, 5):
            assert store.restart({FIRST: (mine, next_offset)}) == {}
            store.remember([FIRST])
            clock[0] += 60_000
        assert [next_offset for _, next_offset in store.history(FIRST)] == [120, 5]


def with_clock(url: str, group: str, clock: list[int]) -> OffsetStore:
    """As ``open_store``; the time is what ``clock`` has."""
    if url == "memory://":
        return MemoryOffsetStore(group, now_ms=lambda: clock[0])
    is_sqlite = url.startswith("sqlite")
    database = (SqliteDatabase if is_sqlite else PostgresqlDatabase)(url, BUSY_TIMEOUT_MS)
    return SqlOffsetStore(database, group, now_ms=lambda: clock[0])


class TestOpening:
    @pytest.mark.parametrize(
        ("url", "named"),
        [
            ("", "''"),
            ("offsets.db", "sqlite:///path"),
            ("mysql://me:secret@db/kafka", "'mysql'"),
            ("postgresql+asyncpg://me:secret@db/kafka", "'postgresql+asyncpg'"),
            ("postgresql://me:secret@db", "no database"),
            ("memory://somewhere", "'memory'"),
            ("sqlite+aiosqlite:///x.db", "'sqlite+aiosqlite'"),
            ("sqlite://", "names no file"),
            ("sqlite://var/lib/x.db", "four slashes"),
            ("sqlite://localhost:port/x.db", "is not a URL"),
            ("postgresql://me@db:secret/kafka", "is not a URL"),
            ("sqlite:///", "names no file"),
            ("sqlite:///:memory:", "memory://"),
            ("sqlite:///x.db?mode=ro", "nothing may follow"),
            ("sqlite:x.db", "sqlite:////"),
        ],
    )
    def test_anything_else_is_refused_by_name(self, url: str, named: str) -> None:
        with pytest.raises(ConfigurationError) as refused:
            open_store(url, "billing", BUSY_TIMEOUT_MS)
        assert "store.url" in str(refused.value)
        assert named in str(refused.value)
        assert "secret" not in str(refused.value)


partitions = st.sampled_from([*ORDERS, PAYMENTS])
owners = st.sampled_from(["host-a", "host-b"])
# Around the epochs and offsets that a run gets to, so that each outcome is met often.
epochs_back = st.integers(-1, 3)
moves = st.lists(st.tuples(partitions, epochs_back, st.integers(0, 30)), max_size=8)


class StoreMachine(RuleBasedStateMachine):
    """Any sequence of calls, beside a model that is a dict."""

    def __init__(self, open_it: Callable[[], OffsetStore], keeps: bool) -> None:
        super().__init__()
        self.open_it = open_it
        self.keeps = keeps
        self.store = open_it()
        self.model: dict[TopicPartition, tuple[int, int | None, str]] = {}

    @rule(wanted=st.lists(partitions, max_size=5), owner=owners)
    def claim(self, wanted: list[TopicPartition], owner: str) -> None:
        claims = self.store.claim(wanted, owner)
        assert list(claims) == list(dict.fromkeys(wanted))
        for topic_partition, claim in claims.items():
            last_epoch, next_offset, _ = self.model.get(topic_partition, (0, None, ""))
            assert claim == Claim(topic_partition, last_epoch + 1, next_offset)
            self.model[topic_partition] = (last_epoch + 1, next_offset, owner)

    @rule(asked=moves)
    def advance(self, asked: list[tuple[TopicPartition, int, int]]) -> None:
        advances = [Advance(each, self.epoch_of(each) - back, next_offset) for each, back, next_offset in asked]
        refusals = self.store.advance(advances)
        assert self.kinds(refusals) == self.expect({each.topic_partition: each for each in advances}, back=False)

    @rule(asked=moves)
    def restart(self, asked: list[tuple[TopicPartition, int, int]]) -> None:
        starts = {each: (self.epoch_of(each) - back, next_offset) for each, back, next_offset in asked}
        refusals = self.store.restart(starts)
        assert self.kinds(refusals) == self.expect({key: Advance(key, *to) for key, to in starts.items()}, back=True)

    @precondition(lambda self: self.keeps)
    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.open_it()

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        rows = self.store.offsets()
        assert [row.topic_partition for row in rows] == sorted(self.model)
        for row in rows:
            assert isinstance(row, StoredOffset)
            assert (row.assignment_epoch, row.next_offset, row.owner) == self.model[row.topic_partition]

    def teardown(self) -> None:
        self.store.close()

    def epoch_of(self, topic_partition: TopicPartition) -> int:
        return self.model.get(topic_partition, (0, None, ""))[0]

    @staticmethod
    def kinds(refusals: dict[TopicPartition, StoreError]) -> dict[TopicPartition, type[StoreError]]:
        return {topic_partition: type(refused) for topic_partition, refused in refusals.items()}

    def expect(self, asked: dict[TopicPartition, Advance], back: bool) -> dict[TopicPartition, type[StoreError]]:
        refused: dict[TopicPartition, type[StoreError]] = {}
        for topic_partition, advance in asked.items():
            current, next_offset, owner = self.model.get(topic_partition, (None, None, ""))
            if current is None or current != advance.assignment_epoch:
                refused[topic_partition] = StaleAssignment
            elif not back and next_offset is not None and advance.next_offset < next_offset:
                refused[topic_partition] = OffsetWentBackwards
            else:
                self.model[topic_partition] = (current, advance.next_offset, owner)
        return refused


@pytest.mark.parametrize("kind", KINDS)
def test_any_sequence_of_calls_agrees_with_the_model(kind: str, request: pytest.FixtureRequest) -> None:
    server: PostgresServer | None = request.getfixturevalue("postgres") if kind == "postgresql" else None
    with TemporaryDirectory() as folder:
        runs = iter(range(1_000_000))

        class Machine(StoreMachine):
            def __init__(self) -> None:
                group = f"billing-{next(runs)}"
                if server is not None:
                    url = server.url()  # a group of its own each time: a new database takes 50 ms
                else:
                    url = "memory://" if kind == "memory" else f"sqlite:///{folder}/{group}.db"
                super().__init__(lambda: open_store(url, group, BUSY_TIMEOUT_MS), keeps=kind != "memory")

        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
            ),
        )


RECORDS = 40
layouts = st.sampled_from([WHOLE, BY_KEY, BY_KEY_OF_TWO, Layout("key", 3), Layout("none", 2)])


def slot_of(layout: Layout, offset: int) -> int:
    """Any mapping that depends on the two alone."""
    return (offset * 7 + len(layout.ordering)) % layout.slots


class SpreadMachine(RuleBasedStateMachine):
    """A partition changes its owner and its layout at any moment, and no record is handled twice or passed over."""

    def __init__(self, store: OffsetStore) -> None:
        super().__init__()
        self.store = store
        self.handled: list[int] = []
        self.take_over(WHOLE)

    @rule(layout=layouts)
    def take_over(self, layout: Layout) -> None:
        claim = self.store.claim([FIRST], "host-a", layout)[FIRST]
        if claim.next_offset is None:
            assert self.store.restart({FIRST: (claim.assignment_epoch, 0)}, layout) == {}
        self.epoch, self.layout = claim.assignment_epoch, layout
        start = claim.next_offset or 0
        self.done_before = set(range(start)) | {
            offset
            for layer in claim.layers
            for offset in range(RECORDS)
            if offset < layer.next_offsets[slot_of(layer.layout, offset)]
        }
        self.reached = [start] * layout.slots
        for layer in claim.layers:
            if layer.layout == layout:
                self.reached = [max(start, next_offset) for next_offset in layer.next_offsets]

    @rule(moves=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=4))
    def handle(self, moves: list[tuple[int, int]]) -> None:
        """Some slots get some records further, in one interval."""
        moved = {slot % self.layout.slots: by for slot, by in moves}
        advances: list[Advance] = []
        for slot, by in moved.items():
            before, after = self.reached[slot], min(self.reached[slot] + by, RECORDS)
            self.handled += [
                offset
                for offset in range(before, after)
                if slot_of(self.layout, offset) == slot and offset not in self.done_before
            ]
            self.reached[slot] = after
            advances.append(Advance(FIRST, self.epoch, after, slot, self.layout))
        assert self.store.advance(advances) == {}

    @invariant()
    def nothing_is_handled_twice(self) -> None:
        assert len(self.handled) == len(set(self.handled))

    @invariant()
    def nothing_is_passed_over(self) -> None:
        (row,) = self.store.offsets()
        assert set(range(row.next_offset or 0)) <= set(self.handled)

    def teardown(self) -> None:
        self.take_over(WHOLE)
        self.handle([(0, RECORDS)])
        assert sorted(self.handled) == list(range(RECORDS))
        self.store.close()


@pytest.mark.parametrize("kind", KINDS)
def test_each_record_is_handled_once_through_any_changes_of_layout(kind: str, request: pytest.FixtureRequest) -> None:
    server: PostgresServer | None = request.getfixturevalue("postgres") if kind == "postgresql" else None
    with TemporaryDirectory() as folder:
        runs = iter(range(1_000_000))

        class Machine(SpreadMachine):
            def __init__(self) -> None:
                group = f"spread-{next(runs)}"
                if server is not None:
                    url = server.url()
                else:
                    url = "memory://" if kind == "memory" else f"sqlite:///{folder}/{group}.db"
                super().__init__(open_store(url, group, BUSY_TIMEOUT_MS))

        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
            ),
        )
