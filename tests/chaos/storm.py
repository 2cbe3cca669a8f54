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
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil

from kafkasrcd.settings import CommitStrategy, Ordering
from tests.chaos.daemon_log import alarms, defects
from tests.chaos.daemon_slot import DaemonSlot, described
from tests.chaos.effects import balances, create_tables, handlings_in_table
from tests.chaos.excuses import Excuses
from tests.chaos.fault import daemon_name
from tests.chaos.handlers import DAEMON_VARIABLE
from tests.chaos.handling import Handling, handlings_in_files
from tests.chaos.injector import Injector
from tests.chaos.left_behind import MARK_VARIABLE, left_behind
from tests.chaos.letters import Letters, judge_letters, letter_troubles, letters_in_store
from tests.chaos.payment import LETTER_ERRORS
from tests.chaos.plan import PARTITIONS, Plan
from tests.chaos.producer import PaymentProducer
from tests.chaos.quiet import Quiet
from tests.chaos.report import StormReport, shortened
from tests.chaos.stalls import longest_stall_seconds, longest_stalls_by_partition
from tests.chaos.sums import Rules, SumsWatch
from tests.chaos.verdict import differences, judge
from tests.daemon_process import HANDLERS, QUICK_SESSION, DaemonProcess
from tests.kafka_cluster import KafkaCluster, KafkaFailed
from tests.postgres import PostgresServer
from tests.waiting import wait_until

MESSAGES_PER_SECOND = 300
FIRST_HANDLED_DEADLINE_SECONDS = 60.0
GONE_DEADLINE_SECONDS = 10.0
"""For processes whose supervisor has ended. The design says 2 s; a machine as busy as after a storm gets more."""

CRASH_ATTEMPTS = 3
RETRIES = 2
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
        rules = Rules(slots, rolls_back=strategy is CommitStrategy.ON_CHECKPOINT, retries=RETRIES)
        self._sums = SumsWatch(self._slots, rules)
        self._quiet = Quiet(cluster, self._topic, self._slots, self._producer, rules)
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
            if self._quiet.await_caught_up() and self._quiet.await_whole_group():
                self._quiet.count_a_lot()
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

    def _end_daemons(self) -> None:
        """One after the other: those that are left must notice, and take over."""
        self._quiet.await_whole_group()
        for slot in self._slots:
            slot.signal(signal.SIGTERM)
            slot.wait_ended()
            if any(other.is_running for other in self._slots):
                self._quiet.await_whole_group()

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
        troubles = [
            *self._injector.troubles,
            *self._troubles,
            *self._quiet.troubles,
            *(trouble for slot in self._slots for trouble in slot.troubles),
            *shortened("times the counts of a partition did not add up", self._sums.troubles),
            *shortened("payments not acknowledged", self._producer.failures),
            *shortened("lost", verdict.lost),
            *shortened("handled that were never produced", verdict.foreign),
            *letter_troubles(letters, verdict.both, excuses, undone=self._in_table),
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
