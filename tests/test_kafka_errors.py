"""What each kind of error does to a daemon on a real broker, and where that is shown.

| error | what holds | shown by |
|---|---|---|
| no connection | said once, tried ever more slowly, gone on where it was | `test_faults`, and a silent broker here |
| a record that cannot be deserialized | counted, logged once a burst, alone | here; formats in `test_formats_daemon` |
| a handler that fails | tried again; then skipped, kept, or its partition stops | `test_faults`, `test_quarantine` |
| a commit that fails | said, made again | here; the store's in `test_faults`, `test_store_outage` |
| the end of a partition | no error | here |
| another member under this one's name | the daemon ends and says so, nothing is lost | here |
| a lost membership | logged, counted, no zombie | `test_faults` |
| compressed, aborted, empty, missing | read as what they are | `test_formats_daemon` |
"""

from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import orjson
import pytest

from kafkasrcd.daemon.status import PartitionStatus
from tests.daemon_process import DEADLINE_SECONDS, QUICK_SESSION, DaemonProcess
from tests.kafka_cluster import KafkaCluster, Record
from tests.ledger import Ledger
from tests.waiting import wait_until

GOOD, BAD = b"{}", b"{"
RAISES = orjson.dumps({"do": "raise"})
SLEEPS = orjson.dumps({"do": "sleep", "seconds": 600})
SILENT_SECONDS = 5.0
"""The log's own: how long the same failure is counted only."""


@pytest.fixture
def topic(kafka: KafkaCluster, topic_name: str) -> str:
    kafka.create_topic(topic_name, partitions=2)
    return topic_name


def daemon(
    kafka: KafkaCluster, topic: str, folder: Path, *settings: str, handler: str = "obey", name: str = "a"
) -> DaemonProcess:
    target = f"tests.fault_handlers:{handler}"
    return DaemonProcess(folder, kafka.bootstrap, topic, target, name=name, settings=(*QUICK_SESSION, *settings))


def produce(kafka: KafkaCluster, topic: str, partition: int, *values: bytes | None) -> None:
    kafka.produce(topic, [Record(partition, None, value) for value in values])


def first(running: DaemonProcess) -> PartitionStatus:
    return running.status().partitions[0]


def seconds_since(running: DaemonProcess, event: str) -> float:
    """Since the last one of the log."""
    *_, last = running.events(event) or [{"time": datetime.now(UTC).isoformat()}]
    return (datetime.now(UTC) - datetime.fromisoformat(last["time"])).total_seconds()


# ---- Deserialization -------------------------------------------------------------------------------------------------


