"""Two short storms; and that the checks of a storm can fail, which every long one relies on.

`make chaos` has longer ones.
"""

import dataclasses
from collections.abc import Sequence

import pytest

from kafkasrcd.settings import CommitStrategy, Ordering
from tests.chaos.daemon_log import defects
from tests.chaos.disturbance import Disturbance
from tests.chaos.excuses import COMMIT_SECONDS, Excuse, Excuses
from tests.chaos.fault import LANE_OF, FaultKind, Role
from tests.chaos.handling import Handling
from tests.chaos.payment import Payment
from tests.chaos.plan import draw_plan
from tests.chaos.stalls import longest_stall_seconds, longest_stalls_by_partition
from tests.chaos.storm import Storm
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
