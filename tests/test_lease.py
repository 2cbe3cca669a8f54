"""A host that freezes past its session and comes back, while another has taken over: what the zombie still does.

With ``periodic``, only records that were in a handler's hands when it froze are handled by it again; with
``on_checkpoint``, no effect is there twice and nothing that it sends changes a row.
"""

import os
import signal
import time
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.daemon_process import QUICK_SESSION, DaemonProcess
from tests.kafka_cluster import KafkaCluster
from tests.ledger import Coordinate, Ledger, SteadyProducer
from tests.postgres import PostgresServer
from tests.test_strategies import Effects
from tests.waiting import wait_until

PARTITIONS = 4
HANDLER_PROCESSES = 2
WHOLE_TREE = "whole tree"
SUPERVISOR = "supervisor"

# Every change of a row of the store, in the order in which it was made.
_AUDIT = """
CREATE TABLE audit (number serial, "partition" int, epoch bigint, next_offset bigint);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO audit ("partition", epoch, next_offset) VALUES (NEW."partition", NEW.assignment_epoch, NEW.next_offset);
    RETURN NULL;
END $$;
CREATE TRIGGER audit AFTER INSERT OR UPDATE ON kafkasrcd_offsets FOR EACH ROW EXECUTE FUNCTION note();
"""


@pytest.fixture
def topic(kafka: KafkaCluster, topic_name: str) -> str:
    kafka.create_topic(topic_name, partitions=PARTITIONS)
    return topic_name


class Frozen:
    """A daemon's supervisor, or all its processes, stopped from entering to leaving."""

    def __init__(self, daemon: DaemonProcess, what: str) -> None:
        self._processes = [psutil.Process(daemon.process.pid)]
        if what == WHOLE_TREE:
            self._processes += daemon.children()
        self.pids = {process.pid for process in daemon.children()}
        self.since_ns = 0

    def __enter__(self) -> "Frozen":
        for process in self._processes:
            os.kill(process.pid, signal.SIGSTOP)
        self.since_ns = time.monotonic_ns()
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            os.kill(process.pid, signal.SIGCONT)


@pytest.fixture(params=[SUPERVISOR, WHOLE_TREE])
def what(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stack() -> Generator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def _two(
    stack: ExitStack, kafka: KafkaCluster, topic: str, folder: Path, target: str, *settings: str
) -> list[DaemonProcess]:
    daemons: list[DaemonProcess] = []
    for name in "ab":
        every = (*QUICK_SESSION, f"handler.processes={HANDLER_PROCESSES}", *settings)
        daemons.append(
            stack.enter_context(DaemonProcess(folder, kafka.bootstrap, topic, target, name=name, settings=every))
        )
        daemons[0].wait_status(
            lambda status: len(status.partitions) == PARTITIONS // len(daemons), "its share of the partitions", 60
        )
    return daemons


def test_periodic_hands_nothing_to_a_handler_that_another_has(
    kafka: KafkaCluster, topic: str, tmp_path: Path, stack: ExitStack, what: str
) -> None:
    producer = stack.enter_context(SteadyProducer(kafka.bootstrap, topic, PARTITIONS))
    zombie, other = _two(stack, kafka, topic, tmp_path, "tests.ledger:append")

    def handled_more(count: int) -> None:
        before = Ledger(tmp_path).counts.total()
        wait_until(lambda: Ledger(tmp_path).counts.total() > before + count, 60, f"{count} more records")

    handled_more(2_000)
    with Frozen(zombie, what) as frozen:
        other.wait_running(PARTITIONS)
        handled_more(2_000)
    zombie.wait_status(
        lambda status: status.partitions and status.rebalances > 2, "the frozen one back in the group", 60
    )
    handled_more(2_000)
    producer.stop()
    ends = kafka.end_offsets(topic)
    for daemon in (zombie, other):
        daemon.wait_caught_up(ends)
    assert zombie.events("lease_lapsed")
    for daemon in (zombie, other):
        assert daemon.terminate() == 0
    ledger = Ledger(tmp_path)
    assert not ledger.lost(producer.acknowledged)
    assert set(ledger.repeated.values()) <= {1}
    # Of those that were handled twice, what the zombie did after it froze (with its supervisor alone frozen, after the
    # lease as well): at most what it had in its hands.
    lease_ns = frozen.since_ns if what == WHOLE_TREE else frozen.since_ns + int(2.5e9)
    late: set[Coordinate] = set()
    for path in tmp_path.glob("ledger-*"):
        if int(path.name.partition("-")[2]) in frozen.pids:
            for line in path.read_bytes().splitlines():
                partition, offset, at_ns = map(int, line.split())
                if at_ns > lease_ns and Coordinate(partition, offset) in ledger.repeated:
                    late.add(Coordinate(partition, offset))
    assert zombie.events("lease_resumed")
    assert len(late) <= HANDLER_PROCESSES, late


@pytest.mark.parametrize("ordering", ["partition", "key"])
def test_on_checkpoint_applies_no_effect_twice(
    kafka: KafkaCluster,
    topic: str,
    tmp_path: Path,
    stack: ExitStack,
    what: str,
    ordering: str,
    postgres: PostgresServer,
) -> None:
    database = postgres.create_database()
    found = Effects(postgres.url(database))
    stack.callback(found.close)
    found.recorded(topic)  # makes the tables
    postgres.execute(_AUDIT, database)
    producer = stack.enter_context(SteadyProducer(kafka.bootstrap, topic, PARTITIONS, rate_per_second=500))
    zombie, other = _two(
        stack,
        kafka,
        topic,
        tmp_path,
        "tests.strategy_handlers:effect",
        "commit_strategy=on_checkpoint",
        f"store.url={found.url}",
        f"handler.ordering={ordering}",
    )

    def effects_more(count: int) -> None:
        before = found.counts().total()
        wait_until(lambda: found.counts().total() > before + count, 60, f"{count} more effects")

    effects_more(300)
    with Frozen(zombie, what):
        other.wait_running(PARTITIONS)
        effects_more(1_000)
    zombie.wait_status(
        lambda status: status.partitions and status.rebalances > 2, "the frozen one back in the group", 60
    )
    effects_more(300)
    producer.stop()
    ends = kafka.end_offsets(topic)
    for daemon in (zombie, other):
        daemon.wait_caught_up(ends)
        assert daemon.terminate() == 0
    counts = found.counts()
    assert counts.keys() == producer.acknowledged
    assert set(counts.values()) == {1}
    rows = postgres.execute('SELECT "partition", epoch FROM audit ORDER BY number', database)
    last: dict[int, int] = {}
    for partition, epoch in rows:
        assert epoch >= last.get(partition, 0), f"partition {partition}: epoch {epoch} after {last[partition]}"
        last[partition] = epoch
    assert found.recorded(topic) == ends
