"""The demo: starts a broker, the daemon and a producer, shows them at work, ends them in order, and counts.

The order of the end is what makes the counts comparable: the producer stops and has everything acknowledged, the daemon
handles what is there, then it is told to stop, and Kafka is asked what was committed.
"""

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Protocol

import msgspec

from kafkasrcd.daemon.configuration_sources import ENVIRONMENT_PREFIX, ignored_variables
from kafkasrcd.daemon.control_client import ControlClient
from kafkasrcd.daemon.demo_children import Child
from kafkasrcd.daemon.demo_directory import EMBEDDED_TOPIC, GROUP, TOPIC, DemoDirectory, open_directory
from kafkasrcd.daemon.demo_producer import ProducerReport
from kafkasrcd.daemon.demo_tally import Tally, read_tally
from kafkasrcd.daemon.status import Status
from kafkasrcd.errors import KafkasrcdError
from kafkasrcd.workers.deadline import Deadline

_TURN_SECONDS: Final = 0.05
_LOOK_SECONDS: Final = 0.5
"""How often the daemon is asked and the view redrawn."""
_BROKER_SECONDS: Final = 15.0
_JOIN_SECONDS: Final = 60.0
"""To join the group; after a killed demo its session of 10 s has to end first."""
_REPORT_WAIT_SECONDS: Final = 0.1
"""Twice as long as the producer's next report takes."""
_PRODUCER_SECONDS: Final = 15.0
"""The producer's own flush takes 10 s at most."""
_CATCH_UP_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 45.0
"""The daemon's own budget is 20 s of draining and 15 s around it."""
_MOST_PROCESSES: Final = 4
"""By default; there are 4 partitions."""


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says; None where it says nothing."""

    brokers: str | None
    seconds: float | None
    rate: int
    processes: int | None
    directory: Path


class DemoProgress(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to see, at one moment. ``status`` is None while the daemon does not answer."""

    step: str
    topic: str
    brokers: str
    embedded: bool
    rate: int
    elapsed_seconds: float
    report: ProducerReport
    tally: Tally
    status: Status | None
    directory: DemoDirectory


class DemoOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """The counts at the end.

    ``backlog``: records that were there before this demo, and not yet committed. ``offsets``: partition to the end of
    its log and what the group has committed. ``shared``: another member had some of the partitions. ``restarts``: of
    handler processes, each of which may have repeated a record for each of its partitions.
    """

    embedded: bool
    report: ProducerReport
    tally: Tally
    backlog: int
    offsets: dict[int, tuple[int, int | None]]
    shared: bool
    restarts: int
    directory: DemoDirectory

    @property
    def missing(self) -> int:
        """Orders produced or found and not handled here; negative where some were handled twice."""
        return self.report.produced + self.backlog - self.tally.orders

    def check(self) -> None:
        """Raises KafkasrcdError where the counts are not what they must be."""
        log = self.directory.log("daemon")
        if self.report.failed:
            raise KafkasrcdError(f"{self.report.failed:,} orders were not accepted: {self.report.problem}")
        if self.shared:
            return
        if self.missing > 0:
            gone = " (the embedded broker keeps 5 MiB of each partition: try a lower --rate)" if self.embedded else ""
            raise KafkasrcdError(f"{self.missing:,} orders were not handled{gone}; what happened is in {log}")
        if self.missing < 0 and self.embedded and not self.restarts:
            raise KafkasrcdError(f"{-self.missing:,} orders were handled twice, and no process had died; see {log}")
        behind = [number for number, (end, committed) in self.offsets.items() if end != (committed or 0)]
        if behind and self.embedded:
            raise KafkasrcdError(f"partitions {', '.join(map(str, behind))} are not committed to their end; see {log}")


class DemoView(Protocol):
    """Shows it."""

    def show(self, progress: DemoProgress) -> None:
        """Called twice a second."""
        ...


