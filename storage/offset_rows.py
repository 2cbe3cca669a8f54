"""The offset store's statements, on a connection that is in a transaction: the store's own, or a handler's."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from sqlalchemy import (
    BigInteger,
    Connection,
    Integer,
    Row,
    String,
    Update,
    and_,
    bindparam,
    column,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from kafkasrcd.errors import StoreError
from kafkasrcd.storage.offset_store import (
    HISTORY_KEPT_MS,
    HISTORY_STEP_MS,
    Advance,
    Claim,
    Layer,
    Layout,
    StoredOffset,
    TopicPartition,
)
from kafkasrcd.storage.refusals import refusal
from kafkasrcd.storage.schema import offset_history, offsets

_Key = tuple[TopicPartition, Layout, int]
_Names = Iterable[TopicPartition]

_OF_PARTITION = and_(
    offsets.c.group_id == bindparam("its_group"),
    offsets.c.topic == bindparam("its_topic"),
    offsets.c.partition == bindparam("its_partition"),
)
_OF_LAYOUT = and_(offsets.c.ordering == bindparam("its_ordering"), offsets.c.slots == bindparam("its_slots"))
# The names of parameters differ from those of columns, as SQLAlchemy asks for.
_TAKE = (
    update(offsets)
    .where(_OF_PARTITION)
    .values(assignment_epoch=bindparam("new_epoch"), owner=bindparam("new_owner"), updated_ms=bindparam("now_ms"))
)
_RESTART = (
    update(offsets)
    .where(_OF_PARTITION, _OF_LAYOUT)
    .values(next_offset=bindparam("new_offset"), updated_ms=bindparam("now_ms"))
)
_CATCH_UP = _RESTART.where(or_(offsets.c.next_offset.is_(None), offsets.c.next_offset < bindparam("new_offset")))
_DROP_LAYOUT = delete(offsets).where(_OF_PARTITION, _OF_LAYOUT)
_DROP_OTHERS = delete(offsets).where(
    _OF_PARTITION,
    or_(offsets.c.ordering != bindparam("its_ordering"), offsets.c.slots != bindparam("its_slots")),
)
_NOT_BACK = or_(offsets.c.next_offset.is_(None), offsets.c.next_offset <= bindparam("new_offset"))
_ADVANCE = _RESTART.where(
    offsets.c.handler_slot == bindparam("its_slot"), offsets.c.assignment_epoch == bindparam("its_epoch"), _NOT_BACK
)


def _advance_postgresql() -> Update:
    """All of an interval's advances in one statement: their columns are arrays.

    It locks the rows in the order of the arrays, which is a claim's too, before it changes any: in whatever order it
    finds them, an advance and a claim would wait for each other.
    """
    columns: list[tuple[str, type]] = [
        ("topic", String),
        ("partition", Integer),
        ("ordering", String),
        ("slots", Integer),
        ("handler_slot", Integer),
        ("assignment_epoch", BigInteger),
        ("next_offset", BigInteger),
    ]
    asked = (
        func.unnest(*(bindparam(f"all_{name}", type_=postgresql.ARRAY(kind)) for name, kind in columns))
        .table_valued(*(column(name, kind) for name, kind in columns), with_ordinality="place")
        .render_derived(name="asked")
    )
    of_group = offsets.c.group_id == bindparam("its_group")
    keys = ("topic", "partition", "ordering", "slots", "handler_slot", "assignment_epoch")
    locked = (
        select(*(asked.c[name] for name, _ in columns))
        .where(of_group, *(offsets.c[name] == asked.c[name] for name in keys))
        .order_by(asked.c.place)
        .with_for_update(of=offsets)
        .cte("locked")
    )
    return (
        update(offsets)
        .where(
            of_group,
            *(offsets.c[name] == locked.c[name] for name in keys),
            or_(offsets.c.next_offset.is_(None), offsets.c.next_offset <= locked.c.next_offset),
        )
        .values(next_offset=locked.c.next_offset, updated_ms=bindparam("now_ms"))
    )


_ADVANCE_POSTGRESQL = _advance_postgresql()
# Two hosts may write down the same minute at once.
_REMEMBER = {
    "postgresql": postgresql.insert(offset_history).on_conflict_do_nothing(),
    "sqlite": sqlite.insert(offset_history).on_conflict_do_nothing(),
}


class _Stored(msgspec.Struct):
    """One partition's rows."""

    assignment_epoch: int
    owner: str
    updated_ms: int
    layouts: dict[Layout, dict[int, int | None]]

    @property
    def layers(self) -> list[Layer]:
        """Those that say something: where every slot has an offset."""
        layers: list[Layer] = []
        for layout, slots in sorted(self.layouts.items()):
            known = [slots.get(slot) for slot in range(layout.slots)]
            next_offsets = tuple(next_offset for next_offset in known if next_offset is not None)
            if len(next_offsets) == layout.slots:
                layers.append(Layer(layout, next_offsets))
        return layers

    @property
    def next_offset(self) -> int | None:
        """Everything before is done, by what one layout or another says."""
        return max((min(layer.next_offsets) for layer in self.layers), default=None)


