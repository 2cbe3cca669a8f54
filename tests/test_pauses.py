"""Pauses on a real broker: by command and by the breaker, through restarts and from host to host."""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import orjson
import pytest

from kafkasrcd.daemon.status import PartitionStatus, Status
from kafkasrcd.storage.dead_letters import LetterFilter
from kafkasrcd.storage.opening import open_dead_letters
from tests.daemon_process import COMMAND, QUICK_SESSION, DaemonProcess
from tests.kafka_cluster import KafkaCluster, Record
from tests.ledger import Coordinate, Ledger, SteadyProducer
from tests.waiting import wait_until

PARTITIONS = 3
HELD = 1
"""The partition that is paused."""


@pytest.fixture
def topic(kafka: KafkaCluster, topic_name: str) -> str:
    kafka.create_topic(topic_name, partitions=PARTITIONS)
    return topic_name


def _command(folder: Path, topic: str, *words: str) -> str:
    """Without the daemon's configuration, as on another host: it knows the group and the store."""
    settings = ["-s", f"group_id={topic}", "-s", f"store.url=sqlite:///{folder / 'offsets.db'}"]
    strategy = ["-s", "commit_strategy=on_checkpoint"]  # a shared database: other tables are no surprise
    ended = subprocess.run([COMMAND, *words, *settings, *strategy], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def _held(status: Status) -> PartitionStatus | None:
    return next((each for each in status.partitions if each.partition == HELD), None)


def _is_held(status: Status) -> bool:
    held = _held(status)
    return held is not None and held.state == "paused"


def _handled(folder: Path) -> dict[int, int]:
    """How many records of each partition."""
    found = dict.fromkeys(range(PARTITIONS), 0)
    for coordinate in Ledger(folder).counts:
        found[coordinate.partition] += 1
    return found


def _wait_others(folder: Path, more: int = 200) -> None:
    """The other partitions go on."""
    before = _handled(folder)
    wait_until(
        lambda: all(now >= before[number] + more for number, now in _handled(folder).items() if number != HELD),
        30,
        f"{more} more records of each other partition",
        seen=lambda: _handled(folder),
    )


@pytest.mark.parametrize(
    ("strategy", "target", "settings"),
    [
        ("periodic", "tests.ledger:append", ()),
        ("periodic", "tests.pause_handlers:append_async", ("handler.ordering=key",)),
        ("manual", "tests.strategy_handlers:commit_each", ()),
        ("on_checkpoint", "tests.pause_handlers:append_with_effects", ()),
        ("auto", "tests.fault_handlers:slow", ()),
    ],
    ids=["periodic", "by key", "manual", "on_checkpoint", "auto"],
)
def test_a_paused_partition_waits_through_restarts_while_others_go_on(
    kafka: KafkaCluster, topic: str, tmp_path: Path, strategy: str, target: str, settings: Sequence[str]
) -> None:
    whole = (*QUICK_SESSION, f"commit_strategy={strategy}", *settings)
    # For `slow` they are some seconds' work: what is handed off is not all handled when the partition is paused.
    kafka.produce(topic, [Record(HELD, None, b"{}") for _ in range(5_000)])
    with (
        SteadyProducer(kafka.bootstrap, topic, PARTITIONS, rate_per_second=400) as producer,
        DaemonProcess(tmp_path, kafka.bootstrap, topic, target, settings=whole) as daemon,
    ):
        running = daemon.wait_running(PARTITIONS)
        _wait_others(tmp_path)
        before = _held(running)
        _command(tmp_path, topic, "pause", f"{topic}:{HELD}", "--reason", "the shelf is full")
        held = _held(daemon.wait_status(_is_held, "the partition paused"))
        assert held is not None
        assert before is not None
        assert held.paused is not None
        assert (held.paused.reason, held.paused.scope) == ("the shelf is full", f"{topic}:{HELD}")
        assert held.problem == ""
        _wait_others(tmp_path)  # meanwhile what was in hand is finished
        stood = _handled(tmp_path)[HELD]
        status = daemon.wait_status(
            lambda status: (held := _held(status)) is not None and held.committed == held.processed == stood > 0,
            "what it had done committed",
        )
        _wait_others(tmp_path)
        assert _handled(tmp_path)[HELD] == stood
        assert status.rebalances == running.rebalances
        if strategy != "auto":
            assert (held.assignment_epoch, held.worker.pid) == (before.assignment_epoch, before.worker.pid)
        daemon.wait_status(lambda status: (held := _held(status)) is not None and held.lag, "its lag, which grows")
        worker = status.partitions[HELD].worker.pid
        assert worker is not None
        os.kill(worker, signal.SIGKILL)
        daemon.wait_status(
            lambda status: _is_held(status) and status.partitions[HELD].worker.restarts, "a new worker, paused as well"
        )
        assert daemon.terminate() == 0
        daemon.start()
        daemon.wait_status(_is_held, "the partition paused after a restart")
        _wait_others(tmp_path)
        daemon.kill()
        daemon.start()
        daemon.wait_status(_is_held, "the partition paused after a kill")
        _wait_others(tmp_path)
        assert _handled(tmp_path)[HELD] == stood
        assert _command(tmp_path, topic, "resume", f"{topic}:{HELD}").startswith(f"{topic}:{HELD} resumed")
        wait_until(lambda: _handled(tmp_path)[HELD] > stood, 10, "the partition to go on")
        producer.stop()
        ends = kafka.end_offsets(topic)
        daemon.wait_caught_up(ends)
        wait_until(lambda: _handled(tmp_path)[HELD] == ends[HELD], 30, "all of the partition handled")
        assert daemon.terminate() == 0
    ledger = Ledger(tmp_path)
    assert not ledger.lost({Coordinate(HELD, offset) for offset in range(ends[HELD])})
    assert strategy == "auto" or not ledger.lost(producer.acknowledged)
    assert not [each for each in ledger.repeated if each.partition == HELD]
    assert not [each for each in ledger.disorder if f"partition={HELD}" in each] or "handler.ordering=key" in settings


def test_a_pause_goes_along_to_another_member(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    """It is given while nothing runs, for the whole topic, and holds wherever the partitions come to be."""

    def daemon(name: str) -> DaemonProcess:
        target = "tests.ledger:append"
        return DaemonProcess(tmp_path, kafka.bootstrap, topic, target, name=name, settings=QUICK_SESSION)

    records = {Coordinate(number % PARTITIONS, number // PARTITIONS) for number in range(300)}
    kafka.produce(topic, [Record(number % PARTITIONS, None, b"{}") for number in range(300)])
    with daemon("first") as first:
        first.wait_status(lambda status: status.state == "running", "the store to be there")
        first.wait_caught_up(dict.fromkeys(range(PARTITIONS), 100))
        assert first.terminate() == 0
        _command(tmp_path, topic, "pause", topic, "--reason", "the move")
        kafka.produce(topic, [Record(number % PARTITIONS, None, b"{}") for number in range(300)])
        first.start()
        first.wait_status(
            lambda status: len(status.partitions) == PARTITIONS and all(e.state == "paused" for e in status.partitions),
            "all paused",
        )
        shown = subprocess.run(
            [COMMAND, "status", "-s", f"group_id={topic}", "-s", f"supervisor.control_socket={first.socket}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        (line,) = (line for line in shown.splitlines() if "the move" in line)
        assert line.startswith(f"! {topic} paused by ")
        assert line.endswith(f": the move — kafkasrcd resume {topic}")
        assert "healthy" in shown
        with daemon("second") as second:
            second.wait_status(lambda status: bool(status.partitions), "a share")
            assert first.terminate() == 0
            second.wait_status(
                lambda status: (
                    len(status.partitions) == PARTITIONS
                    and all(each.state == "paused" and each.processed == 100 for each in status.partitions)
                ),
                "all of them paused at the other member",
            )
            assert not second.events("handler_failed")
            assert sum(Ledger(tmp_path).counts.values()) == 300
            _command(tmp_path, topic, "resume", "--all")
            second.wait_caught_up(kafka.end_offsets(topic))
            assert second.terminate() == 0
    ledger = Ledger(tmp_path)
    assert ledger.counts.keys() == records | {Coordinate(each.partition, each.offset + 100) for each in records}
    assert not ledger.repeated
    assert not ledger.disorder


def test_the_breaker_stops_a_partition_that_fails(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    bad, good = orjson.dumps({"bad": True}), orjson.dumps({"bad": False})
    kafka.produce(topic, [Record(HELD, None, value) for value in [bad] * 400 + [good] * 100])
    kafka.produce(topic, [Record(0, None, good) for _ in range(500)])
    settings = (
        *QUICK_SESSION,
        "handler.max_dead_letter_ratio=0.5",
        "handler.dead_letter_min_records=10",
        "max_retries=0",
    )

    def letters() -> list[int]:
        store = open_dead_letters(f"sqlite:///{tmp_path / 'offsets.db'}", topic, 5_000)
        try:
            return [stored.letter.offset for stored in store.find(LetterFilter())]
        finally:
            store.close()

    with DaemonProcess(tmp_path, kafka.bootstrap, topic, "tests.pause_handlers:refuse", settings=settings) as daemon:
        held = _held(daemon.wait_status(_is_held, "the breaker to trip"))
        assert held is not None
        assert held.paused is not None
        assert held.paused.by == "breaker"
        assert held.paused.way_on == f"kafkasrcd resume {topic}:{HELD}"
        assert held.problem == f"{held.paused.reason}; mend it, then {held.paused.way_on}"
        (event,) = daemon.events("dead_letter_breaker")
        assert event["partition"] == HELD
        assert held.paused.reason in event["message"]
        daemon.wait_status(
            lambda status: [each.committed for each in status.partitions if each.partition == 0] == [500],
            "the other partition done",
        )
        found = letters()
        assert 10 <= len(found) < 300
        assert daemon.terminate() == 0
        daemon.start()
        held = _held(daemon.wait_status(_is_held, "the partition paused after a restart"))
        assert held is not None
        assert held.dead_lettered == 0
        assert held.processed == len(found)
        assert letters() == found
        _command(tmp_path, topic, "resume", f"{topic}:{HELD}")
        daemon.wait_status(
            lambda status: (held := _held(status)) is not None and held.dead_lettered >= 10 and held.state == "paused",
            "the breaker to trip again, after as many records as the first time",
        )
        while daemon.status().partitions[HELD].committed != 500:
            if _is_held(daemon.status()):
                _command(tmp_path, topic, "resume", topic)
            daemon.wait_status(
                lambda status: _is_held(status) or status.partitions[HELD].committed == 500, "the next stop, or the end"
            )
        assert daemon.terminate() == 0
    assert letters() == list(range(400))
    assert Ledger(tmp_path).counts.keys() == {Coordinate(0, number) for number in range(500)} | {
        Coordinate(HELD, number) for number in range(400, 500)
    }
    assert not Ledger(tmp_path).repeated
