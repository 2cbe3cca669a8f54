"""One storm, from the first daemon to the verdict."""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import psutil
from confluent_kafka import KafkaException

from kafkasrcd.daemon.status import PartitionStatus
from kafkasrcd.errors import KafkasrcdError
from kafkasrcd.settings import CommitStrategy, Ordering
from kafkasrcd.storage.dead_letters import DeadLetter
from tests.chaos.daemon_log import alarms, defects
from tests.chaos.daemon_slot import DaemonSlot, described
from tests.chaos.effects import balances, create_tables, handlings_in_table
from tests.chaos.excuses import Excuses
from tests.chaos.fault import daemon_name
from tests.chaos.group import GroupView, view_group
from tests.chaos.handlers import DAEMON_VARIABLE
from tests.chaos.handling import Handling, handlings_in_files
from tests.chaos.injector import Injector
from tests.chaos.left_behind import MARK_VARIABLE, left_behind
from tests.chaos.letters import Letters, judge_letters, letters_in_store
from tests.chaos.payment import LETTER_ERRORS
from tests.chaos.plan import PARTITIONS, Plan
from tests.chaos.producer import PaymentProducer
from tests.chaos.report import StormReport, shortened
from tests.chaos.stalls import longest_stall_seconds, longest_stalls_by_partition
from tests.chaos.sums import Rules, SumsWatch, at_rest, lot_differences
from tests.chaos.verdict import differences, judge
from tests.daemon_process import HANDLERS, QUICK_SESSION, DaemonProcess
from tests.kafka_cluster import KafkaCluster, KafkaFailed
from tests.ledger import Coordinate
from tests.postgres import PostgresServer
from tests.waiting import wait_until

MESSAGES_PER_SECOND = 300
FIRST_HANDLED_DEADLINE_SECONDS = 60.0
CAUGHT_UP_DEADLINE_SECONDS = 180.0
WHOLE_GROUP_DEADLINE_SECONDS = 90.0
"""For rebalances to end: one that waits for a member in vain waits for the rebalance timeout, 50 s."""
GONE_DEADLINE_SECONDS = 10.0
"""For processes whose supervisor has ended. The design says 2 s; a machine as busy as after a storm gets more."""

CRASH_ATTEMPTS = 3
RETRIES = 2
LOT_OF_EACH = 40
"""Payments with each flaw, of which the counts are looked at exactly, once everything is quiet."""
COUNTED_DEADLINE_SECONDS = 10.0
REST_ATTEMPTS = 3

_SETTINGS = (
    *QUICK_SESSION,
    "supervisor.drain_timeout_seconds=10",
    # Not what is tested: a storm kills the same process as often as it likes.
    "supervisor.worker_restarts=1000",
    # The storm's own kills count as well: a good record has to meet three of them in a row to be quarantined.
    f"handler.crash_attempts={CRASH_ATTEMPTS}",
    f"max_retries={RETRIES}",
    "retry_backoff_ms=20",
    # 5 minutes otherwise until a new partition is seen.
    "extra_config.topic.metadata.refresh.interval.ms=2000",
    "extra_config.reconnect.backoff.max.ms=1000",
)


