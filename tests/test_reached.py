"""How far a partition has got, as Kafka is told of it; where one starts; and that no layout and no crash between the
two skips or repeats a record."""

import io
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest
from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, Consumer, KafkaError, KafkaException
from confluent_kafka import Message as KafkaMessage
from confluent_kafka import TopicPartition as KafkaTopicPartition
from hypothesis import given, settings
from hypothesis import strategies as st

from kafkasrcd.daemon.kafka_offsets import commit
from kafkasrcd.daemon.partition import Partition
from kafkasrcd.daemon.questions import Questions
from kafkasrcd.daemon.reached import Reached, beyond, layers_of, note_of
from kafkasrcd.daemon.start_points import StartPoint, StartPoints
from kafkasrcd.errors import GroupError
from kafkasrcd.settings import AutoOffsetReset, CommitStrategy, Ordering, Settings
from kafkasrcd.storage.memory_store import MemoryOffsetStore
from kafkasrcd.storage.offset_store import WHOLE, Advance, Layer, Layout, TopicPartition
from kafkasrcd.workers import event_log
from kafkasrcd.workers.partition_memory import KEEPS_CELL, POSITION
from kafkasrcd.workers.ring import COMMITTABLE, HEAD, PROCESSED, TAIL
from kafkasrcd.workers.spread import MOST_SLOTS, DoneBefore, layout_of, spread

NAME = TopicPartition("orders", 0)
KEY_2 = Layout("key", 2)
NONE_3 = Layout("none", 3)

# What Kafka keeps with an offset: offset.metadata.max.bytes, by default.
MOST_BYTES = 4096

OFFSETS = st.integers(0, 10**12)


def layouts(most_slots: int = MOST_SLOTS) -> st.SearchStrategy[Layout]:
    spread_out = st.builds(Layout, st.sampled_from(["key", "none"]), st.integers(2, most_slots))
    return st.one_of(st.just(WHOLE), spread_out)


@st.composite
def layers(draw: st.DrawFn, most_slots: int = 5, least: int = 0) -> Layer:
    layout = draw(layouts(most_slots))
    slots = st.lists(st.integers(least, least + 10_000), min_size=layout.slots, max_size=layout.slots)
    return Layer(layout, tuple(draw(slots)))


@st.composite
def reached(draw: st.DrawFn, most_slots: int = 5) -> Reached:
    base = draw(OFFSETS)
    own = draw(layers(most_slots, base))
    carried = draw(st.lists(layers(most_slots, base), max_size=3))
    return Reached(draw(st.integers(1, 2**40)), own.next_offsets, own.layout, tuple(carried))


# ── The note ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_note_looks_like() -> None:
    assert note_of(Reached(7, (120,), WHOLE)) == "kafkasrcd epoch 7"
    assert note_of(Reached(7, (120, 120), KEY_2)) == "kafkasrcd epoch 7"
    assert note_of(Reached(7, (125, 120), KEY_2)) == "kafkasrcd epoch 7, beyond 120; key +5 +0"
    carried = (Layer(NONE_3, (130, 90, 121)),)
    assert note_of(Reached(7, (120, 120), KEY_2, carried)) == "kafkasrcd epoch 7, beyond 120; none +10 +0 +1"


@given(reached())
def test_a_note_says_what_is_reached(original: Reached) -> None:
    base = original.next_offset
    # Offsets before the base need not be told apart: everything there is done.
    expected = tuple(
        Layer(layer.layout, tuple(max(base, each) for each in layer.next_offsets)) for layer in original.layers
    )
    assert layers_of(note_of(original), base) == expected


@given(reached(), st.integers(0, 10**12))
def test_a_note_beside_another_offset_says_nothing(original: Reached, moved_to: int) -> None:
    """A script, or a mirror, that moves an offset and carries its metadata along."""
    if moved_to != original.next_offset:
        assert layers_of(note_of(original), moved_to) == ()


