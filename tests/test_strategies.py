"""The four commit strategies on a real broker: what each records, when, and what a crash loses or repeats."""

import os
import signal
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.pool import NullPool

from kafkasrcd.storage.opening import open_store
from tests.daemon_process import QUICK_SESSION, DaemonProcess
from tests.kafka_cluster import KafkaCluster, Record
from tests.ledger import Coordinate, Ledger, SteadyProducer
from tests.postgres import PostgresServer
from tests.strategy_handlers import Effect, effects, metadata
from tests.waiting import wait_until

PARTITIONS = 4


@pytest.fixture
def topic(kafka: KafkaCluster, topic_name: str) -> str:
    kafka.create_topic(topic_name, partitions=PARTITIONS)
    return topic_name


class Effects:
    """The database of store and effects, and what is in it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool)
        metadata.create_all(self._engine)

    def counts(self) -> Counter[Coordinate]:
        """How often each record's effect is there."""
        with self._engine.connect() as connection:
            rows = [
                *connection.execute(select(effects.c.partition, effects.c.offset)),
                *connection.execute(select(Effect.partition, Effect.offset)),
            ]
        return Counter(Coordinate(partition, offset) for partition, offset in rows)

    def recorded(self, group: str) -> dict[int, int | None]:
        """What the store has."""
        store = open_store(self.url, group, 5_000, shared_with_effects=True)
        try:
            return {row.topic_partition.partition: row.next_offset for row in store.offsets()}
        finally:
            store.close()

    def close(self) -> None:
        self._engine.dispose()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterable[Effects]:
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        found = Effects(server.url(server.create_database()))
    else:
        found = Effects(f"sqlite:///{tmp_path / 'effects.db'}")
    yield found
    found.close()


def _daemon(
    kafka: KafkaCluster, topic: str, folder: Path, target: str, *settings: str, name: str = "a"
) -> DaemonProcess:
    target = f"tests.strategy_handlers:{target}"
    return DaemonProcess(folder, kafka.bootstrap, topic, target, name=name, settings=(*QUICK_SESSION, *settings))


def _produce(kafka: KafkaCluster, topic: str, values: Iterable[bytes], partition: int = 0) -> None:
    kafka.produce(topic, [Record(partition, None, value) for value in values])


def _kill_handlers(daemon: DaemonProcess) -> None:
    before = daemon.status().handlers
    for handler in before:
        assert handler.pid is not None
        os.kill(handler.pid, signal.SIGKILL)
    daemon.wait_status(
        lambda status: all(
            now.restarts > then.restarts and now.state == "ready"
            for now, then in zip(status.handlers, before, strict=True)
        ),
        "the handlers to be back",
    )


# ---- on_checkpoint ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["effect", "effects_of_batch", "effect_async", "effect_by_orm"])
def test_effects_and_offsets_are_one_through_any_death(
    kafka: KafkaCluster, topic: str, tmp_path: Path, database: Effects, target: str
) -> None:
    """Handler processes, then the supervisor, killed under load: each record's effect is there once."""
    settings = ("commit_strategy=on_checkpoint", f"store.url={database.url}")

    def wait_effects(more: int) -> None:
        before = database.counts().total()
        wait_until(lambda: database.counts().total() >= before + more, 60, f"{more} more effects")

    with (
        SteadyProducer(kafka.bootstrap, topic, PARTITIONS, rate_per_second=500) as producer,
        _daemon(kafka, topic, tmp_path, target, *settings) as daemon,
    ):
        daemon.wait_running(PARTITIONS)
        wait_effects(300)
        _kill_handlers(daemon)
        wait_effects(300)
        _, alive = psutil.wait_procs(daemon.kill(), timeout=2)
        assert not alive
        committed, recorded = kafka.committed(topic, topic), database.recorded(topic)
        assert all((recorded[partition] or 0) >= offset for partition, offset in committed.items())
        daemon.start()
        wait_effects(300)
        producer.stop()
        ends = kafka.end_offsets(topic)
        daemon.wait_caught_up(ends)
        assert daemon.terminate() == 0
    counts = database.counts()
    assert counts.keys() == producer.acknowledged
    assert set(counts.values()) == {1}
    assert database.recorded(topic) == kafka.committed(topic, topic) == ends