class OffsetRows:
    """The rows of ``group_id``. Every method runs in the caller's transaction and raises SQLAlchemy's errors."""

    def __init__(self, group_id: str, now_ms: Callable[[], int]) -> None:
        self._group_id = group_id
        self._now_ms = now_ms

    def claim(
        self, connection: Connection, names: Sequence[TopicPartition], owner: str, layout: Layout
    ) -> dict[TopicPartition, Claim]:
        """As ``OffsetStore.claim``; the caller holds a lock that keeps other claims of this group out."""
        wanted = list(dict.fromkeys(names))
        before = self._read(connection, wanted, lock=True)
        now_ms = self._now_ms()
        takes: list[dict[str, object]] = []
        missing: list[dict[str, object]] = []
        behind: list[dict[str, object]] = []
        useless: list[dict[str, object]] = []
        claims: dict[TopicPartition, Claim] = {}
        for name in wanted:
            stored = before.get(name)
            epoch = 1 if stored is None else stored.assignment_epoch + 1
            resume = None if stored is None else stored.next_offset
            layouts = {} if stored is None else stored.layouts
            layers = [] if stored is None or resume is None else stored.layers
            telling = tuple(layer for layer in layers if max(layer.next_offsets) > (resume or 0))
            claims[name] = Claim(name, epoch, resume, telling)
            if stored is not None:
                takes.append({**self._of(name), "new_epoch": epoch, "new_owner": owner, "now_ms": now_ms})
            if resume is not None and layout in layouts:
                behind.append({**self._of(name, layout), "new_offset": resume, "now_ms": now_ms})
            told = {layer.layout for layer in telling}
            useless += [self._of(name, other) for other in layouts if other != layout and other not in told]
            as_claimed = StoredOffset(name, epoch, resume, owner, now_ms)
            missing += self._slots(as_claimed, layout, layouts.get(layout, {}))
        # Slots of an earlier time with this layout catch up, before what said that they may is dropped.
        changes = ((_TAKE, takes), (insert(offsets), missing), (_CATCH_UP, behind), (_DROP_LAYOUT, useless))
        for statement, rows in changes:
            if rows:
                connection.execute(statement, rows)
        return claims

    def restart(
        self, connection: Connection, starts: Mapping[TopicPartition, tuple[int, int]], layout: Layout
    ) -> dict[TopicPartition, StoreError]:
        """As ``OffsetStore.restart``."""
        asked = {name: Advance(name, *start, layout=layout) for name, start in starts.items()}
        before = self._read(connection, asked, lock=True)
        refusals: dict[TopicPartition, StoreError] = {}
        now_ms = self._now_ms()
        rows: list[dict[str, object]] = []
        missing: list[dict[str, object]] = []
        for name, start in asked.items():
            stored = before.get(name)
            if stored is None or stored.assignment_epoch != start.assignment_epoch:
                refusals[name] = refusal(start, _as_stored(name, stored))
            else:
                rows.append({**self._of(name, layout), "new_offset": start.next_offset, "now_ms": now_ms})
                as_started = StoredOffset(name, start.assignment_epoch, start.next_offset, stored.owner, now_ms)
                # Also of another layout than the claimed one: without a row the epoch would be forgotten.
                missing += self._slots(as_started, layout, stored.layouts.get(layout, {}))
        for statement, of_statement in ((_RESTART, rows), (insert(offsets), missing), (_DROP_OTHERS, rows)):
            if of_statement:
                connection.execute(statement, of_statement)
        return refusals

    def advance(self, connection: Connection, advances: Sequence[Advance]) -> dict[TopicPartition, StoreError]:
        """As ``OffsetStore.advance``; those that are not refused are advanced, also where others are."""
        asked = {_key(advance): advance for advance in advances}
        if not asked:
            return {}
        ordered = [asked[key] for key in sorted(asked)]  # everyone in the same order: no two wait for each other
        if connection.dialect.name == "postgresql":
            changed = self._advance_postgresql(connection, ordered)
        else:
            rows = [
                {
                    **self._of(each.topic_partition, each.layout),
                    "its_slot": each.slot,
                    "its_epoch": each.assignment_epoch,
                    "new_offset": each.next_offset,
                    "now_ms": self._now_ms(),
                }
                for each in ordered
            ]
            changed = connection.execute(_ADVANCE, rows).rowcount
        if changed == len(ordered):
            return {}
        # Some matched no row. Which ones shows in the rows as they are now: what was recorded reads as asked.
        stored = self._read(connection, {each.topic_partition for each in ordered})
        refusals: dict[TopicPartition, StoreError] = {}
        for each in ordered:
            name = each.topic_partition
            found = stored.get(name)
            if not _is_recorded(each, found):
                refusals[name] = refusal(each, _as_stored(name, found, each), has_slot=_has_slot(each, found))
        return refusals

    def are_recorded(self, connection: Connection, advances: Iterable[Advance]) -> bool:
        """Whether a transaction that advanced so has been committed; waits for one that is still being committed.

        Where the partition was claimed since, the offset is at least as far.
        """
        asked = list(advances)
        stored = self._read(connection, {each.topic_partition for each in asked}, lock=True)
        return all(_is_reached(each, stored.get(each.topic_partition)) for each in asked)

    def reached(self, connection: Connection, asked: Advance) -> int | None:
        """How far the slot of ``asked`` is recorded; None where its epoch is not the partition's any more, or
        it is no slot of it. Waits for a transaction that is still being committed.
        """
        stored = self._read(connection, [asked.topic_partition], lock=True).get(asked.topic_partition)
        if stored is None or stored.assignment_epoch != asked.assignment_epoch or not _has_slot(asked, stored):
            return None
        return _of_slot(asked, stored) or 0

    def stored(self, connection: Connection) -> list[StoredOffset]:
        """As ``OffsetStore.offsets``."""
        found = self._read(connection, None)
        rows = [_as_stored(name, found[name]) for name in sorted(found)]
        return [row for row in rows if row is not None]

    def remember(self, connection: Connection, names: _Names) -> None:
        """As ``OffsetStore.remember``."""
        found = self._read(connection, names)
        at_ms = self._now_ms() // HISTORY_STEP_MS * HISTORY_STEP_MS
        rows: list[dict[str, object]] = [
            {
                "group_id": self._group_id,
                "topic": name.topic,
                "partition": name.partition,
                "at_ms": at_ms,
                "next_offset": stored.next_offset,
            }
            for name, stored in sorted(found.items())
            if stored.next_offset is not None
        ]
        if rows:
            connection.execute(_REMEMBER[connection.dialect.name], rows)
        connection.execute(
            delete(offset_history).where(
                offset_history.c.group_id == self._group_id, offset_history.c.at_ms < at_ms - HISTORY_KEPT_MS
            )
        )

    def history(self, connection: Connection, name: TopicPartition) -> list[tuple[int, int]]:
        """As ``OffsetStore.history``."""
        rows = connection.execute(
            select(offset_history.c.at_ms, offset_history.c.next_offset)
            .where(
                offset_history.c.group_id == self._group_id,
                offset_history.c.topic == name.topic,
                offset_history.c.partition == name.partition,
            )
            .order_by(offset_history.c.at_ms)
        )
        return [(at_ms, next_offset) for at_ms, next_offset in rows]

    def _advance_postgresql(self, connection: Connection, advances: Sequence[Advance]) -> int:
        parameters = {
            "its_group": self._group_id,
            "now_ms": self._now_ms(),
            "all_topic": [each.topic_partition.topic for each in advances],
            "all_partition": [each.topic_partition.partition for each in advances],
            "all_ordering": [each.layout.ordering for each in advances],
            "all_slots": [each.layout.slots for each in advances],
            "all_handler_slot": [each.slot for each in advances],
            "all_assignment_epoch": [each.assignment_epoch for each in advances],
            "all_next_offset": [each.next_offset for each in advances],
        }
        return connection.execute(_ADVANCE_POSTGRESQL, parameters).rowcount

    def _slots(self, stored: StoredOffset, layout: Layout, there: Mapping[int, int | None]) -> list[dict[str, object]]:
        """The rows of ``layout`` that are not ``there``, each of which begins as ``stored``."""
        return [
            {
                "group_id": self._group_id,
                "topic": stored.topic_partition.topic,
                "partition": stored.topic_partition.partition,
                "ordering": layout.ordering,
                "slots": layout.slots,
                "handler_slot": slot,
                "next_offset": stored.next_offset,
                "assignment_epoch": stored.assignment_epoch,
                "owner": stored.owner,
                "updated_ms": stored.updated_ms,
            }
            for slot in range(layout.slots)
            if slot not in there
        ]

    def _of(self, name: TopicPartition, layout: Layout | None = None) -> dict[str, object]:
        of_partition = {"its_group": self._group_id, "its_topic": name.topic, "its_partition": name.partition}
        return of_partition if layout is None else {
            **of_partition, "its_ordering": layout.ordering, "its_slots": layout.slots
        }  # fmt: skip

    def _read(
        self, connection: Connection, names: _Names | None, *, lock: bool = False
    ) -> dict[TopicPartition, _Stored]:
        """The rows of ``names``, or of all; locked until the end of the transaction, in the order of the key."""
        statement = select(offsets).where(offsets.c.group_id == self._group_id)
        wanted = None if names is None else set(names)
        if wanted is not None:
            statement = statement.where(offsets.c.topic.in_({name.topic for name in wanted}))
        if lock:
            # One partition after the other: those of other members of the same topic are not waited for.
            found: dict[TopicPartition, _Stored] = {}
            by_topic: dict[str, list[int]] = {}
            for name in sorted(wanted or ()):
                by_topic.setdefault(name.topic, []).append(name.partition)
            for topic, partitions in by_topic.items():
                locking = statement.where(offsets.c.topic == topic, offsets.c.partition.in_(partitions))
                locking = locking.order_by(*offsets.primary_key.columns).with_for_update()
                found |= _by_partition(connection.execute(locking))
            return found
        found = _by_partition(connection.execute(statement))
        return found if wanted is None else {name: stored for name, stored in found.items() if name in wanted}