@pytest.mark.parametrize(
    "note",
    [
        "",
        "kafkasrcd epoch 7",
        "kafkasrcd epoch 7, beyond 120",
        "kafkasrcd epoch 7, beyond 121; key +5 +0",
        "kafkasrcd epoch 7; key +5 +0",
        "kafkasrcd epoch 7, beyond 120; key",
        "kafkasrcd epoch 7, beyond 120; key +5 -1",
        "kafkasrcd epoch 7, beyond 120; key +5 +99999999999999999999",
        "kafkasrcd epoch 7, beyond 120; hash +5 +0",
        "kafkasrcd epoch 7, beyond 120; key +5 +0; ",
        " kafkasrcd epoch 7, beyond 120; key +5 +0",
        "kafkasrcd epoch 7, beyond 120; key +5 +0\n",
        "kafkasrcd epoch 7, beyond 12\u0660; key +5 +0",
        "AwAAAYm1Zr8A",  # Kafka Streams' own
        '{"version": 1}',
    ],
)
def test_a_note_of_anyone_else_says_nothing(note: str) -> None:
    assert layers_of(note, 120) == ()


@given(st.text(max_size=100), OFFSETS)
def test_any_text_may_be_a_note(note: str, next_offset: int) -> None:
    assert layers_of(note, next_offset) == ()


@settings(max_examples=50)
@given(st.data())
def test_a_note_fits_what_kafka_keeps(data: st.DataObject) -> None:
    """Layers that do not fit are left out whole, the oldest first: what they said is repeated, and nothing is lost."""
    base = data.draw(OFFSETS)
    far = st.integers(base, base + 10 ** data.draw(st.integers(0, 17)))
    told: list[Layer] = []
    for layout in data.draw(st.lists(layouts(), min_size=1, max_size=6)):
        told.append(Layer(layout, tuple(data.draw(st.lists(far, min_size=layout.slots, max_size=layout.slots)))))
    original = Reached(2**40, (base, *told[0].next_offsets[1:]), told[0].layout, tuple(told[1:]))
    note = note_of(original)
    assert len(note.encode()) <= MOST_BYTES
    kept = layers_of(note, base)
    assert kept == original.layers[: len(kept)]


def test_the_most_slots_fit_a_note() -> None:
    """Also where one slot is a thousand million offsets behind the others."""
    ahead = (5, *(5 + 10**9 for _ in range(MOST_SLOTS - 1)))
    original = Reached(10**6, ahead, Layout("key", MOST_SLOTS))
    assert layers_of(note_of(original), 5) == original.layers


def test_beyond_leaves_out_what_says_nothing_more() -> None:
    some, none = Layer(KEY_2, (121, 90)), Layer(NONE_3, (120, 90, 0))
    assert beyond(120, [some, none]) == (some,)
    assert beyond(121, [some, none]) == ()


# ── A start point ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_slots_of_the_same_layout_go_on_where_they_were() -> None:
    other = Layer(NONE_3, (130, 0, 0))
    point = StartPoint(1, 120, (Layer(KEY_2, (150, 110)), other))
    assert point.starts(KEY_2) == (150, 120)
    assert point.carried(KEY_2) == (other,)


def test_slots_of_another_layout_begin_at_the_offset_and_pass_over_what_is_done() -> None:
    old = Layer(KEY_2, (150, 110))
    point = StartPoint(1, 120, (old,))
    for layout in (WHOLE, NONE_3, Layout("key", 3), Layout("none", 2)):
        assert point.starts(layout) == (120,) * layout.slots
        assert point.carried(layout) == (old,)


