"""KafkaSource with ``on_checkpoint``: effects and offsets in one transaction, on a real broker and both databases."""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from sqlalchemy import create_engine, insert, select
from sqlalchemy.pool import NullPool

from kafkasrcd import AssignmentLost, CommitStrategy, ConfigurationError, KafkaSource, KafkasrcdError, SqlStateBackend
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.storage.opening import open_store
from tests.kafka_cluster import KafkaCluster
from tests.postgres import PostgresServer
from tests.source_rig import DEADLINE_SECONDS, PARTITIONS, Order, config, polled, produce
from tests.strategy_handlers import effects, metadata
from tests.waiting import wait_until


class Database:
    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool)
        metadata.create_all(self.engine)

    def effects(self) -> Counter[tuple[int, int]]:
        with self.engine.connect() as connection:
            return Counter((row.partition, row.offset) for row in connection.execute(select(effects)))


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterable[Database]:
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        found = Database(server.url(server.create_database()))
    else:
        found = Database(f"sqlite:///{tmp_path / 'effects.db'}")
    yield found
    found.engine.dispose()


@pytest.fixture
def topic(kafka: KafkaCluster, topic_name: str) -> str:
    kafka.create_topic(topic_name, partitions=PARTITIONS)
    return topic_name


def _source(kafka: KafkaCluster, topic: str, database: Database) -> KafkaSource[Order]:
    settings = config(kafka, topic, commit_strategy=CommitStrategy.ON_CHECKPOINT)
    return KafkaSource(settings, payload_type=Order, state_backend=SqlStateBackend(database.url))


def _all(count: int) -> Counter[tuple[int, int]]:
    return Counter((partition, offset) for partition in range(PARTITIONS) for offset in range(count))


def _handle(source: KafkaSource[Order], count: int) -> None:
    """So many, ten a checkpoint."""
    left = count
    deadline = time.monotonic() + DEADLINE_SECONDS
    while left:
        assert time.monotonic() < deadline, f"{left} left"
        with source.checkpoint() as tx:
            for message in source.poll_batch(min(10, left)):
                tx.execute(insert(effects), {"partition": message.partition, "offset": message.offset})
                left -= 1


def test_effects_and_offsets_are_committed_together(kafka: KafkaCluster, topic: str, database: Database) -> None:
    produce(kafka, topic, 90)
    for count in (20, 40, 30):
        with _source(kafka, topic, database) as source:
            _handle(source, count)
            source.poll_batch(5, timeout=0.2)  # not committed, and polled again by the next
    assert database.effects() == _all(30)
    wait_until(
        lambda: kafka.committed(topic, topic) == dict.fromkeys(range(PARTITIONS), 30), DEADLINE_SECONDS, "Kafka to know"
    )


def test_what_raises_is_rolled_back_and_polled_again(kafka: KafkaCluster, topic: str, database: Database) -> None:
    produce(kafka, topic, 30, partitions=1)

    def fail(source: KafkaSource[Order]) -> None:
        with source.checkpoint() as tx:
            for message in polled(source, 7):
                tx.execute(insert(effects), {"partition": message.partition, "offset": message.offset})
            raise ZeroDivisionError

    with _source(kafka, topic, database) as source:
        _handle(source, 10)
        with pytest.raises(ZeroDivisionError):
            fail(source)
        assert sum(database.effects().values()) == 10
        assert [message.offset for message in polled(source, 1)] == [10]
        with source.checkpoint() as tx:
            tx.execute(insert(effects), {"partition": 0, "offset": 10})
        _handle(source, 19)
    assert database.effects() == Counter((0, offset) for offset in range(30))


def test_a_claim_by_another_undoes_the_checkpoint(kafka: KafkaCluster, topic: str, database: Database) -> None:
    produce(kafka, topic, 30, partitions=1)

    def overtaken(source: KafkaSource[Order]) -> None:
        (message,) = polled(source, 1)
        store = open_store(database.url, topic, 5_000, shared_with_effects=True)
        try:
            store.claim([TopicPartition(topic, 0)], "another host")
        finally:
            store.close()
        with source.checkpoint() as tx:
            tx.execute(insert(effects), {"partition": message.partition, "offset": message.offset})

    with _source(kafka, topic, database) as source:
        _handle(source, 10)
        with pytest.raises(AssignmentLost, match="another member"):
            overtaken(source)
        assert sum(database.effects().values()) == 10
        # The group says that it is this source's, which claims it anew.
        _handle(source, 20)
    assert database.effects() == Counter((0, offset) for offset in range(30))


def test_killed_over_and_over_each_effect_is_there_once(kafka: KafkaCluster, topic: str, database: Database) -> None:
    produce(kafka, topic, 300)
    program = (
        "import sys, time\n"
        "from tests.test_source_checkpoint import _source, Database, effects, insert\n"
        "class Kafka: bootstrap = sys.argv[1]\n"
        "source = _source(Kafka, sys.argv[2], Database(sys.argv[3]))\n"
        "while True:\n"
        "    with source.checkpoint() as tx:\n"
        "        for message in source.poll_batch(7):\n"
        "            tx.execute(insert(effects), {'partition': message.partition, 'offset': message.offset})\n"
        "            time.sleep(0.005)\n"
    )
    for killed in range(5):
        command = [sys.executable, "-c", program, kafka.bootstrap, topic, database.url]
        with subprocess.Popen(command) as process:
            try:
                _wait_effects(database, 50 * (killed + 1))
            finally:
                process.kill()
    with _source(kafka, topic, database) as source:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while sum(database.effects().values()) < 300 and time.monotonic() < deadline:
            with source.checkpoint() as tx:
                for message in source.poll_batch(50, timeout=1):
                    tx.execute(insert(effects), {"partition": message.partition, "offset": message.offset})
    assert database.effects() == _all(100)


def _wait_effects(database: Database, least: int) -> None:
    wait_until(lambda: sum(database.effects().values()) >= least, DEADLINE_SECONDS, f"{least} effects")


def test_what_has_no_transactions_says_so(kafka: KafkaCluster, topic: str, database: Database) -> None:
    settings = config(kafka, topic, commit_strategy=CommitStrategy.ON_CHECKPOINT)
    with pytest.raises(ConfigurationError, match="state_backend=SqlStateBackend"):
        KafkaSource(settings)
    with KafkaSource(config(kafka, topic)) as source, pytest.raises(KafkasrcdError, match="on_checkpoint"):
        source.checkpoint().__enter__()
    with _source(kafka, topic, database) as source, pytest.raises(KafkasrcdError, match="checkpoint"):
        source.commit()