def _by_partition(rows: Iterable[Row[tuple[object, ...]]]) -> dict[TopicPartition, _Stored]:
    found: dict[TopicPartition, _Stored] = {}
    for row in rows:
        name = TopicPartition(row.topic, row.partition)
        stored = found.setdefault(name, _Stored(row.assignment_epoch, row.owner, row.updated_ms, {}))
        stored.layouts.setdefault(Layout(row.ordering, row.slots), {})[row.handler_slot] = row.next_offset
        stored.updated_ms = max(stored.updated_ms, row.updated_ms)
    return found


def _as_stored(name: TopicPartition, stored: _Stored | None, asked: Advance | None = None) -> StoredOffset | None:
    """For an operator, or for the words about a refusal of ``asked``: then with the offset of its slot."""
    if stored is None:
        return None
    next_offset = stored.next_offset
    if asked is not None:
        next_offset = stored.layouts.get(asked.layout, {}).get(asked.slot, next_offset)
    return StoredOffset(name, stored.assignment_epoch, next_offset, stored.owner, stored.updated_ms)


def _key(advance: Advance) -> _Key:
    return advance.topic_partition, advance.layout, advance.slot


def _of_slot(asked: Advance, stored: _Stored | None) -> int | None:
    return None if stored is None else stored.layouts.get(asked.layout, {}).get(asked.slot)


def _has_slot(asked: Advance, stored: _Stored | None) -> bool:
    return stored is not None and asked.slot in stored.layouts.get(asked.layout, {})


def _is_recorded(asked: Advance, stored: _Stored | None) -> bool:
    return (
        stored is not None
        and stored.assignment_epoch == asked.assignment_epoch
        and _of_slot(asked, stored) == asked.next_offset
    )


def _is_reached(asked: Advance, stored: _Stored | None) -> bool:
    if stored is None:
        return False
    of_slot = _of_slot(asked, stored)
    if stored.assignment_epoch == asked.assignment_epoch:
        return of_slot is not None and of_slot >= asked.next_offset
    # Claimed since. A layout that had nothing more to say was dropped then.
    reached = (stored.next_offset or 0) if of_slot is None else of_slot
    return reached >= asked.next_offset