class Demo:
    """One run."""

    def __init__(self, options: DemoOptions, view: DemoView) -> None:
        self._options = options
        self._view = view
        self._stops = 0
        self._began = time.monotonic()
        self._look_due = 0.0
        self._step = "starting"
        self._brokers = ""
        self._topic = EMBEDDED_TOPIC if options.brokers is None else TOPIC
        self._report = ProducerReport()
        self._status: Status | None = None
        self._shared = False
        self._restarts = 0
        self._directory: DemoDirectory
        self._children: list[Child] = []
        self._producer: Child | None = None

    def run(self) -> DemoOutcome:
        """Until SIGINT, SIGTERM or the time is up; every process is gone then.

        A second signal does not wait for what is still to be handled. Raises KafkasrcdError where a part fails.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        with ExitStack() as stack:
            self._directory = stack.enter_context(open_directory(self._options.directory))
            return self._run(stack)

    def _on_signal(self, *_: object) -> None:
        self._stops += 1

    def _run(self, stack: ExitStack) -> DemoOutcome:
        # Not before the folder is ours: librdkafka comes with it.
        from kafkasrcd.daemon.demo_kafka import group_offsets, prepare_topic

        options, directory = self._options, self._directory
        self._look("starting the broker" if options.brokers is None else "looking for the broker")
        if options.brokers is None:
            self._brokers = self._start_broker(stack)
        else:
            self._brokers = options.brokers
            prepare_topic(self._brokers, self._topic)
        before = group_offsets(self._brokers, GROUP, self._topic)
        processes = options.processes or min(_MOST_PROCESSES, os.cpu_count() or 1)
        directory.write(self._brokers, self._topic, processes, embedded=options.brokers is None)
        daemon = self._start(stack, "the daemon", "commands", "daemon", "start", "-c", str(directory.configuration))
        self._step = "starting the daemon; a new group waits some seconds for further members"
        if self._await_group(daemon):
            self._producer = self._start(
                stack, "the producer", "demo_producer", "producer", self._brokers, self._topic, str(options.rate)
            )
            self._produce(self._producer)
            self._catch_up()
        self._stop_daemon(daemon)
        return DemoOutcome(
            embedded=options.brokers is None,
            report=self._report,
            tally=read_tally(directory.handled),
            backlog=sum(offsets.backlog for offsets in before.values()),
            offsets={
                number: (offsets.end, offsets.committed)
                for number, offsets in group_offsets(self._brokers, GROUP, self._topic).items()
            },
            shared=self._shared,
            restarts=self._restarts,
            directory=directory,
        )

    # ---- the steps, in order -----------------------------------------------------------------------------------

    def _start_broker(self, stack: ExitStack) -> str:
        broker = self._start(stack, "the embedded broker", "demo_broker", "broker", self._topic)
        deadline = Deadline(_BROKER_SECONDS)
        while not deadline.passed:
            if lines := broker.new_lines():
                return lines[0].decode()
            self._turn()
        raise KafkasrcdError(f"the embedded broker was not up within {_BROKER_SECONDS:g} s; see {broker.log_path}")

    def _await_group(self, daemon: Child) -> bool:
        """Until the daemon has its partitions; False where it was told to stop first."""
        deadline = Deadline(_JOIN_SECONDS)
        while not self._stops:
            self._turn()
            if self._status is not None and self._status.state == "running":
                return True
            if deadline.passed:
                raise KafkasrcdError(f"the daemon is not in the group after {_JOIN_SECONDS:g} s; see {daemon.log_path}")
        return False

    def _produce(self, producer: Child) -> None:
        deadline = None if self._options.seconds is None else Deadline(self._options.seconds)
        self._step = "Ctrl-C ends it"
        while not (self._stops or (deadline is not None and deadline.passed)):
            self._turn()
        self._step = "ending: the producer stops, and waits for what is not yet acknowledged"
        producer.terminate()
        self._children.remove(producer)  # from here on it may end
        ending = Deadline(_PRODUCER_SECONDS)
        while producer.is_running and not ending.passed:
            self._turn()
        producer.require_success()
        self._read_report()

    def _catch_up(self) -> None:
        """Until everything acknowledged has been handled, as far as it is ours and can be."""
        self._step = "ending: the daemon handles what is there"
        stops = self._stops
        deadline = Deadline(_CATCH_UP_SECONDS)
        while not deadline.passed and self._stops == stops:
            self._look()
            if self._status is not None and all(
                partition.state == "failed"
                or (
                    partition.processed is not None
                    and partition.processed >= self._report.ends.get(partition.partition, 0)
                )
                for partition in self._status.partitions
            ):
                return
            self._turn()

    def _stop_daemon(self, daemon: Child) -> None:
        self._step = "ending: the daemon commits, and leaves the group"
        self._look()
        self._children.remove(daemon)
        daemon.remember_tree()
        stops = self._stops
        daemon.terminate()
        deadline = Deadline(_STOP_SECONDS)
        while daemon.is_running and not deadline.passed:
            self._turn()
            if self._stops > stops:
                stops = self._stops
                daemon.terminate()
        if daemon.is_running:
            raise KafkasrcdError(f"the daemon did not stop within {_STOP_SECONDS:g} s; see {daemon.log_path}")
        daemon.require_success()
        self._look("ended")

    # ---- each turn ---------------------------------------------------------------------------------------------

    def _start(self, stack: ExitStack, name: str, module: str, log: str, *arguments: str) -> Child:
        # What the environment sets for a real daemon is not meant for this one.
        ignored = ignored_variables(os.environ)
        environment = {
            variable: value
            for variable, value in os.environ.items()
            if not variable.startswith(ENVIRONMENT_PREFIX) or variable in ignored
        }
        child = Child(name, f"kafkasrcd.daemon.{module}", arguments, self._directory.log(log), environment)
        stack.callback(child.close)
        self._children.append(child)
        return child

    def _turn(self) -> None:
        """Wait a little, look where it is time to. Raises KafkasrcdError where a child has ended that should not."""
        time.sleep(_TURN_SECONDS)
        for child in self._children:
            child.require_running()
        if time.monotonic() >= self._look_due:
            self._look()

    def _look(self, step: str | None = None) -> None:
        self._look_due = time.monotonic() + _LOOK_SECONDS
        self._step = step or self._step
        self._status = self._ask_daemon()
        tally = self._read_tally()
        if self._status is not None:
            self._restarts = max(self._restarts, sum(handler.restarts for handler in self._status.handlers))
            if self._status.state == "running":
                ours = {partition.partition for partition in self._status.partitions}
                self._shared |= not self._report.ends.keys() <= ours
        self._view.show(
            DemoProgress(
                step=self._step,
                topic=self._topic,
                brokers=self._brokers,
                embedded=self._options.brokers is None,
                rate=self._options.rate,
                elapsed_seconds=time.monotonic() - self._began,
                report=self._report,
                tally=tally,
                status=self._status,
                directory=self._directory,
            )
        )

    def _ask_daemon(self) -> Status | None:
        try:
            client = ControlClient(self._directory.control_socket)
        except KafkasrcdError:
            return None
        try:
            return client.status()
        except KafkasrcdError:
            return None
        finally:
            client.close()

    def _read_tally(self) -> Tally:
        """What is handled by now, and then what is produced: an order may be handled before the producer tells of it,
        and nobody would believe figures that have more handled than produced."""
        tally = read_tally(self._directory.handled)
        deadline = Deadline(_REPORT_WAIT_SECONDS)
        self._read_report()
        while self._report.produced < tally.orders and self._producer in self._children and not deadline.passed:
            time.sleep(_REPORT_WAIT_SECONDS / 10)
            self._read_report()
        return tally

    def _read_report(self) -> None:
        if self._producer is not None and (lines := self._producer.new_lines()):
            self._report = msgspec.json.decode(lines[-1], type=ProducerReport)