class ToldGroup:
    """Stands for the group's member and for its consumer: what Kafka has, and answers to what is asked of it."""

    def __init__(self, ends: dict[TopicPartition, int] | None = None) -> None:
        self.ends = ends or {}
        self.beginning = 0
        self.offsets: dict[TopicPartition, tuple[int, str]] = {}
        self.times: list[int] = []
        self.problem: KafkaError | None = None

    @property
    def member(self) -> Questions:
        return cast(Questions, self)

    def call(self, function: Callable[[Consumer], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(function(cast(Consumer, self)))
        except Exception as error:
            future.set_exception(error)
        return future

    def committed(self, partitions: Sequence[KafkaTopicPartition], timeout: float) -> list[KafkaTopicPartition]:
        self._fail()
        answers: list[KafkaTopicPartition] = []
        for each in partitions:
            offset, note = self.offsets.get(TopicPartition(each.topic, each.partition), (-1001, ""))
            answers.append(KafkaTopicPartition(each.topic, each.partition, offset, metadata=note))
        return answers

    def offsets_for_times(self, partitions: Sequence[KafkaTopicPartition], timeout: float) -> list[KafkaTopicPartition]:
        self._fail()
        answers: list[KafkaTopicPartition] = []
        for each in partitions:
            self.times.append(each.offset)
            end = self.ends[TopicPartition(each.topic, each.partition)]
            # One record a millisecond, from 0 on.
            found = {OFFSET_BEGINNING: self.beginning, OFFSET_END: end}.get(each.offset, each.offset)
            answers.append(KafkaTopicPartition(each.topic, each.partition, found if found <= end else OFFSET_END))
        return answers

    def list_topics(self, timeout: float) -> Any:
        self._fail()
        topics = {
            name: SimpleNamespace(error=None, partitions=[each for each in self.ends if each.topic == name])
            for name in {each.topic for each in self.ends}
        }
        return SimpleNamespace(topics=topics)

    def commit(self, offsets: Iterable[KafkaTopicPartition], asynchronous: bool) -> list[KafkaTopicPartition]:
        self._fail()
        for each in offsets:
            assert each.metadata is not None
            assert len(each.metadata) <= MOST_BYTES
            self.offsets[TopicPartition(each.topic, each.partition)] = (each.offset, each.metadata)
        return []

    def _fail(self) -> None:
        if self.problem is not None:
            raise KafkaException(self.problem)


class Started:
    """A store, a group, and daemons that start one after the other."""

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(topics=["orders", "^shop-"], **settings)
        self.store = MemoryOffsetStore("billing")
        self.group = ToldGroup({NAME: 1000})

    def start(self, layout: Layout = WHOLE, moved: int | None = None) -> StartPoint:
        moves = {} if moved is None else {NAME: moved}
        return self.start_all([NAME], layout, moves)[NAME]

    def start_all(
        self, names: Sequence[TopicPartition], layout: Layout = WHOLE, moved: dict[TopicPartition, int] | None = None
    ) -> dict[TopicPartition, StartPoint]:
        points = StartPoints(self.settings, layout)
        return self.find(points, names, layout, moved)

    def find(
        self,
        points: StartPoints,
        names: Sequence[TopicPartition],
        layout: Layout = WHOLE,
        moved: dict[TopicPartition, int] | None = None,
    ) -> dict[TopicPartition, StartPoint]:
        claims = self.store.claim(names, "a", layout)
        return points.find(claims, moved or {}, self.store, self.group.member)

    def stored(self) -> int | None:
        return self.store.offsets()[0].next_offset

    def advance(self, start: StartPoint, next_offsets: Sequence[int], layout: Layout = WHOLE) -> None:
        advances = [Advance(NAME, start.assignment_epoch, each, slot, layout) for slot, each in enumerate(next_offsets)]
        assert self.store.advance(advances) == {}


class Events:
    """What was logged."""

    def __init__(self) -> None:
        self.stream = io.StringIO()

    def of(self, event: str) -> list[dict[str, Any]]:
        lines = [orjson.loads(line) for line in self.stream.getvalue().splitlines()]
        return [line for line in lines if line["event"] == event]


@pytest.fixture
def events() -> Iterator[Events]:
    log = logging.getLogger("kafkasrcd")
    before = log.handlers[:], log.propagate, log.level
    seen = Events()
    event_log.configure("json", "info", seen.stream)
    yield seen
    log.handlers[:], log.propagate = before[:2]
    log.setLevel(before[2])


@pytest.fixture
def periodic() -> Started:
    return Started()


@pytest.fixture
def on_checkpoint() -> Started:
    return Started(commit_strategy=CommitStrategy.ON_CHECKPOINT)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({}, 3),
        ({"auto_offset_reset": AutoOffsetReset.LATEST}, 1000),
        ({"start_from": "latest"}, 1000),
        ({"start_from": "earliest", "auto_offset_reset": AutoOffsetReset.LATEST}, 3),
        ({"start_from": "earliest", "auto_offset_reset": AutoOffsetReset.ERROR}, 3),
        ({"start_from": "offset:0"}, 0),  # whether there is such an offset, the worker finds out
        ({"start_from": "offset:5000"}, 5000),
        ({"start_from": "timestamp:1970-01-01T00:00:00.250Z"}, 250),
        ({"start_from": "timestamp:1970-01-01T01:00:00.250+01:00"}, 250),
        ({"start_from": "timestamp:1970-01-01T00:00:00.2500001Z"}, 250),  # finer than Python keeps
        ({"start_from": "timestamp:1970-01-01T00:00:00.250001Z"}, 251),
        ({"start_from": "timestamp:2100-01-01T00:00:00Z"}, 1000),
    ],
)
def test_a_partition_without_an_offset_starts_as_told_and_the_store_is_told(
    policy: dict[str, Any], expected: int
) -> None:
    started = Started(**policy)
    started.group.beginning = 3
    assert started.start() == StartPoint(1, expected)
    assert started.stored() == expected
    # One that has an offset does not: not that it would be the same.
    started.group.offsets[NAME] = (77, "")
    assert started.start().next_offset == 77