class Storm:
    """Offsets, and with `on_checkpoint` the effects, are in `postgres`; where that is None, offsets are in a file.

    A folder gets the logs; it is removed after a storm in which nothing went wrong, unless `keep`.
    """

    def __init__(
        self,
        plan: Plan,
        cluster: KafkaCluster,
        strategy: CommitStrategy,
        ordering: Ordering,
        *,
        postgres: PostgresServer | None,
        tell: Callable[[str], None] = print,
        keep: bool = False,
    ) -> None:
        self._plan = plan
        self._cluster = cluster
        self._strategy = strategy
        self._ordering = ordering
        self._tell = tell
        self._keep = keep
        self._mark = uuid.uuid4().hex
        self._topic = f"chaos-{plan.seed}-{self._mark[:8]}"
        self._folder = Path(tempfile.mkdtemp(prefix=f"kafkasrcd-chaos-{plan.seed}-"))
        self._postgres = postgres
        self._database = ""
        self._store_url = f"sqlite:///{self._folder / 'offsets.db'}"
        if postgres is not None:
            self._database = postgres.create_database()
            self._store_url = postgres.url(self._database)
            create_tables(postgres, self._database)
        self._lock = threading.Lock()
        self._troubles: list[str] = []
        self._slots = [self._slot(number) for number in range(plan.daemons)]
        self._producer = PaymentProducer(cluster.client_settings(), self._topic, plan.seed, MESSAGES_PER_SECOND)
        slots = 1 if ordering is Ordering.PARTITION else HANDLERS
        self._rules = Rules(slots, rolls_back=strategy is CommitStrategy.ON_CHECKPOINT, retries=RETRIES)
        self._sums = SumsWatch(self._slots, self._rules)
        self._injector = Injector(plan, self._slots, cluster, self._topic, postgres, self._note)

    def run(self) -> StormReport:
        """Everything; takes the storm's time and up to some minutes."""
        self._note(f"seed {self._plan.seed}: {self._plan.daemons} daemons, {self._strategy}, order by {self._ordering}")
        for fault in self._plan.faults:
            self._note(f"plan: {fault}")
        self._cluster.create_topic(self._topic, PARTITIONS)
        with ExitStack() as stack:
            for slot in self._slots:
                stack.callback(slot.close)
            stack.enter_context(self._sums)
            with self._producer:
                for slot in self._slots:
                    slot.start()
                self._await_first_handled()
                self._note("the storm begins")
                self._injector.run()
                self._note("quiet")
                self._injector.calm()
                self._producer.stop()
            if not any(slot.is_running for slot in self._slots):
                self._slots[0].start()
            if self._await_caught_up() and self._await_whole_group():
                self._count_a_lot()
            self._end_daemons()
        self._await_gone()
        report = self._report()
        self._keep_or_remove(report)
        return report

    # ── The run ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _slot(self, number: int) -> DaemonSlot:
        name = daemon_name(number)
        ledger = self._ledger_folder(number)
        ledger.mkdir()
        daemon = DaemonProcess(
            self._folder,
            self._cluster.bootstrap,
            self._topic,
            f"tests.chaos.handlers:{'pay' if self._in_table else 'append'}",
            name=name,
            settings=(
                *_SETTINGS,
                f"commit_strategy={self._strategy}",
                f"handler.ordering={self._ordering}",
                f"store.url={self._store_url}",
            ),
            environment={"LEDGER_FOLDER": str(ledger), DAEMON_VARIABLE: str(number), MARK_VARIABLE: self._mark},
        )
        return DaemonSlot(number, daemon, self._note)

    def _ledger_folder(self, number: int) -> Path:
        return self._folder / f"payments-{daemon_name(number)}"

    def _await_first_handled(self) -> None:
        wait_until(self._handlings, FIRST_HANDLED_DEADLINE_SECONDS, "the first payment to be handled")

    def _await_caught_up(self) -> bool:
        last: list[object] = []

        def caught_up() -> bool:
            ends = self._cluster.end_offsets(self._topic)
            committed = self._cluster.committed(self._topic, self._topic)
            last[:] = [{p: (committed.get(p, 0), end) for p, end in ends.items() if committed.get(p, 0) != end}]
            return not last[0]

        try:
            wait_until(
                caught_up,
                CAUGHT_UP_DEADLINE_SECONDS,
                "everything to be committed",
                seen=lambda: f"committed and end by partition: {last}",
                ignoring=(KafkaException,),
                interval_seconds=0.5,
            )
        except AssertionError as error:
            self._troubles.append(f"{error}{''.join(self._statuses())}")
            return False
        return True

    def _await_whole_group(self) -> bool:
        """Every daemon that runs is a member, and every partition has one member; False where that takes too long."""
        partitions = self._cluster.partitions(self._topic)

        def expected() -> GroupView:
            return GroupView("STABLE", sum(slot.is_running for slot in self._slots), partitions)

        try:
            wait_until(
                lambda: view_group(self._cluster, self._topic) == expected(),
                WHOLE_GROUP_DEADLINE_SECONDS,
                "every running daemon to be a member of the group, and every partition to have one",
                seen=lambda: f"{view_group(self._cluster, self._topic)} in place of {expected()}",
                ignoring=(KafkaException,),
                interval_seconds=0.5,
            )
        except AssertionError as error:
            self._troubles.append(f"{error}{''.join(self._statuses())}")
            return False
        return True

    def _statuses(self) -> list[str]:
        """What the daemons say of themselves."""
        told: list[str] = []
        for slot in self._slots:
            try:
                status = slot.daemon.status()
            except (KafkasrcdError, OSError) as error:
                told.append(f"\n    daemon {daemon_name(slot.number)}: {error}")
                continue
            told.append(f"\n    daemon {daemon_name(slot.number)} is {status.state}, problems: {status.problems}")
            told += [
                f"\n        {p.partition} is {p.state}, at {p.position}, {p.processed}, {p.committed}: {p.problem}"
                for p in status.partitions
            ]
        return told

    def _count_a_lot(self) -> None:
        """With nothing else going on: the counts grow by exactly what is produced. A late rebalance is let be."""
        for _ in range(REST_ATTEMPTS):
            before = self._at_rest()
            lot = self._producer.produce_lot(LOT_OF_EACH)
            if not self._await_caught_up():
                return
            after = self._at_rest()
            if _epochs(before) == _epochs(after):
                self._troubles += shortened(
                    "partitions whose counts are wrong at rest", lot_differences(before, after, lot, self._rules)
                )
                return
        self._troubles.append(f"the group was never at rest, {REST_ATTEMPTS} times")

    def _at_rest(self) -> dict[int, PartitionStatus]:
        """Every partition's status, once nothing of it is in flight; what its counts say to that is a trouble."""
        found: dict[int, PartitionStatus] = {}

        def wrong() -> list[str]:
            found.clear()
            for slot in self._slots:
                with contextlib.suppress(KafkasrcdError, OSError):
                    found.update({each.partition: each for each in slot.daemon.status().partitions})
            missing = set(self._cluster.partitions(self._topic)) - found.keys()
            return [f"no daemon has {missing}"] if missing else at_rest(found.values(), self._rules)

        try:
            wait_until(lambda: not wrong(), COUNTED_DEADLINE_SECONDS, "the counts to add up", seen=wrong)
        except AssertionError as error:
            self._troubles.append(str(error))
        return found

    def _end_daemons(self) -> None:
        """One after the other: those that are left must notice, and take over."""
        self._await_whole_group()
        for slot in self._slots:
            slot.signal(signal.SIGTERM)
            slot.wait_ended()
            if any(other.is_running for other in self._slots):
                self._await_whole_group()

    def _await_gone(self) -> None:
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not left_behind(self._mark), GONE_DEADLINE_SECONDS, "all processes to end")
        processes = left_behind(self._mark)
        if processes:
            self._troubles.append(f"left behind, and killed now: {described(processes)}")
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    # ── The verdict ──────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _in_table(self) -> bool:
        """Whether the effects are made in the transaction that records the offsets."""
        return self._strategy is CommitStrategy.ON_CHECKPOINT

    def _handlings(self) -> list[Handling]:
        if self._in_table:
            assert self._postgres is not None
            return handlings_in_table(self._postgres, self._database)
        return handlings_in_files({slot.number: self._ledger_folder(slot.number) for slot in self._slots})

    def _report(self) -> StormReport:
        acknowledged = self._producer.acknowledged
        unplaced = self._producer.unplaced
        handlings = self._handlings()
        produced = {where: sent.payment for where, sent in acknowledged.items()}
        letters = judge_letters(produced, letters_in_store(self._store_url, self._topic), unplaced.values())
        verdict = judge(produced, handlings, self._ordering, unplaced, letters.payments)
        excuses = Excuses(self._injector.disturbances, handlings)
        repeated: Counter[str] = Counter()
        unexplained: list[str] = []
        for earlier, later in verdict.repeats:
            # An effect in the transaction is never made twice, whatever happens.
            excuse = None if self._in_table else excuses.excuse(earlier, later)
            repeated[str(excuse) if excuse is not None else "unexplained"] += 1
            if excuse is None:
                unexplained.append(self._repeat(earlier, later))
        blamed = [each for each in letters.quarantined if not _explains(excuses, each.letter)]
        # It may have been done when its process was killed; in a transaction that is undone.
        innocent = {Coordinate(each.letter.partition, each.letter.offset) for each in letters.quarantined}
        doubled = [where for where in verdict.both if self._in_table or where not in innocent]
        troubles = [
            *self._injector.troubles,
            *self._troubles,
            *(trouble for slot in self._slots for trouble in slot.troubles),
            *shortened("times the counts of a partition did not add up", self._sums.troubles),
            *shortened("payments not acknowledged", self._producer.failures),
            *shortened("lost", verdict.lost),
            *shortened("handled that were never produced", verdict.foreign),
            *shortened("handled and dead-lettered too", doubled),
            *shortened("without the dead letter that they must have", letters.missing),
            *shortened("dead letters of what was never produced", letters.foreign),
            *shortened("dead letters that say something else than they must", letters.wrong),
            *shortened("dead letters of good payments", letters.undeserved),
            *shortened("dead letters of payments that no fault explains the blame for", blamed),
            *shortened("handled with another content", verdict.altered),
            *shortened("out of order", verdict.disorder),
            *shortened("balances that are wrong", self._wrong_balances(letters)),
            *shortened("repeated without a fault that explains it", unexplained),
        ]
        logged: Counter[str] = Counter()
        for slot in self._slots:
            text = slot.daemon.log_text()
            troubles += shortened(f"defects in the log of daemon {daemon_name(slot.number)}", defects(text))
            logged.update(alarms(text))
        acknowledged_ns = {where: sent.at_ns for where, sent in acknowledged.items() if where not in letters.payments}
        return StormReport(
            seed=self._plan.seed,
            seconds=self._plan.seconds,
            strategy=self._strategy,
            ordering=self._ordering,
            injected=self._injector.injected,
            messages=len(acknowledged),
            lost=len(verdict.lost),
            repeated=repeated,
            letters=len(letters.payments),
            letters_expected=sum(payment.flaw in LETTER_ERRORS for payment in self._producer.made),
            longest_stall_seconds=longest_stall_seconds(acknowledged_ns, handlings),
            stalls_by_partition=longest_stalls_by_partition(acknowledged_ns, handlings),
            sums=self._sums.compared,
            alarms=logged,
            gave_up=sum(slot.gave_up for slot in self._slots),
            troubles=troubles,
            folder=self._folder,
        )

    def _wrong_balances(self, letters: Letters) -> list[str]:
        """Accounts whose balance is not what the producer has paid to them, but for what has a dead letter."""
        if not self._in_table:
            return []
        assert self._postgres is not None
        unpaid = {payment.number for payment in letters.payments.values()}
        totals: Counter[str] = Counter()
        for payment in self._producer.made:
            if payment.number not in unpaid:
                totals[payment.account] += payment.amount
        return differences(totals, balances(self._postgres, self._database))

    def _repeat(self, earlier: Handling, later: Handling) -> str:
        began_ns = self._injector.began_ns
        return (
            f"{earlier.coordinate}: by {earlier.pid} of daemon {daemon_name(earlier.daemon)} at "
            f"{(earlier.at_ns - began_ns) / 1e9:.3f} s, then by {later.pid} of daemon {daemon_name(later.daemon)} at "
            f"{(later.at_ns - began_ns) / 1e9:.3f} s"
        )

    def _keep_or_remove(self, report: StormReport) -> None:
        if not report.troubles and not self._keep:
            shutil.rmtree(self._folder)
            return
        (self._folder / "report").write_text("\n".join(report.lines()) + "\n")
        for broker in self._cluster.brokers:
            with contextlib.suppress(OSError, KafkaFailed):
                shutil.copy(broker.log_path, self._folder / f"broker-{broker.node_id}.log")

    def _note(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S', time.gmtime())} {text}"
        with self._lock:
            self._tell(line)
            with open(self._folder / "storm.log", "a") as log:
                log.write(line + os.linesep)


def _epochs(statuses: Mapping[int, PartitionStatus]) -> dict[int, int]:
    return {number: status.assignment_epoch for number, status in statuses.items()}


def _explains(excuses: Excuses, letter: DeadLetter) -> bool:
    """Whether `excuses` have the deaths that its record was blamed for."""
    wall_minus_monotonic_ns = time.time_ns() - time.monotonic_ns()
    return excuses.of_quarantine(letter.attempts, letter.last_failed_ms * 1_000_000 - wall_minus_monotonic_ns)
