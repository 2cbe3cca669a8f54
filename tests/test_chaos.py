"""Two short storms; and that the checks of a storm can fail, which every long one relies on.

`make chaos` has longer ones.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from kafkasrcd.daemon.status import PartitionStatus, Status, WorkerStatus
from kafkasrcd.settings import CommitStrategy, Ordering
from kafkasrcd.storage.dead_letters import DeadLetter, LetterState, StoredLetter
from tests.chaos.daemon_log import defects
from tests.chaos.disturbance import Disturbance
from tests.chaos.excuses import COMMIT_SECONDS, Excuse, Excuses
from tests.chaos.fault import LANE_OF, FaultKind, Role
from tests.chaos.handling import Handling
from tests.chaos.letters import judge_letters, letter_troubles
from tests.chaos.payment import DIED, LETTER_ERRORS, Flaw, Payment
from tests.chaos.plan import draw_plan
from tests.chaos.producer import PER_10_000
from tests.chaos.stalls import longest_stall_seconds, longest_stalls_by_partition
from tests.chaos.storm import Storm
from tests.chaos.sums import TURN_RECORDS, Rules, SumsWatch, at_rest, imbalance, lot_differences
from tests.chaos.verdict import differences, judge
from tests.kafka_cluster import KafkaCluster
from tests.ledger import Coordinate
from tests.postgres import PostgresServer

KILLED_PID = 7


@pytest.mark.timeout(600)
def test_each_effect_is_made_once_in_a_storm_on_checkpoint(kafka_three: KafkaCluster, postgres: PostgresServer) -> None:
    _weather(kafka_three, postgres, 13, CommitStrategy.ON_CHECKPOINT, Ordering.KEY)


@pytest.mark.timeout(600)
def test_nothing_is_lost_in_a_storm_and_repeated_only_what_a_fault_explains(
    kafka_three: KafkaCluster, postgres: PostgresServer
) -> None:
    _weather(kafka_three, postgres, 1, CommitStrategy.PERIODIC, Ordering.PARTITION)


def _weather(
    cluster: KafkaCluster, postgres: PostgresServer, seed: int, strategy: CommitStrategy, ordering: Ordering
) -> None:
    report = Storm(draw_plan(seed, 35), cluster, strategy, ordering, postgres=postgres).run()
    print("\n".join(report.lines()))
    assert not report.troubles, "\n".join(report.lines())
    assert report.messages > 1_000
    assert report.letters > 20
    assert report.sums > 50
    assert report.injected.total() > 10


# ── The plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_seed_gives_the_same_storm() -> None:
    assert draw_plan(7, 180) == draw_plan(7, 180)
    assert [str(fault) for fault in draw_plan(7, 180).faults] == [str(fault) for fault in draw_plan(7, 180).faults]
    assert draw_plan(7, 180) != draw_plan(8, 180)


def test_storms_have_every_kind_of_fault_and_every_kind_of_process() -> None:
    faults = [fault for seed in range(1, 11) for fault in draw_plan(seed, 180).faults]
    assert {fault.kind for fault in faults} == set(FaultKind) == LANE_OF.keys()
    assert {fault.role for fault in faults if fault.kind is FaultKind.KILL} == set(Role)
    assert {fault.role for fault in faults if fault.kind is FaultKind.FREEZE} == set(Role)


def test_a_short_storm_adds_no_partitions() -> None:
    assert not any(fault.kind is FaultKind.ADD_PARTITION for seed in range(50) for fault in draw_plan(seed, 35).faults)


def test_a_plan_ends_with_its_storm_and_starts_what_it_has_ended() -> None:
    for seed in range(50):
        plan = draw_plan(seed, 60)
        assert all(0 < fault.at_seconds < 60 for fault in plan.faults)
        assert all(fault.target < plan.daemons for fault in plan.faults if fault.kind is FaultKind.START)
        assert list(plan.faults) == sorted(plan.faults, key=lambda fault: fault.at_seconds)


# ── The verdict ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass
class Ledger:
    """Payments 0 to 19 of two accounts in turn, in partition 0, each handled once, one a second."""

    produced: dict[Coordinate, Payment]
    handlings: list[Handling]


@pytest.fixture
def ledger() -> Ledger:
    produced = {Coordinate(0, n): Payment(n, f"account-{n % 2}", 10 + n) for n in range(20)}
    handlings = [_handled(where, payment, payment.number) for where, payment in produced.items()]
    return Ledger(produced, handlings)


def _handled(where: Coordinate, payment: Payment, second: float, *, pid: int = KILLED_PID, daemon: int = 0) -> Handling:
    at_ns = int(second * 1e9)
    return Handling(where, payment, at_ns, at_ns, daemon, pid, f"process {pid}")


@pytest.mark.parametrize("ordering", [Ordering.PARTITION, Ordering.KEY])
def test_a_good_ledger_is_found_good(ledger: Ledger, ordering: Ordering) -> None:
    verdict = judge(ledger.produced, ledger.handlings, ordering)
    assert not any(verdict)


def test_a_lost_record_is_found(ledger: Ledger) -> None:
    del ledger.handlings[11]
    verdict = judge(ledger.produced, ledger.handlings, Ordering.PARTITION)
    assert verdict.lost == [Coordinate(0, 11)]
    assert not any(verdict._replace(lost=[]))


def test_a_doubled_record_is_found(ledger: Ledger) -> None:
    again = ledger.handlings[11]._replace(order=10**12)
    verdict = judge(ledger.produced, [*ledger.handlings, again], Ordering.PARTITION)
    assert verdict.repeats == [(ledger.handlings[11], again)]
    assert not any(verdict._replace(repeats=[]))


def test_a_record_that_nobody_produced_is_found(ledger: Ledger) -> None:
    del ledger.produced[Coordinate(0, 11)]
    assert judge(ledger.produced, ledger.handlings, Ordering.PARTITION).foreign == [Coordinate(0, 11)]


def test_a_payment_whose_place_nobody_knows_is_to_be_handled_all_the_same(ledger: Ledger) -> None:
    payment = ledger.produced.pop(Coordinate(0, 11))
    unplaced = {payment.number: payment}
    assert not judge(ledger.produced, ledger.handlings, Ordering.PARTITION, unplaced).foreign
    assert not judge(ledger.produced, ledger.handlings, Ordering.PARTITION, unplaced).lost
    without = [*ledger.handlings[:11], *ledger.handlings[12:]]
    assert judge(ledger.produced, without, Ordering.PARTITION, unplaced).lost == [payment]


def test_a_record_with_anothers_content_is_found(ledger: Ledger) -> None:
    ledger.handlings[11] = ledger.handlings[11]._replace(payment=ledger.handlings[13].payment)
    assert len(judge(ledger.produced, ledger.handlings, Ordering.PARTITION).altered) == 1


def _swapped(handlings: Sequence[Handling], one: int, other: int) -> list[Handling]:
    swapped = list(handlings)
    swapped[one] = handlings[one]._replace(order=handlings[other].order)
    swapped[other] = handlings[other]._replace(order=handlings[one].order)
    return swapped


def test_disorder_is_found_within_what_is_ordered(ledger: Ledger) -> None:
    neighbours = _swapped(ledger.handlings, 10, 11)  # of two accounts
    assert len(judge(ledger.produced, neighbours, Ordering.PARTITION).disorder) == 1
    assert not judge(ledger.produced, neighbours, Ordering.KEY).disorder
    of_one_account = _swapped(ledger.handlings, 10, 12)
    assert judge(ledger.produced, of_one_account, Ordering.PARTITION).disorder
    assert len(judge(ledger.produced, of_one_account, Ordering.KEY).disorder) == 1


def test_a_record_passed_over_and_handled_later_is_disorder(ledger: Ledger) -> None:
    late = ledger.handlings[11]._replace(order=10**12)
    handlings = [*ledger.handlings[:11], *ledger.handlings[12:], late]
    assert len(judge(ledger.produced, handlings, Ordering.PARTITION).disorder) == 1


def test_a_wrong_balance_is_found() -> None:
    assert not differences({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert len(differences({"a": 1, "b": 2, "c": 0}, {"b": 3, "d": 1})) == 3


# ── The dead letters ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def flawed() -> dict[Coordinate, Payment]:
    """A payment with each flaw, at the offset that is its number."""
    return {Coordinate(0, n): Payment(n, "account-1", 10, flaw) for n, flaw in enumerate(Flaw)}


def _letter(payment: Payment, *, offset: int | None = None, **fields: Any) -> StoredLetter:
    whole: dict[str, Any] = {
        "topic": "payments",
        "partition": 0,
        "offset": payment.number if offset is None else offset,
        "timestamp_ms": 0,
        "key": payment.key,
        "value": payment.value,
        "headers": None,
        "value_format": "json",
        "error": LETTER_ERRORS.get(payment.flaw, ""),
        "reason": "",
        "attempts": 3,
        "first_failed_ms": 0,
        "last_failed_ms": 0,
        "host": "",
        "version": "",
    }
    return StoredLetter(id=1, state=LetterState.OPEN, changed_ms=0, letter=DeadLetter(**{**whole, **fields}))


def _letters_of(flawed: dict[Coordinate, Payment]) -> list[StoredLetter]:
    return [_letter(payment) for payment in flawed.values() if payment.flaw in LETTER_ERRORS]


def test_a_storm_has_every_flaw_and_few_of_them() -> None:
    assert PER_10_000.keys() == set(Flaw) - {Flaw.NONE}
    assert sum(PER_10_000.values()) < 200


def test_each_payment_has_a_value_of_its_own_and_is_read_back_but_for_what_is_unreadable() -> None:
    for flaw in Flaw:
        payment = Payment(7, "account-1", 10, flaw)
        assert b'"number":7,' in payment.value
        if flaw is not Flaw.UNREADABLE:
            assert msgspec.json.decode(payment.value, type=Payment) == payment
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(Payment(7, "account-1", 10, Flaw.UNREADABLE).value)


def test_the_letters_that_there_must_be_are_found_good(flawed: dict[Coordinate, Payment]) -> None:
    found = judge_letters(flawed, _letters_of(flawed))
    assert found.payments == {where: each for where, each in flawed.items() if each.flaw in LETTER_ERRORS}
    assert not any(found[1:])


def test_a_missing_letter_is_found(flawed: dict[Coordinate, Payment]) -> None:
    for gone in _letters_of(flawed):
        where = Coordinate(0, gone.letter.offset)
        left = [each for each in _letters_of(flawed) if each != gone]
        assert judge_letters(flawed, left).missing == [where]
        unplaced = [flawed[where]]
        placed = {at: payment for at, payment in flawed.items() if at != where}
        assert judge_letters(placed, left, unplaced).missing == unplaced
        assert not any(judge_letters(placed, _letters_of(flawed), unplaced)[1:])


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("wrong", {"error": "KeyError"}),
        ("wrong", {"key": None}),
        ("foreign", {"value": None}),
        ("foreign", {"value": b'{"number":1}'}),
        ("foreign", {"offset": 77}),
        ("foreign", {"partition": 1}),
    ],
)
def test_a_letter_that_is_not_as_it_was_produced_is_found(
    flawed: dict[Coordinate, Payment], kind: str, change: dict[str, Any]
) -> None:
    letters = _letters_of(flawed)
    letters[0] = _letter(flawed[Coordinate(0, letters[0].letter.offset)], **change)
    found = judge_letters(flawed, letters)
    assert len(getattr(found, kind)) == 1
    assert not any(found._replace(payments={}, missing=[], **{kind: []}))


def test_a_letter_that_is_there_twice_or_not_open_is_found(flawed: dict[Coordinate, Payment]) -> None:
    letters = _letters_of(flawed)
    assert len(judge_letters(flawed, [*letters, letters[0]]).wrong) == 1
    letters[0] = msgspec.structs.replace(letters[0], state=LetterState.REPLAYED)
    assert len(judge_letters(flawed, letters).wrong) == 1


def test_a_letter_of_a_good_payment_is_found(flawed: dict[Coordinate, Payment]) -> None:
    for flaw in (Flaw.NONE, Flaw.REFUSED_ONCE):
        (good,) = (payment for payment in flawed.values() if payment.flaw is flaw)
        letters = _letters_of(flawed)
        assert len(judge_letters(flawed, [*letters, _letter(good, error="KeyError")]).undeserved) == 1
        blamed = judge_letters(flawed, [*letters, _letter(good, error=DIED)])
        assert [each.letter.offset for each in blamed.quarantined] == [good.number]
        assert not blamed.undeserved


def test_what_is_handled_and_dead_lettered_is_found_and_what_is_either_is_not_lost(ledger: Ledger) -> None:
    where = Coordinate(0, 11)
    letters = {where: ledger.produced[where]}
    assert judge(ledger.produced, ledger.handlings, Ordering.PARTITION, letters=letters).both == [where]
    del ledger.handlings[11]
    assert not any(judge(ledger.produced, ledger.handlings, Ordering.PARTITION, letters=letters))


def test_a_letter_of_a_payment_whose_place_nobody_knows_is_not_foreign(ledger: Ledger) -> None:
    payment = ledger.produced.pop(Coordinate(0, 11))
    del ledger.handlings[11]
    unplaced = {payment.number: payment}
    letters = {Coordinate(0, 11): payment}
    assert not any(judge(ledger.produced, ledger.handlings, Ordering.PARTITION, unplaced, letters))
    assert judge(ledger.produced, ledger.handlings, Ordering.PARTITION, {}, letters).foreign == [Coordinate(0, 11)]


def test_a_good_payment_is_blamed_only_for_deaths_that_the_storm_made() -> None:
    kills = [_fault(FaultKind.KILL, Role.HANDLER, second, second) for second in (1, 2, 3)]
    at_ns = 4 * 10**9
    assert Excuses(kills, []).of_quarantine(3, at_ns)
    assert not Excuses(kills, []).of_quarantine(4, at_ns)
    assert not Excuses(kills, []).of_quarantine(3, at_ns - 2 * 10**9)
    assert not Excuses([*kills[:2], kills[2]._replace(daemon=1)], []).of_quarantine(3, at_ns)
    assert not Excuses([*kills[:2], kills[2]._replace(role=Role.WORKER)], []).of_quarantine(3, at_ns)


def test_a_good_payment_may_be_done_and_blamed_where_its_process_was_killed_three_times(
    flawed: dict[Coordinate, Payment],
) -> None:
    good = flawed[Coordinate(0, 0)]
    letters = judge_letters(flawed, [*_letters_of(flawed), _letter(good, error=DIED, last_failed_ms=2**50)])
    kills = [_fault(FaultKind.KILL, Role.HANDLER, second, second) for second in (1, 2, 3)]
    here = Coordinate(0, 0)
    assert not letter_troubles(letters, [here], Excuses(kills, []), undone=False)
    assert len(letter_troubles(letters, [here], Excuses(kills, []), undone=True)) == 1
    assert len(letter_troubles(letters, [Coordinate(0, 1)], Excuses(kills, []), undone=False)) == 1
    assert len(letter_troubles(letters, [here], Excuses(kills[:2], []), undone=False)) == 1


# ── The counts ───────────────────────────────────────────────────────────────────────────────────────────────────────

ONE_SLOT = Rules(slots=1, rolls_back=False, retries=2)
TWO_SLOTS = ONE_SLOT._replace(slots=2)
ROLLING_BACK = ONE_SLOT._replace(rolls_back=True)


def _status(
    messages: int = 100,
    succeeded: int = 90,
    dead_lettered: int = 4,
    skipped: int = 1,
    *,
    position: int | None = 100,
    processed: int | None = 95,
    failures: int = 0,
) -> PartitionStatus:
    """With 5 in flight, by its counts and by its offsets."""
    return PartitionStatus(
        topic="payments",
        partition=0,
        state="running",
        since_ms=0,
        problem="",
        assignment_epoch=1,
        handlers=[0],
        position=position,
        processed=processed,
        committed=None,
        high_watermark=None,
        lag=None,
        messages=messages,
        succeeded=succeeded,
        skipped=skipped,
        dead_lettered=dead_lettered,
        failures=failures,
        bytes=0,
        rate=0.0,
        bytes_rate=0.0,
        last_commit_ms=None,
        worker=WorkerStatus(pid=1, restarts=0, cpu_percent=0.0, rss_bytes=0),
    )


@pytest.mark.parametrize("rules", [ONE_SLOT, TWO_SLOTS, ROLLING_BACK])
def test_counts_that_add_up_are_found_good_also_while_they_move(rules: Rules) -> None:
    still = _status()
    assert imbalance(still, still, rules) is None
    later = _status(150, 140, position=150, processed=145)
    assert imbalance(still, later, rules) is None
    unknown = _status(0, 0, 0, 0, position=None, processed=None)
    assert imbalance(unknown, still, rules) is None
    assert imbalance(still, unknown, rules) is None
    assert imbalance(still, _status(succeeded=90 - TURN_RECORDS), rules) is None, "a turn that is not counted yet"


def test_a_record_that_is_counted_twice_or_not_at_all_is_found() -> None:
    twice_finished = _status(succeeded=91)
    assert imbalance(twice_finished, twice_finished, ONE_SLOT)
    assert not imbalance(twice_finished, twice_finished, TWO_SLOTS), "one may be finished behind the prefix"
    assert not imbalance(twice_finished, twice_finished, ROLLING_BACK)
    more_than_all = _status(succeeded=96)
    assert imbalance(more_than_all, more_than_all, TWO_SLOTS)
    for rules in (ONE_SLOT, TWO_SLOTS, ROLLING_BACK):
        forgotten = _status(succeeded=90 - TURN_RECORDS * rules.slots - 1)
        assert imbalance(forgotten, forgotten, rules)
        consumed_twice = _status(messages=100 + TURN_RECORDS * rules.slots + 1)
        assert imbalance(consumed_twice, consumed_twice, rules)


def test_what_is_in_flight_at_rest_is_found() -> None:
    assert not at_rest([_status(95)], ONE_SLOT)
    assert len(at_rest([_status(96), _status(95)], ONE_SLOT)) == 1
    assert len(at_rest([_status(94)], ONE_SLOT)) == 1
    assert len(at_rest([_status(96)], ROLLING_BACK)) == 1
    assert not at_rest([_status(94)], ROLLING_BACK), "what was rolled back has counted again"


def test_a_lot_that_is_counted_otherwise_than_it_is_is_found() -> None:
    lot = {0: [Payment(number, "account-1", 10, flaw) for number, flaw in enumerate(Flaw) if flaw is not Flaw.DEADLY]}
    before = {0: _status(95)}
    after = {0: _status(100, 92, 7, failures=6)}
    assert not lot_differences(before, after, lot, ONE_SLOT)
    for wrong in (
        _status(101, 92, 7, failures=6),
        _status(100, 93, 7, failures=6),
        _status(100, 92, 8, failures=6),
        _status(100, 92, 7, 2, failures=6),
        _status(100, 92, 7, failures=7),
    ):
        assert len(lot_differences(before, {0: wrong}, lot, ONE_SLOT)) == 1
    assert len(lot_differences(before, after, {}, ONE_SLOT)) == 1


def test_only_counts_of_one_epoch_of_one_process_are_compared() -> None:
    def status(pid: int, **changes: Any) -> Status:
        partition = msgspec.structs.replace(_status(succeeded=200), **changes)
        return Status(
            kafkasrcd="", group_id="", state="running", pid=pid, started_ms=0, now_ms=0, problems=[], rebalances=0,
            total_commits=0, partitions=[partition], handlers=[],
        )  # fmt: skip

    watch = SumsWatch([], ONE_SLOT)
    watch.compare(0, status(1), status(2))
    watch.compare(0, status(1), status(1, assignment_epoch=2))
    assert (watch.compared, watch.troubles) == (0, [])
    watch.compare(0, status(1), status(1))
    assert watch.compared == len(watch.troubles) == 1
    assert "partition 0 of daemon a, epoch 1: " in watch.troubles[0]


# ── What explains a repeat ───────────────────────────────────────────────────────────────────────────────────────────


def _excuse(ledger: Ledger, number: int, *disturbances: Disturbance, again_second: float = 30.0) -> Excuse | None:
    """Of payment `number`, handled once more by another daemon."""
    earlier = ledger.handlings[number]
    later = _handled(earlier.coordinate, earlier.payment, again_second, pid=KILLED_PID + 1, daemon=1)
    return Excuses(disturbances, [*ledger.handlings, later]).excuse(earlier, later)


def _fault(
    kind: FaultKind, role: Role | None, first: float, last: float, *, daemon: int | None = 0, pid: int = KILLED_PID
) -> Disturbance:
    return Disturbance(kind, daemon, role, int(first * 1e9), int(last * 1e9), frozenset({pid}))


def test_a_killed_handler_explains_the_record_in_its_hands_and_no_other(ledger: Ledger) -> None:
    kill = _fault(FaultKind.KILL, Role.HANDLER, 19.5, 19.5)
    assert _excuse(ledger, 19, kill) is Excuse.IN_HANDS
    assert _excuse(ledger, 18, kill) is None
    assert _excuse(ledger, 19, kill._replace(pids=frozenset({KILLED_PID + 2}))) is None
    assert _excuse(ledger, 19) is None


def test_a_killed_supervisor_explains_what_was_past_its_last_commit(ledger: Ledger) -> None:
    kill = _fault(FaultKind.KILL, Role.SUPERVISOR, 15.5, 15.5, pid=1)
    assert _excuse(ledger, 15, kill) is Excuse.NOT_COMMITTED
    assert _excuse(ledger, 16, kill) is None
    assert _excuse(ledger, int(15.5 - COMMIT_SECONDS), kill) is None
    assert _excuse(ledger, 15, kill._replace(daemon=1)) is None


def test_an_outage_makes_it_more_and_explains_nothing_alone(ledger: Ledger) -> None:
    kill = _fault(FaultKind.KILL, Role.SUPERVISOR, 15.5, 15.5, pid=1)
    outage = _fault(FaultKind.KILL_BROKER, None, 9, 14, daemon=None, pid=2)
    assert _excuse(ledger, 9, kill, outage) is Excuse.NOT_COMMITTED
    assert _excuse(ledger, 3, kill, outage) is None
    assert _excuse(ledger, 10, outage) is None


def test_a_coordinator_that_was_away_for_a_session_explains_what_its_members_had_not_committed(
    ledger: Ledger,
) -> None:
    away = _fault(FaultKind.KILL_BROKER, None, 9, 16, daemon=None, pid=2)
    assert _excuse(ledger, 10, away) is Excuse.NOT_COMMITTED
    assert _excuse(ledger, int(9 - COMMIT_SECONDS) - 1, away) is None
    assert _excuse(ledger, 10, away._replace(kind=FaultKind.STOP_BROKER)) is None  # it hands its groups over


def test_a_clean_stop_and_a_killed_worker_explain_nothing(ledger: Ledger) -> None:
    stop = _fault(FaultKind.STOP, None, 19.5, 19.5, pid=1)
    assert _excuse(ledger, 19, stop, _fault(FaultKind.KILL, Role.WORKER, 19.5, 19.5, pid=2)) is None
    assert _excuse(ledger, 19, stop, stop) is Excuse.IN_HANDS  # told twice: handlers are not waited for


def test_an_end_that_is_told_twice_may_miss_its_last_commit_in_a_rebalance_that_waits_for_another(
    ledger: Ledger,
) -> None:
    stops = [_fault(FaultKind.STOP, None, second, second, pid=1) for second in (18, 18.5)]
    frozen = _fault(FaultKind.FREEZE, Role.SUPERVISOR, 9, 19, daemon=1, pid=2)
    assert _excuse(ledger, 7, *stops, frozen) is Excuse.NOT_COMMITTED
    assert _excuse(ledger, 7, *stops) is None
    assert _excuse(ledger, 7, stops[0], frozen) is None
    assert _excuse(ledger, 4, *stops, frozen) is None


def test_a_freeze_explains_what_was_not_committed_where_the_session_did_not_outlast_it(ledger: Ledger) -> None:
    assert _excuse(ledger, 9, _fault(FaultKind.FREEZE_DAEMON, None, 10, 14, pid=1)) is None
    assert _excuse(ledger, 9, _fault(FaultKind.FREEZE_DAEMON, None, 10, 19, pid=1)) is Excuse.NOT_COMMITTED
    twice = [_fault(FaultKind.FREEZE, Role.SUPERVISOR, first, first + 4, pid=1) for first in (10, 14.5)]
    assert _excuse(ledger, 9, *twice) is Excuse.NOT_COMMITTED


def test_what_was_frozen_in_a_handler_may_be_done_once_more_after_the_thaw(ledger: Ledger) -> None:
    freeze = _fault(FaultKind.FREEZE, Role.HANDLER, 20, 34, daemon=1, pid=KILLED_PID + 1)
    assert _excuse(ledger, 12, freeze, again_second=34.0) is Excuse.THAWED
    more = _handled(Coordinate(1, 0), Payment(99, "account-0", 1), 33, pid=KILLED_PID + 1, daemon=1)
    ledger.handlings.append(more)
    assert _excuse(ledger, 12, freeze, again_second=34.0) is None


# ── Stalls, logs ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stall_is_time_with_something_to_handle_and_nothing_handled() -> None:
    payment = Payment(0, "account-0", 1)
    acknowledged = {Coordinate(0, 0): 1, Coordinate(0, 1): 2, Coordinate(0, 2): 100, Coordinate(1, 0): 2}
    acknowledged_ns = {where: second * 10**9 for where, second in acknowledged.items()}
    seconds = {Coordinate(0, 0): 3, Coordinate(0, 1): 9, Coordinate(0, 2): 101, Coordinate(1, 0): 6}
    handlings = [_handled(where, payment, second) for where, second in seconds.items()]
    assert longest_stall_seconds(acknowledged_ns, handlings) == 3
    assert longest_stalls_by_partition(acknowledged_ns, handlings) == {0: 6, 1: 4}


def test_a_defect_in_a_log_is_found() -> None:
    good = '{"event":"worker_died","level":"error","time":"","message":""}\n{"event":"cut sho'
    assert not defects(good)
    assert len(defects(good + '\n{"event":"defect","level":"error","time":"","message":"","traceback":"T"}')) == 1
    assert len(defects(good + "\nTraceback (most recent call last):\n  File")) == 1
    raised = '{"event":"handler_failed","level":"error","message":"handle raised %s at t[0]@1: no","traceback":"T"}'
    assert not defects(raised % "PaymentRefused")
    assert not defects(raised % "Reject")
    assert len(defects(raised % "OperationalError")) == 1