@pytest.mark.parametrize("text", ["2026-01-31T12:00:00.001Z", "2026-01-31T12:00:00.123Z", "2038-01-19T03:14:07.999Z"])
def test_a_time_is_asked_for_to_the_millisecond(text: str) -> None:
    """Not by way of a float of seconds, which comes out one short for some."""
    started = Started(start_from=f"timestamp:{text}")
    started.start()
    asked = next(time for time in started.group.times if time > 0)
    assert asked % 1000 == int(text[-4:-1])


def test_with_error_a_partition_without_an_offset_does_not_start() -> None:
    started = Started(auto_offset_reset=AutoOffsetReset.ERROR)
    point = started.start()
    assert point.next_offset is None
    assert "no committed offset" in point.problem
    assert started.stored() is None
    started.group.offsets[NAME] = (5, "")
    assert started.start().next_offset == 5


def test_where_it_is_moved_to_counts_before_everything(periodic: Started, on_checkpoint: Started) -> None:
    for started in (periodic, on_checkpoint):
        started.advance(started.start(KEY_2), (20, 10), KEY_2)
        started.group.offsets[NAME] = (10, "kafkasrcd epoch 1, beyond 10; key +10 +0")
        assert started.start(KEY_2, moved=500) == StartPoint(2, 500)
        assert started.stored() == 500
        assert started.start(KEY_2).layers == (() if started is on_checkpoint else (Layer(KEY_2, (20, 10)),))


@pytest.mark.parametrize("committed", [5, 50])
def test_kafka_decides(periodic: Started, committed: int, events: Events) -> None:
    """Someone moved the group, forwards or backwards; the store follows, and forgets what slots had done beyond."""
    periodic.advance(periodic.start(KEY_2), (30, 20), KEY_2)
    periodic.group.offsets[NAME] = (committed, "")
    assert periodic.start(KEY_2) == StartPoint(2, committed)
    assert periodic.stored() == committed
    (event,) = events.of("offsets_disagree")
    assert f"starts at {committed}: the store has 20, the group in Kafka {committed}" in event["message"]
    assert (event["level"], event["stored"], event["committed"]) == ("warning", 20, committed)
    periodic.group.offsets.clear()
    assert periodic.start(KEY_2) == StartPoint(3, committed)


def test_kafka_decides_also_what_is_done_beyond_the_same_offset(periodic: Started) -> None:
    periodic.advance(periodic.start(KEY_2), (30, 20), KEY_2)
    periodic.group.offsets[NAME] = (20, "")
    assert periodic.start(KEY_2) == StartPoint(2, 20)
    periodic.group.offsets[NAME] = (20, "kafkasrcd epoch 1, beyond 20; key +10 +0")
    assert periodic.start(KEY_2) == StartPoint(3, 20, (Layer(KEY_2, (30, 20)),))