def test_records_that_are_no_json_are_counted_each_and_logged_once_a_burst(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    burst = 2_000
    produce(kafka, topic, 0, *[BAD, GOOD] * burst)
    produce(kafka, topic, 1, *[GOOD] * 10)
    with daemon(kafka, topic, tmp_path, "handler.on_failure=skip") as running:
        running.wait_caught_up({0: 2 * burst, 1: 10})
        bad, other = running.status().partitions
        assert (bad.failures, bad.skipped, bad.succeeded) == (burst, burst, burst)
        assert (other.failures, other.skipped, other.succeeded, other.problem) == (0, 0, 10, "")
        logged = len(running.events("record_undecodable"))
        sent = burst

        def logged_again() -> bool:
            nonlocal sent
            produce(kafka, topic, 0, BAD)
            sent += 1
            return len(running.events("record_undecodable")) > logged

        wait_until(logged_again, DEADLINE_SECONDS, "the next line, after a silence")
        running.wait_caught_up(kafka.end_offsets(topic))
        lines = running.events("record_undecodable")
    # Each line has how many there were since the one before it.
    at = [datetime.fromisoformat(line["time"]).timestamp() for line in lines]
    assert all(later - earlier > SILENT_SECONDS - 0.1 for earlier, later in pairwise(at))
    assert lines[0]["offset"] == 0
    counted = len(lines) + sum(line.get("repeated", 0) for line in lines)
    assert burst < counted <= sent
    assert Ledger(tmp_path).counts.total() == burst + 10


@pytest.mark.parametrize("policy", ["skip", "dead_letter"])
def test_what_is_consumed_is_all_accounted_for(kafka: KafkaCluster, topic: str, tmp_path: Path, policy: str) -> None:
    produce(kafka, topic, 0, GOOD, BAD, RAISES, None, b"", GOOD, SLEEPS, GOOD)
    produce(kafka, topic, 1, *[GOOD, BAD, RAISES] * 50)
    settings = (f"handler.on_failure={policy}", "max_retries=1", "retry_backoff_ms=1")
    with daemon(kafka, topic, tmp_path, *settings) as running:
        status = running.wait_status(
            lambda status: (
                [each.processed for each in status.partitions] == [6, 150] and status.partitions[0].messages == 8
            ),
            "everything up to the record that is in its handler's hands",
        )
        held, done = status.partitions
        given_up = [(each.skipped, each.dead_lettered) for each in (held, done)]
        assert given_up == ([(3, 0), (100, 0)] if policy == "skip" else [(0, 3), (0, 100)])
        assert (held.succeeded, done.succeeded) == (3, 50)
        assert held.position is not None
        assert held.processed is not None
        in_flight = held.position - held.processed
        assert held.messages == held.succeeded + held.skipped + held.dead_lettered + in_flight
        assert done.messages == done.succeeded + done.skipped + done.dead_lettered
        assert done.lag == 0


# ---- Connections and commits -----------------------------------------------------------------------------------------


def test_a_commit_under_way_when_the_broker_goes_is_made_once_it_is_back(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    """Within the session timeout: the member stays what it is."""
    produce(kafka, topic, 0, *[GOOD] * 3_000)
    with daemon(kafka, topic, tmp_path, "supervisor.session_timeout_ms=45000", handler="slow") as running:
        running.wait_status(lambda status: status.partitions and (first(running).committed or 0) > 0, "a first commit")
        kafka.stop_broker(0)
        try:
            behind = running.wait_status(lambda _: first(running).processed == 3_000, "all that is in the ring handled")
            assert (behind.partitions[0].committed or 0) < 3_000
            assert "no broker answers" in behind.problems[0]
        finally:
            kafka.start_broker(0)
        running.wait_caught_up({0: 3_000, 1: 0})
        assert running.terminate() == 0
        assert running.events("lost") == []
    assert kafka.committed(topic, topic)[0] == 3_000
    ledger = Ledger(tmp_path)
    assert ledger.counts.total() == 3_000
    assert not ledger.repeated


def test_a_commit_that_fails_is_said_and_what_it_was_for_is_handled_again(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    """Beyond the session timeout the group goes on with what it had committed."""
    produce(kafka, topic, 0, *[GOOD] * 3_000)
    with daemon(kafka, topic, tmp_path, handler="slow") as running:
        running.wait_status(lambda status: status.partitions and (first(running).committed or 0) > 0, "a first commit")
        kafka.stop_broker(0)
        committed = first(running).committed or 0
        try:
            wait_until(lambda: running.events("commit_failed"), 60, "the failed commit in the log")
            wait_until(lambda: running.events("lost"), 30, "the loss in the log")
        finally:
            kafka.start_broker(0)
        running.wait_caught_up({0: 3_000, 1: 0})
        assert running.status().rebalances >= 2
        assert running.terminate() == 0
        (failed, *_) = running.events("commit_failed")
        assert failed["message"].startswith("offsets are not recorded: the commit was not accepted: ")
    ledger = Ledger(tmp_path)
    assert ledger.counts.keys() == {(0, offset) for offset in range(3_000)}
    assert all(offset >= committed for _, offset in ledger.repeated)


def test_a_broker_that_falls_silent_is_waited_for(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    """Its connections stay open, and nothing is refused."""
    produce(kafka, topic, 0, *[GOOD] * 100)
    with daemon(kafka, topic, tmp_path) as running:
        running.wait_caught_up({0: 100, 1: 0})
        kafka.freeze_broker(0)
        try:
            status = running.wait_status(lambda status: status.problems, "the problem in the status", 60)
            # A member that stayed out of the group for so long, with a broker that answers, would be given up.
            wait_until(lambda: seconds_since(running, "lost") > 20, 60, "more than a member is waited for")
            assert "no broker answers" in status.problems[0]
        finally:
            kafka.thaw_broker(0)
        running.wait_status(lambda status: not status.problems, "the broker back", 60)
        produce(kafka, topic, 1, *[GOOD] * 100)
        running.wait_caught_up({0: 100, 1: 100})
        assert running.terminate() == 0
    ledger = Ledger(tmp_path)
    assert ledger.counts.total() == 200
    assert not ledger.repeated


def test_the_end_of_a_partition_is_no_error(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    with daemon(kafka, topic, tmp_path) as running:
        running.wait_running(2)
        for end in (1, 2, 3):
            produce(kafka, topic, 0, GOOD)
            running.wait_caught_up({0: end, 1: 0})
        status = running.status()
        assert running.terminate() == 0
        levels = {line["level"] for line in map(orjson.loads, running.log_text().splitlines())}
    assert status.problems == []
    assert [(each.state, each.problem, each.failures, each.lag) for each in status.partitions] == [
        ("running", "", 0, 0)
    ] * 2
    assert levels == {"info"}


# ---- Rebalances ------------------------------------------------------------------------------------------------------


def test_another_member_under_its_name_ends_the_first_and_nothing_is_lost(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    same = "supervisor.group_instance_id=host-1"
    with daemon(kafka, topic, tmp_path, same) as old:
        old.wait_running(2)
        produce(kafka, topic, 0, *[GOOD] * 100)
        old.wait_caught_up({0: 100, 1: 0})
        with daemon(kafka, topic, tmp_path, same, name="b") as new:
            assert old.process.wait(DEADLINE_SECONDS) == 69
            assert "other consumer with same group.instance.id" in old.events("ended")[0]["message"]
            new.wait_running(2)
            produce(kafka, topic, 1, *[GOOD] * 100)
            new.wait_caught_up({0: 100, 1: 100})
            assert new.terminate() == 0
    ledger = Ledger(tmp_path)
    assert ledger.counts.total() == 200
    assert not ledger.repeated
