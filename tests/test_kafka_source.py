"""KafkaSource on a real broker: the seed's methods, what counts as processed, and how its processes end."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, assert_type

import msgspec
import orjson
import psutil
import pytest

from kafkasrcd import (
    AssignmentLost,
    CommitStrategy,
    ConfigurationError,
    KafkaSource,
    KafkaSourceConfig,
    KafkasrcdError,
    Message,
    SqlStateBackend,
    WorkerError,
)
from kafkasrcd.storage.offset_store import TopicPartition
from tests.kafka_cluster import KafkaCluster, Record
from tests.source_rig import DEADLINE_SECONDS, PARTITIONS, Order, committed, config, polled, produce
from tests.waiting import wait_until

STRATEGIES = [CommitStrategy.PERIODIC, CommitStrategy.MANUAL, CommitStrategy.AUTO]


@pytest.fixture
def topic(kafka: KafkaCluster, topic_name: str) -> str:
    kafka.create_topic(topic_name, partitions=PARTITIONS)
    return topic_name


def test_it_has_typed_messages_in_order_and_commits_on_close(kafka: KafkaCluster, topic: str) -> None:
    produce(kafka, topic, 300)
    with KafkaSource(config(kafka, topic), payload_type=Order) as source:
        assert_type(source, KafkaSource[Order])
        found = polled(source, 300)
        assert sorted(message.payload.n for message in found) == list(range(300))
        assert source.poll(0.1) is None
    by_partition: dict[int, list[int]] = {}
    for message in found:
        by_partition.setdefault(message.partition, []).append(message.offset)
    assert by_partition == {partition: list(range(100)) for partition in range(PARTITIONS)}
    assert committed(kafka, topic) == dict.fromkeys(range(PARTITIONS), 100)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_second_source_goes_on_where_the_first_was_closed(
    kafka: KafkaCluster, topic: str, strategy: CommitStrategy
) -> None:
    produce(kafka, topic, 90)
    settings = config(kafka, topic, commit_strategy=strategy)
    seen: list[int] = []
    with KafkaSource(settings, payload_type=Order) as source:
        seen += [message.payload.n for message in polled(source, 40)]
        source.commit()
    with KafkaSource(settings, payload_type=Order) as source:
        seen += [message.payload.n for message in polled(source, 50)]
        source.commit()
        assert source.poll(0.2) is None
    assert sorted(seen) == list(range(90))


def test_manual_commits_only_what_it_is_told_and_goes_on_all_the_same(kafka: KafkaCluster, topic: str) -> None:
    """More than a ring holds is polled without a commit."""
    pad = "x" * 1_000
    kafka.produce(topic, [Record(0, None, orjson.dumps({"n": n, "pad": pad})) for n in range(2_000)])
    settings = config(kafka, topic, commit_strategy=CommitStrategy.MANUAL)
    settings.supervisor = msgspec.structs.replace(settings.supervisor, ring_bytes=262_144)
    with KafkaSource(settings) as source:
        polled(source, 500)
        source.commit()
        assert committed(kafka, topic) == {0: 500}
        polled(source, 1_500)
        time.sleep(1.5)
        assert committed(kafka, topic) == {0: 500}
    assert committed(kafka, topic) == {0: 500}
    with KafkaSource(settings) as source:
        assert [message.offset for message in polled(source, 1)] == [500]


def test_batches(kafka: KafkaCluster, topic: str) -> None:
    produce(kafka, topic, 3_000)
    kafka.produce(topic, [Record(0, None, b"no JSON"), Record(0, None, b"{}"), Record(0, None, None)])
    seen: list[Any] = []
    with KafkaSource(config(kafka, topic)) as source:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len(seen) < 3_002 and time.monotonic() < deadline:
            batch = source.poll_batch(max_messages=700)
            assert len(batch) <= 700
            seen += [message.payload for message in batch]
        assert source.poll_batch(timeout=0.1) == []
        metrics = source.metrics()
    assert sorted(payload["n"] for payload in seen if payload) == list(range(3_000))
    assert [payload for payload in seen if not payload] == [{}, None]
    assert (metrics.messages_consumed, metrics.messages_failed) == (3_003, 1)
    assert committed(kafka, topic) == {0: 1_003, 1: 1_000, 2: 1_000}


def test_metrics_and_lag(kafka: KafkaCluster, topic: str) -> None:
    produce(kafka, topic, 30)
    with KafkaSource(config(kafka, topic)) as source:
        assert source.metrics().messages_consumed == 0
        polled(source, 30)
        assert source.poll(0.2) is None
        wait_until(lambda: source.metrics().total_commits > 0, DEADLINE_SECONDS, "a periodic commit")
        metrics = source.metrics()
        assert metrics.messages_consumed == 30
        assert metrics.messages_per_partition == dict.fromkeys(range(PARTITIONS), 10)
        assert metrics.assigned_partitions == list(range(PARTITIONS))
        assert metrics.bytes_consumed > 30 * 8
        assert metrics.avg_message_size > 8
        assert metrics.throughput_msgs_per_sec > 0
        assert metrics.last_commit_time is not None
        assert metrics.rebalance_count == 1
        wait_until(
            lambda: source.get_lag() == dict.fromkeys(range(PARTITIONS), 0),
            DEADLINE_SECONDS,
            "no lag",
            seen=source.get_lag,
        )
        source.pause([(topic, 1)])
        produce(kafka, topic, 30)
        assert {message.partition for message in polled(source, 20)} == {0, 2}
        assert source.poll(0.2) is None
        wait_until(lambda: source.get_lag()[1] == 10, DEADLINE_SECONDS, "the lag of what is paused")
        source.resume([(topic, 1)])
        assert {message.partition for message in polled(source, 10)} == {1}
        assert [(name.topic, name.partition) for name in source.assignment()] == [(topic, n) for n in range(PARTITIONS)]


def test_seek_goes_back_and_forth(kafka: KafkaCluster, topic: str) -> None:
    produce(kafka, topic, 100, partitions=1)
    with KafkaSource(config(kafka, topic)) as source:
        polled(source, 50)
        source.seek(topic, 0, 10)
        assert [message.offset for message in polled(source, 20)] == list(range(10, 30))
        source.seek(topic, 0, 90)
        assert [message.offset for message in polled(source, 10)] == list(range(90, 100))
        with pytest.raises(AssignmentLost, match="not assigned"):
            source.seek(topic, 77, 0)
    assert committed(kafka, topic)[0] == 100


def test_start_pushes_into_a_bounded_queue_until_it_is_closed(kafka: KafkaCluster, topic: str) -> None:
    produce(kafka, topic, 200)
    source = KafkaSource(config(kafka, topic), payload_type=Order)
    channel: queue.Queue[Message[Order]] = queue.Queue(maxsize=10)
    thread = threading.Thread(target=source.start, args=(channel,))
    thread.start()
    seen = [channel.get(timeout=DEADLINE_SECONDS).payload.n for _ in range(200)]
    assert sorted(seen) == list(range(200))
    produce(kafka, topic, 50)
    wait_until(channel.full, DEADLINE_SECONDS, "the queue to be full")
    source.close()
    thread.join(DEADLINE_SECONDS)
    assert not thread.is_alive()
    taken = 200 + channel.qsize()
    assert sum(committed(kafka, topic).values()) == taken


def test_two_sources_share_the_partitions_and_tell_of_it(kafka: KafkaCluster, topic: str) -> None:
    told: list[tuple[str, int]] = []
    first = KafkaSource(
        config(kafka, topic),
        payload_type=Order,
        on_assigned=lambda names: told.extend(("assigned", name.partition) for name in names),
        on_revoked=lambda names: told.extend(("revoked", name.partition) for name in names),
    )
    seen: Counter[int] = Counter()
    with first, KafkaSource(config(kafka, topic), payload_type=Order) as second:
        produce(kafka, topic, 30)
        seen.update(message.payload.n for message in polled(first, 30))
        assert sorted(told) == [("assigned", partition) for partition in range(PARTITIONS)]

        def both_polled() -> bool:
            assert (first.poll(0.05), second.poll(0.05)) == (None, None)
            return len(second.assignment()) > 0

        wait_until(both_polled, DEADLINE_SECONDS, "the second to have some")
        assert ("revoked", second.assignment()[0].partition) in told
        produce(kafka, topic, 300, first=30)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while sum(seen.values()) < 330 and time.monotonic() < deadline:
            for source in (first, second):
                seen.update(message.payload.n for message in source.poll_batch(timeout=0.05))
    assert seen == dict.fromkeys(range(330), 1)


def test_a_killed_engine_is_told_and_the_next_call_goes_on(kafka: KafkaCluster, topic: str) -> None:
    produce(kafka, topic, 300)
    with KafkaSource(config(kafka, topic), payload_type=Order) as source:
        seen = [message.payload.n for message in polled(source, 150)]
        source.commit()
        (engine,) = [each for each in psutil.Process().children() if "source_engine" in " ".join(each.cmdline())]
        children = engine.children(recursive=True)
        engine.kill()
        assert not psutil.wait_procs(children, timeout=5)[1]

        def poll_on() -> None:
            while True:
                seen.extend(message.payload.n for message in source.poll_batch())

        with pytest.raises(WorkerError, match="killed"):
            poll_on()
        # What was in the rings still may have been polled, and nobody could commit it.
        seen += [message.payload.n for message in polled(source, 150)]
        assert source.metrics().messages_consumed >= 299
    assert sorted(set(seen)) == list(range(300))
    assert committed(kafka, topic) == dict.fromkeys(range(PARTITIONS), 100)


def test_a_listener_may_seek(kafka: KafkaCluster, topic: str) -> None:
    produce(kafka, topic, 30, partitions=1)
    sought: list[TopicPartition] = []

    def on_assigned(names: Sequence[TopicPartition]) -> None:
        for name in names:
            if name.partition == 0 and not sought:
                sought.append(name)
                source.seek(name.topic, 0, 20)

    source = KafkaSource(config(kafka, topic), on_assigned=on_assigned)
    with source:
        assert [message.offset for message in polled(source, 10)] == list(range(20, 30))


def test_what_is_assigned_later_is_heard_of_while_others_are_busy(kafka: KafkaCluster, topic: str) -> None:
    kafka.produce(topic, [Record(n % PARTITIONS, None, orjson.dumps({"n": n})) for n in range(60_000)])
    first = KafkaSource(config(kafka, topic), payload_type=Order)
    with first:
        polled(first, 3_000)
        second = KafkaSource(config(kafka, topic), payload_type=Order)
        with second:
            given = {message.partition for message in polled(second, 3_000)}
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not given & {message.partition for message in first.poll_batch(timeout=0.1)}:
            assert time.monotonic() < deadline, "nothing of what came back"


def test_with_a_state_backend_it_goes_on_from_there(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    backend = SqlStateBackend(f"sqlite:///{tmp_path / 'offsets.db'}")
    produce(kafka, topic, 60)
    for first in (0, 20, 40):
        with KafkaSource(config(kafka, topic), Order, backend) as source:
            seen = polled(source, 20)
            assert len({message.payload.n for message in seen}) == 20, first
    assert sum(committed(kafka, topic).values()) == 60


def test_an_exception_in_the_block_leaves_the_message_in_hand_for_the_next(kafka: KafkaCluster, topic: str) -> None:
    produce(kafka, topic, 10, partitions=1)

    def divide() -> None:
        with KafkaSource(config(kafka, topic)) as source:
            polled(source, 5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        divide()
    assert committed(kafka, topic) == {0: 4}


def test_wrong_uses_are_told_in_one_sentence(kafka: KafkaCluster, topic: str) -> None:
    with pytest.raises(ConfigurationError, match="brokers"):
        KafkaSource(config(kafka, topic, brokers="here:there"), payload_type=Order)
    with pytest.raises(ConfigurationError, match="on_checkpoint"):
        KafkaSource(config(kafka, topic, commit_strategy=CommitStrategy.ON_CHECKPOINT))
    source = KafkaSource(KafkaSourceConfig(brokers=kafka.bootstrap, group_id=topic))
    with pytest.raises(ConfigurationError, match="no topics"):
        source.poll()
    source.close()
    source.close()
    with pytest.raises(KafkasrcdError, match="is closed"):
        source.poll()


@pytest.fixture
def running(kafka: KafkaCluster, topic: str, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A program that has polled some messages and holds one; it says so."""
    produce(kafka, topic, 30, partitions=1)
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        "from kafkasrcd import KafkaSource, KafkaSourceConfig\n"
        f"config = KafkaSourceConfig(brokers={kafka.bootstrap!r}, group_id={topic!r}, topics=[{topic!r}])\n"
        "source = KafkaSource(config)\n"
        "while (message := source.poll()) is None or message.offset < 9: pass\n"
        "print('ready', flush=True)\n"
        "what = sys.stdin.readline().strip()\n"
        "if what == 'exit': sys.exit(0)\n"
        "if what == '_exit': os._exit(0)\n"
        "if what == 'raise': raise ValueError\n"
        "if what == 'fork':\n"
        "    child = os.fork()\n"
        "    if child == 0: time.sleep(60); os._exit(0)\n"
        "    print(child, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
        child.kill()
    process.kill()
    process.communicate()