@pytest.mark.parametrize(("committed", "level"), [(5, "info"), (50, "warning")])
def test_the_store_decides_on_checkpoint(on_checkpoint: Started, committed: int, level: str, events: Events) -> None:
    """That Kafka's offset lags behind is as it should be."""
    on_checkpoint.advance(on_checkpoint.start(KEY_2), (30, 20), KEY_2)
    on_checkpoint.group.offsets[NAME] = (committed, "kafkasrcd epoch 9, beyond 50; key +900 +0")
    assert on_checkpoint.start(KEY_2) == StartPoint(2, 20, (Layer(KEY_2, (30, 20)),))
    assert on_checkpoint.stored() == 20
    (event,) = events.of("offsets_disagree")
    assert f"starts at 20: the store has 20, the group in Kafka {committed}" in event["message"]
    assert (event["level"], event["stored"], event["committed"]) == (level, 20, committed)


def test_one_that_only_kafka_or_only_the_store_has(periodic: Started, on_checkpoint: Started, events: Events) -> None:
    for started in (periodic, on_checkpoint):
        started.group.offsets[NAME] = (20, "kafkasrcd epoch 1, beyond 20; key +10 +0")
        assert started.start(KEY_2) == StartPoint(1, 20, (Layer(KEY_2, (30, 20)),))
        assert started.stored() == 20
        started.advance(StartPoint(1, 20), (40, 35), KEY_2)
        started.group.offsets.clear()
        assert started.start(KEY_2) == StartPoint(2, 35, (Layer(KEY_2, (40, 35)),))
    assert len(events.of("start_from_store")) == 1  # of periodic: with on_checkpoint that is nothing to speak of


def test_where_kafka_does_not_answer_nothing_is_decided(periodic: Started) -> None:
    periodic.group.problem = KafkaError(KafkaError._ALL_BROKERS_DOWN)
    with pytest.raises(GroupError):
        periodic.start()
    periodic.group.problem = None
    assert periodic.start() == StartPoint(2, 0)


# ── Partitions and topics that come later ────────────────────────────────────────────────────────────────────────────

POLICIES = ["latest", "offset:500", "timestamp:2100-01-01T00:00:00Z"]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_comes_while_the_group_reads_is_read_from_its_beginning(policy: str) -> None:
    started = Started(start_from=policy)
    points = StartPoints(started.settings, WHOLE)
    points.look_around(started.group.member)
    assert started.find(points, [NAME])[NAME].next_offset != 0
    later = [TopicPartition("orders", 1), TopicPartition("orders", 2), TopicPartition("shop-eu", 0)]
    started.group.ends |= dict.fromkeys(later, 1000)
    found = started.find(points, later)
    assert [found[name].next_offset for name in later] == [0, 0, 0]


def test_a_topic_that_is_not_there_yet_is_read_from_its_beginning() -> None:
    started = Started(start_from="latest")
    points = StartPoints(started.settings, WHOLE)
    started.group.ends.clear()
    points.look_around(started.group.member)
    started.group.ends[NAME] = 1000
    assert started.find(points, [NAME])[NAME].next_offset == 0


@pytest.mark.parametrize(
    ("with_offset", "notes", "from_the_beginning"),
    [
        ((0, 1), ["kafkasrcd epoch 3"] * 2, (2, 3)),  # added while no member ran, or just before this one started
        ((0, 1), ["kafkasrcd epoch 3, beyond 7; key +5 +0", "kafkasrcd epoch 3"], (2, 3)),
        ((0, 1), ["kafkasrcd epoch 3", ""], ()),
        ((0, 1), ["", ""], ()),
        ((), [], ()),
        ((1, 3), ["kafkasrcd epoch 3"] * 2, ()),  # no way in which this daemon leaves a topic
        ((0, 1, 2, 3), ["kafkasrcd epoch 3"] * 4, ()),
    ],
)
def test_partitions_behind_those_that_this_daemon_had_are_read_from_their_beginning(
    with_offset: tuple[int, ...], notes: list[str], from_the_beginning: tuple[int, ...]
) -> None:
    names = [TopicPartition("orders", number) for number in range(4)]
    started = Started(start_from="latest")
    started.group.ends = dict.fromkeys(names, 1000)
    started.group.offsets = {names[number]: (7, note) for number, note in zip(with_offset, notes, strict=True)}
    points = StartPoints(started.settings, WHOLE)
    points.look_around(started.group.member)
    found = started.find(points, names)
    assert [found[name].next_offset for name in names] == [
        7 if number in with_offset else 0 if number in from_the_beginning else 1000 for number in range(4)
    ]