@pytest.mark.parametrize("target", ["effect", "effect_async", "effect_by_orm"])
def test_a_call_that_raises_undoes_only_itself(
    kafka: KafkaCluster, topic: str, tmp_path: Path, database: Effects, target: str
) -> None:
    settings = (
        "commit_strategy=on_checkpoint",
        f"store.url={database.url}",
        "checkpoint_interval_ms=2000",
        "retry_backoff_ms=20",
    )
    _produce(kafka, topic, [b"{}", b'{"raise": 2}', b"{}", b'{"raise": 1}', b"{}"])
    with _daemon(kafka, topic, tmp_path, target, *settings) as daemon:
        daemon.wait_caught_up({0: 5, 1: 0, 2: 0, 3: 0})
        assert daemon.status().partitions[0].failures == 3
        assert daemon.terminate() == 0
    assert database.counts() == Counter({Coordinate(0, offset): 1 for offset in range(5)})


def test_a_record_that_keeps_failing_stops_behind_what_is_done(
    kafka: KafkaCluster, topic: str, tmp_path: Path, database: Effects
) -> None:
    settings = (
        "commit_strategy=on_checkpoint",
        f"store.url={database.url}",
        "retry_backoff_ms=1",
        "handler.on_failure=stop",
    )
    _produce(kafka, topic, [b"{}", b"{}", b'{"raise": 1000}', b"{}"])
    with _daemon(kafka, topic, tmp_path, "effect", *settings) as daemon:
        daemon.wait_status(
            lambda status: any(each.state == "failed" and each.committed == 2 for each in status.partitions),
            "a failure",
        )
        assert daemon.terminate() == 0
    assert database.counts() == Counter({Coordinate(0, 0): 1, Coordinate(0, 1): 1})
    assert database.recorded(topic)[0] == kafka.committed(topic, topic)[0] == 2


# ---- auto ------------------------------------------------------------------------------------------------------------