@pytest.mark.parametrize("how", ["exit", "_exit", "raise", "SIGKILL", "fork"])
def test_its_processes_end_with_the_program_however_it_ends(
    running: "subprocess.Popen[str]", kafka: KafkaCluster, topic: str, how: str
) -> None:
    engine = [child for child in psutil.Process(running.pid).children() if "source_engine" in " ".join(child.cmdline())]
    processes = [*engine, *engine[0].children(recursive=True)]
    assert len(processes) >= 3
    assert running.stdin is not None
    assert running.stdout is not None
    forked: int | None = None
    if how == "SIGKILL":
        running.kill()
    else:
        running.stdin.write(f"{how}\n")
        running.stdin.flush()
    if how == "fork":
        forked = int(running.stdout.readline())
        running.kill()
    running.wait(DEADLINE_SECONDS)
    gone, alive = psutil.wait_procs(processes, timeout=5)
    if forked is not None:
        os.kill(forked, signal.SIGKILL)  # it had the engine's channel all the time
    assert not alive
    assert len(gone) == len(processes)
    # The nine that were finished, and not the one in its hands.
    assert committed(kafka, topic) == {0: 9}


def test_ctrl_c_interrupts_a_poll_at_once_and_close_still_commits(kafka: KafkaCluster, topic: str) -> None:
    produce(kafka, topic, 10, partitions=1)
    source = KafkaSource(config(kafka, topic))
    polled(source, 10)
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        source.poll(60)
    assert time.monotonic() - started < 30
    source.close()
    timer.join()
    assert committed(kafka, topic) == {0: 10}