@pytest.mark.parametrize("strategy", [CommitStrategy.PERIODIC, CommitStrategy.ON_CHECKPOINT])
@pytest.mark.parametrize("how", ["looked", "found", "noted"])
def test_what_the_store_has_of_a_topic_that_was_deleted_is_void(
    strategy: CommitStrategy, how: str, events: Events
) -> None:
    """An offset that goes while the group has members went with its topic; the new one's records are others."""
    started = Started(commit_strategy=strategy, start_from="latest")
    points = StartPoints(started.settings, KEY_2)
    if how == "looked":
        started.group.offsets[NAME] = (20, "")
    points.look_around(started.group.member)
    if how == "found":
        started.group.offsets[NAME] = (20, "")
    point = started.find(points, [NAME], KEY_2)[NAME]
    started.advance(point, (1030, 1020), KEY_2)
    if how == "noted":
        points.note_committed([NAME])
    started.group.offsets.clear()
    assert started.find(points, [NAME], KEY_2)[NAME] == StartPoint(2, 0)
    assert started.stored() == 0
    (event,) = events.of("topic_recreated")
    assert (event["level"], event["stored"]) == ("warning", 1020)
    # Not again: until Kafka has an offset of the new one, the store's is all there is.
    started.advance(StartPoint(2, 0), (9, 8), KEY_2)
    assert started.find(points, [NAME], KEY_2)[NAME] == StartPoint(3, 8, (Layer(KEY_2, (9, 8)),))


def test_with_error_a_topic_that_was_created_anew_does_not_start() -> None:
    started = Started(auto_offset_reset=AutoOffsetReset.ERROR)
    points = StartPoints(started.settings, WHOLE)
    started.group.offsets[NAME] = (20, "")
    started.find(points, [NAME])
    started.group.offsets.clear()
    assert started.find(points, [NAME])[NAME].next_offset is None


def test_what_other_members_record_after_the_start_is_not_what_there_was() -> None:
    names = [TopicPartition("orders", number) for number in range(2)]
    started = Started(start_from="latest")
    started.group.ends = dict.fromkeys(names, 1000)
    for points in (StartPoints(started.settings, WHOLE), StartPoints(started.settings, WHOLE)):
        points.look_around(started.group.member)
        started.group.offsets = {names[0]: (1000, "")}
        assert started.find(points, names[1:])[names[1]].next_offset == 1000
        started.store = MemoryOffsetStore("billing")
        started.group.offsets.clear()


def test_a_look_around_that_failed_is_made_again() -> None:
    started = Started(start_from="latest")
    points = StartPoints(started.settings, WHOLE)
    started.group.problem = KafkaError(KafkaError._ALL_BROKERS_DOWN)
    points.look_around(started.group.member)
    started.group.problem = None
    with pytest.raises(GroupError):
        started.find(points, [NAME])
    assert started.find(points, [NAME])[NAME].next_offset == 1000


# ── From one daemon to the next ──────────────────────────────────────────────────────────────────────────────────────

RECORDS = 40