def test_auto_records_what_is_handed_off_and_loses_it_in_a_crash(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    _produce(kafka, topic, [b"{}"] * 2_000)
    with _daemon(kafka, topic, tmp_path, "slow", "commit_strategy=auto") as daemon:
        daemon.wait_status(
            lambda status: any(each.committed == 2_000 for each in status.partitions),
            "all that is handed off committed",
        )
        assert daemon.events("auto_commits_early")
        _, alive = psutil.wait_procs(daemon.kill(), timeout=2)
        assert not alive
        handled = Ledger(tmp_path).counts.total()
        assert 0 < handled < 2_000, "it was committed before it was handled"
        daemon.start()
        daemon.wait_caught_up({0: 2_000, 1: 0, 2: 0, 3: 0})
        assert daemon.terminate() == 0
    ledger = Ledger(tmp_path)
    assert not ledger.repeated
    assert ledger.counts.total() in (handled, handled + 1), "a line may be written between the count and the death"


def test_auto_finishes_what_is_handed_off_before_it_stops(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    """Also where that takes longer than a lease."""
    _produce(kafka, topic, [b"{}"] * 1_000)
    settings = ("commit_strategy=auto", "supervisor.drain_timeout_seconds=60")
    with _daemon(kafka, topic, tmp_path, "slow", *settings) as daemon:
        daemon.wait_status(lambda status: any(each.committed == 1_000 for each in status.partitions), "it committed")
        assert daemon.terminate(60) == 0
    ledger = Ledger(tmp_path)
    assert ledger.counts == Counter({Coordinate(0, offset): 1 for offset in range(1_000)})
    assert not ledger.disorder


# ---- manual ----------------------------------------------------------------------------------------------------------


def test_manual_records_what_handlers_commit(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    with (
        SteadyProducer(kafka.bootstrap, topic, PARTITIONS) as producer,
        _daemon(kafka, topic, tmp_path, "commit_each", "commit_strategy=manual", "commit_interval_secs=3600") as daemon,
    ):
        daemon.wait_running(PARTITIONS)
        wait_until(lambda: Ledger(tmp_path).counts.total() > 2_000, 60, "records handled")
        producer.stop()
        ends = kafka.end_offsets(topic)
        daemon.wait_caught_up(ends)  # long before commit_interval_secs
        assert daemon.terminate() == 0
    ledger = Ledger(tmp_path)
    assert ledger.counts.keys() == producer.acknowledged
    assert not ledger.repeated
    assert kafka.committed(topic, topic) == ends


def test_manual_moves_only_the_contiguous_prefix(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    now, later, no = b"{}", b'{"commit": "later"}', b'{"commit": "no"}'
    settings = ("commit_strategy=manual", "handler.processes=1")

    def reached(daemon: DaemonProcess, processed: int, committed: int) -> None:
        daemon.wait_status(
            lambda status: (status.partitions[0].processed, status.partitions[0].committed) == (processed, committed),
            f"{processed} processed and {committed} committed",
        )

    with _daemon(kafka, topic, tmp_path, "commit_as_told", *settings) as daemon:
        daemon.wait_running(PARTITIONS)
        _produce(kafka, topic, [now, later, later])
        reached(daemon, 3, 1)
        _produce(kafka, topic, [now])
        reached(daemon, 4, 4)
        _produce(kafka, topic, [no, now, now])
        reached(daemon, 7, 4)
        assert daemon.terminate() == 0
    assert kafka.committed(topic, topic)[0] == 4
    with _daemon(kafka, topic, tmp_path, "commit_each", *settings, name="b") as daemon:
        daemon.wait_caught_up({0: 7, 1: 0, 2: 0, 3: 0})
        assert daemon.terminate() == 0
    assert Ledger(tmp_path).repeated == {Coordinate(0, offset): 1 for offset in (4, 5, 6)}


def test_what_a_dead_handler_had_not_committed_is_handled_again(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    _produce(kafka, topic, [b"{}", b'{"commit": "no"}', b"{}", b'{"die": true, "commit": "no"}', b"{}"])
    with _daemon(
        kafka, topic, tmp_path, "commit_as_told_or_die", "commit_strategy=manual", "handler.processes=1"
    ) as daemon:
        daemon.wait_status(
            lambda status: status.partitions and status.partitions[0].processed == 5, "all processed, the second time"
        )
        assert daemon.status().partitions[0].committed == 1
        assert daemon.terminate() == 0
    assert Ledger(tmp_path).repeated == {Coordinate(0, offset): 1 for offset in (1, 2, 3)}


def test_only_manual_lets_a_message_commit(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    _produce(kafka, topic, [b"{}"])
    with _daemon(kafka, topic, tmp_path, "commit_each", "max_retries=0") as daemon:
        status = daemon.wait_status(lambda status: status.partitions and status.partitions[0].problem, "a failure")
        assert "commit_strategy manual" in status.partitions[0].problem


def test_manual_that_never_commits_is_told_of(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    _produce(kafka, topic, [b'{"commit": "no", "padding": "%s"}' % (b"x" * 1_000)] * 200)
    settings = ("commit_strategy=manual", "supervisor.ring_bytes=65536")
    with _daemon(kafka, topic, tmp_path, "commit_as_told", *settings) as daemon:
        status = daemon.wait_status(
            lambda status: any(each.problem for each in status.partitions), "a word about it", 60
        )
        assert "processed and not committed" in status.partitions[0].problem
        assert "message.commit()" in status.partitions[0].problem
        assert 0 < (status.partitions[0].processed or 0) < 200
        assert status.partitions[0].committed == 0