class Daemon:
    """One run: the partition and its memory are real; the worker and the handlers do as they are told, step by step.

    A frame is a list of offsets, which HEAD and TAIL count.
    """

    def __init__(self, log: "Log", layout: Layout) -> None:
        self.log = log
        self.layout = layout
        self.partition = Partition(NAME, log.started.settings)
        start = log.started.start(layout)
        self.partition.begin(start, layout)
        self.done_before = DoneBefore(start.carried(layout))
        self.frames: list[list[list[int]]] = [[] for _ in range(layout.slots)]
        self.read = [0] * layout.slots
        assert self.partition.memory is not None
        self.memory = self.partition.memory
        self.keeps = KEEPS_CELL[log.started.settings.commit_strategy]

    def fetch(self, count: int, killed_after: int = MOST_SLOTS) -> None:
        """As a worker hands off. One that is killed in the middle has filled some slots, and not moved the position."""
        cells = self.memory.cells
        messages = self.log.messages[cells[POSITION] : cells[POSITION] + count]
        if not messages:
            return
        next_offset = (messages[-1].offset() or 0) + 1
        if cells[POSITION] < self.done_before.until:
            messages = self.done_before.left(messages)
        for slot, part in enumerate(spread(self.layout, messages)[:killed_after]):
            if part:
                self.frames[slot].append([message.offset() or 0 for message in part])
                self.memory.slots[slot].cells[HEAD] += 1
        if killed_after < self.layout.slots:
            self.done_before = DoneBefore(self.partition.reached().carried)  # of its successor
        else:
            cells[POSITION] = next_offset

    def handle(self, slot: int, count: int) -> None:
        """As a handler process works off its ring."""
        cells, frames = self.memory.slots[slot].cells, self.frames[slot]
        while self.read[slot] < len(frames):
            for offset in frames[self.read[slot]]:
                if offset >= cells[PROCESSED]:
                    if not count:
                        return
                    count -= 1
                    self.log.handle(offset)
                    cells[PROCESSED] = offset + 1
            self.read[slot] += 1
            self._release(slot)

    def die_handling(self, slot: int) -> None:
        """As a handler process that is killed: its successor reads again what is not done for good."""
        cells = self.memory.slots[slot].cells
        cells[PROCESSED] = cells[self.keeps]
        self.read[slot] = cells[TAIL]

    def checkpoint(self, slot: int) -> None:
        """As a handler process commits its transaction, where a call has done something since the last one."""
        cells = self.memory.slots[slot].cells
        if cells[PROCESSED] == cells[COMMITTABLE]:
            return
        advance = Advance(NAME, self.memory.epoch, cells[PROCESSED], slot, self.layout)
        assert self.log.started.store.advance([advance]) == {}
        cells[COMMITTABLE] = cells[PROCESSED]
        self._release(slot)
        self.log.keep(self.layout, slot, cells[COMMITTABLE])

    def _release(self, slot: int) -> None:
        cells, frames = self.memory.slots[slot].cells, self.frames[slot]
        while cells[TAIL] < self.read[slot] and frames[cells[TAIL]][-1] < cells[self.keeps]:
            cells[TAIL] += 1

    def record(self, *, crash_between: bool = False) -> None:
        """As the recorder does, in the store and then in Kafka."""
        started, at = self.log.started, self.partition.reached()
        advances = [
            Advance(NAME, at.assignment_epoch, each, slot, at.layout)
            for slot, each in enumerate(at.next_offsets)
            if not (at.stored and at.stored[slot])
        ]
        assert started.store.advance(advances) == {}
        if crash_between:
            return
        commit(cast(Consumer, started.group), {NAME: at})
        if self.keeps == PROCESSED:
            self.log.keep_all()

    def finish(self) -> None:
        """Everything there is."""
        self.fetch(RECORDS)
        for slot in range(self.layout.slots):
            self.handle(slot, RECORDS)
            if self.keeps == COMMITTABLE:
                self.checkpoint(slot)
        self.record()

    def die(self) -> None:
        self.partition.end()
        self.log.forget()


class Log:
    """The records of a partition, and what became of each."""

    def __init__(self, keys: Sequence[bytes | None], strategy: CommitStrategy) -> None:
        self.messages = [
            KafkaMessage(topic=NAME.topic, partition=NAME.partition, offset=offset, key=key)
            for offset, key in enumerate(keys)
        ]
        self.started = Started(commit_strategy=strategy)
        self.started.group.ends[NAME] = len(keys)
        self.handled: list[int] = []
        self.kept: set[int] = set()
        """Recorded for good: not to be handled again."""
        self.order: dict[bytes, list[int]] = defaultdict(list)
        self._unkept: set[int] = set()

    def handle(self, offset: int) -> None:
        assert offset not in self.kept, f"{offset} is handled again"
        self.handled.append(offset)
        self._unkept.add(offset)
        key = self.messages[offset].key()
        if key is not None:
            self.order[key].append(offset)

    def keep_all(self) -> None:
        self.kept |= self._unkept
        self._unkept.clear()

    def keep(self, layout: Layout, slot: int, before: int) -> None:
        mine = {message.offset() for message in spread(layout, self.messages)[slot]}
        done = {offset for offset in self._unkept if offset in mine and offset < before}
        self.kept |= done
        self._unkept -= done

    def forget(self) -> None:
        self._unkept.clear()


KEYS = st.lists(st.sampled_from([None, b"a", b"b", b"c", b"d", b"e"]), min_size=RECORDS, max_size=RECORDS)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("fetch"), st.integers(1, 10)),
        st.tuples(st.just("fetch"), st.integers(1, 10), st.integers(0, 4)),
        st.tuples(st.just("handle"), st.integers(0, 4), st.integers(1, 5)),
        st.tuples(st.just("die_handling"), st.integers(0, 4)),
        st.tuples(st.just("checkpoint"), st.integers(0, 4)),
        st.tuples(st.just("record")),
    ),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("strategy", [CommitStrategy.PERIODIC, CommitStrategy.ON_CHECKPOINT])
@given(keys=KEYS, runs=st.lists(st.tuples(layouts(5), STEPS, st.booleans()), max_size=5), last=layouts(5))
def test_no_layout_and_no_crash_skips_or_repeats_a_record(
    strategy: CommitStrategy,
    keys: list[bytes | None],
    runs: list[tuple[Layout, list[tuple[Any, ...]], bool]],
    last: Layout,
) -> None:
    """Daemons of random layouts, whose workers and handler processes die at random points, and at last they themselves:
    records handled and recorded are not handled again, none is left out, and, while there is an order, records of one
    key come in it."""
    log = Log(keys, strategy)
    ordered = last.ordering != "none"
    for layout, steps, crash_between in runs:
        ordered = ordered and layout.ordering != "none"
        daemon = Daemon(log, layout)
        for kind, *numbers in steps:
            if kind == "fetch":
                daemon.fetch(*numbers)
            elif kind == "handle":
                daemon.handle(numbers[0] % layout.slots, numbers[1])
            elif kind == "die_handling":
                daemon.die_handling(numbers[0] % layout.slots)
            elif kind == "checkpoint" and daemon.keeps == COMMITTABLE:
                daemon.checkpoint(numbers[0] % layout.slots)
            else:
                daemon.record()
        if crash_between:
            daemon.record(crash_between=True)
        daemon.die()
    daemon = Daemon(log, last)
    daemon.finish()
    daemon.die()
    assert set(log.handled) == set(range(RECORDS))
    assert log.started.group.offsets[NAME][0] == RECORDS
    if ordered:
        for offsets in log.order.values():
            assert _first_times(offsets) == sorted(set(offsets))


def _first_times(offsets: list[int]) -> list[int]:
    return list(dict.fromkeys(offsets))


@given(st.integers(1, 240), st.lists(st.one_of(st.none(), st.binary(max_size=4)), max_size=30))
def test_layouts_of_a_process_number(processes: int, keys: list[bytes | None]) -> None:
    """Every record has one slot; those of a key have the same one, whatever comes with them."""
    messages = [KafkaMessage(topic="t", partition=0, offset=each, key=key) for each, key in enumerate(keys)]
    for ordering in Ordering:
        layout = layout_of(ordering, processes)
        parts = spread(layout, messages)
        assert sorted(message.offset() or 0 for part in parts for message in part) == list(range(len(keys)))
        assert all(spread(layout, [message])[slot] for slot, part in enumerate(parts) for message in part)
        if ordering is Ordering.KEY:
            for key in set(keys) - {None}:
                assert sum(any(message.key() == key for message in part) for part in parts) == 1
