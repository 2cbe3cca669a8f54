"""A real Apache Kafka for tests: one broker or three, in KRaft combined mode, on 127.0.0.1.

    with KafkaCluster(brokers=3) as cluster:
        cluster.create_topic("orders", partitions=4, replication_factor=3)
        cluster.produce("orders", [Record(0, b"key", b"value")])
        cluster.kill_broker(1)
        cluster.start_broker(1)

Brokers are numbered from 0, and that number is also Kafka's node id, as in `leaders()`.
"""

import base64
import functools
import itertools
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import AlterConfigOpType, ConfigEntry, ConfigResource
from confluent_kafka.admin._metadata import ClusterMetadata
from confluent_kafka.admin._resource import ResourceType
from confluent_kafka.cimpl import NewPartitions, NewTopic

from tests.kafka_broker import KafkaBroker, KafkaFailed, kafka_missing
from tests.waiting import wait_until

__all__ = ["KafkaCluster", "KafkaFailed", "Record", "RecordHeaders", "kafka_missing"]

RecordHeaders: TypeAlias = list[tuple[str, str | bytes | None]]

# One broker is up in 1.5 s and three in 4 s on two idle cores; the rest is room for a loaded machine.
READY_DEADLINE_SECONDS = 60
REQUEST_DEADLINE_SECONDS = 20
# A clean leader hand-over takes 0.1 s, a fenced broker broker.session.timeout.ms (3 s).
LEADERS_DEADLINE_SECONDS = 30
PRODUCE_DEADLINE_SECONDS = 60

# Clients that outlive a broker's restart: librdkafka would otherwise wait up to 10 s before it connects again, and
# print every refused connection.
QUIET_CLIENT = {"log_level": 0, "reconnect.backoff.ms": 50, "reconnect.backoff.max.ms": 250}


class Record(NamedTuple):
    """A record to produce. `timestamp_ms` 0 means now."""

    partition: int
    key: bytes | None
    value: bytes | None
    headers: RecordHeaders | None = None
    timestamp_ms: int = 0


class Coordinate(NamedTuple):
    """Where a produced record is."""

    partition: int
    offset: int


class KafkaCluster:
    """Brokers as child processes, with their data in a temporary folder that `close` removes.

    `properties` are broker settings that go over the ones for tests. `heap_mb` defaults to 1024 for one broker and 512
    each for more. `optimized` gives the JVM its optimizing compiler, for benchmarks: it starts slower.
    Brokers die with the process that started them, also when that is killed.
    """

    def __init__(
        self,
        brokers: int = 1,
        *,
        properties: Mapping[str, str] | None = None,
        heap_mb: int | None = None,
        optimized: bool = False,
    ) -> None:
        self._broker_count = brokers
        self._properties = dict(properties or {})
        self._java_options = [f"-Xmx{heap_mb or (1024 if brokers == 1 else 512)}m"]
        if not optimized:
            self._java_options.append("-XX:TieredStopAtLevel=1")
        self._folder: Path | None = None
        self._admin: AdminClient | None = None
        self._producer: Producer | None = None
        self.brokers: list[KafkaBroker] = []

    def __enter__(self) -> "KafkaCluster":
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # ── The brokers ──────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Format and start all brokers, and wait until they are ready. Raises KafkaFailed or AssertionError."""
        if self.brokers:
            raise KafkaFailed("this cluster was started before")
        self._folder = Path(tempfile.mkdtemp(prefix="kafkasrcd-kafka-"))
        try:
            for node_id in range(self._broker_count):
                self.brokers.append(KafkaBroker(node_id, self._folder / f"broker-{node_id}", self._java_options))
            cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
            properties = self._broker_properties() | self._properties
            with ThreadPoolExecutor(self._broker_count) as pool:
                for formatted in [pool.submit(broker.format, cluster_id, properties) for broker in self.brokers]:
                    formatted.result()
            for broker in self.brokers:
                broker.start()
            self.wait_ready()
            self._open_producer()
            self._create_offsets_topic()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill every broker and remove its data. Calling it again does nothing."""
        self._producer = None
        if self._admin is not None:
            self._admin.__exit__(None, None, None)
            self._admin = None
        for broker in self.brokers:
            broker.close()
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    @property
    def bootstrap(self) -> str:
        """For `bootstrap.servers`: all brokers, also those that are down."""
        return ",".join(broker.address for broker in self.brokers)

    def stop_broker(self, number: int) -> None:
        """SIGTERM, and wait for the end: leadership is handed over and the logs are synced first."""
        self.brokers[number].stop()

    def kill_broker(self, number: int) -> None:
        """SIGKILL, also to a frozen broker. With three, its partitions move after broker.session.timeout.ms (3 s)."""
        self.brokers[number].kill()

    def start_broker(self, number: int, *, wait: bool = True) -> None:
        """Start it again on the same ports and data; with `wait`, return when it serves clients."""
        self.brokers[number].start()
        if wait:
            self.wait_ready()

    def freeze_broker(self, number: int) -> None:
        """SIGSTOP: its connections stay open and nothing answers."""
        self.brokers[number].freeze()

    def thaw_broker(self, number: int) -> None:
        """SIGCONT."""
        self.brokers[number].thaw()

    def wait_ready(self, deadline_seconds: float = READY_DEADLINE_SECONDS) -> None:
        """Wait until every running broker serves clients, knows of every other running one, and leads what it has to.

        Raises KafkaFailed with the tail of its log where a broker has ended or is not ready in time.
        """
        deadline = time.monotonic() + deadline_seconds
        running = [broker for broker in self.brokers if broker.is_running]
        expected = {broker.node_id for broker in running}
        for broker in running:
            try:
                self._wait_broker_ready(broker, expected, max(0.0, deadline - time.monotonic()))
            except AssertionError as error:
                raise broker.failure(f"is not ready ({error})") from error
        self._wait_leaders_serve(max(0.0, deadline - time.monotonic()))

    # ── Topics and groups ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def admin(self) -> AdminClient:
        """A client of this cluster for whatever has no method here; it lives as long as the cluster."""
        if self._admin is None:
            self._admin = AdminClient(self.client_settings())
        return self._admin

    def client_settings(self, **settings: str | int | float | bool) -> dict[str, str | int | float | bool]:
        """Settings for a client that connects again quickly and prints nothing. `group_id=` becomes `group.id`."""
        named = {name.replace("_", "."): value for name, value in settings.items()}
        return {"bootstrap.servers": self.bootstrap, **QUIET_CLIENT, **named}

    def create_topic(
        self,
        name: str,
        partitions: int = 1,
        *,
        replication_factor: int | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        """Create a topic and wait until every running broker knows a leader for each partition.

        `replication_factor` defaults to the number of brokers.
        """
        topic = NewTopic(
            name,
            num_partitions=partitions,
            replication_factor=replication_factor or self._broker_count,
            config=dict(config or {}),
        )
        _create(self.admin, topic)
        self.wait_leaders(name, partitions)

    def add_partitions(self, name: str, total: int) -> None:
        """Give a topic more partitions, `total` in all, and wait for their leaders."""
        _add_partitions(self.admin, NewPartitions(name, total))
        self.wait_leaders(name, total)

    def configure_topic(self, name: str, config: Mapping[str, str]) -> None:
        """Change settings of a topic."""
        entries = [
            ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET) for key, value in config.items()
        ]
        _configure(self.admin, ConfigResource(ResourceType.TOPIC, name, incremental_configs=entries))

    def delete_topic(self, name: str) -> None:
        """Delete a topic with its records. Brokers learn of it one after another."""
        _delete(self.admin, name)

    def delete_records(self, topic: str, before: Mapping[int, int]) -> None:
        """Delete the records of each partition that are older than the given offset, as retention would."""
        _delete_records(self.admin, [TopicPartition(topic, partition, offset) for partition, offset in before.items()])

    def wait_leaders(self, topic: str, partitions: int, deadline_seconds: float = LEADERS_DEADLINE_SECONDS) -> None:
        """Wait until every running broker tells of a live leader for each partition of the topic.

        Brokers learn of changes one after another: a client of another broker could still miss the topic.
        """
        for broker in self.brokers:
            if broker.is_running:
                self._wait_leaders_at(broker, topic, partitions, deadline_seconds)

    def leaders(self, topic: str) -> dict[int, int]:
        """The number of the broker that leads each partition; partitions without a live leader are left out."""
        return self._live_leaders(self.admin.list_topics(topic, timeout=REQUEST_DEADLINE_SECONDS), topic)

    def wait_in_sync(self, topic: str, deadline_seconds: float = LEADERS_DEADLINE_SECONDS) -> None:
        """Wait until every replica of the topic is in sync, as after a broker came back."""

        def behind() -> dict[int, list[int]]:
            metadata = self.admin.list_topics(topic, timeout=REQUEST_DEADLINE_SECONDS).topics[topic]
            return {
                p.id: sorted({*p.replicas} - {*p.isrs}) for p in metadata.partitions.values() if p.isrs != p.replicas
            }

        wait_until(
            lambda: not any(behind().values()),
            deadline_seconds,
            f"all replicas of {topic} to be in sync",
            seen=behind,
            ignoring=(KafkaException,),
        )

    def partitions(self, topic: str) -> list[int]:
        """The topic's partition numbers, in order. Raises KafkaException where there is no such topic."""
        metadata = self.admin.list_topics(topic, timeout=REQUEST_DEADLINE_SECONDS).topics[topic]
        if metadata.error is not None:
            raise KafkaException(metadata.error)
        return sorted(metadata.partitions)

    def end_offsets(self, topic: str) -> dict[int, int]:
        """The high watermark of each partition: the offset the next record will get."""
        return self._list_offsets(topic, OFFSET_END)

    def start_offsets(self, topic: str) -> dict[int, int]:
        """The log start of each partition: the offset of the oldest record there is."""
        return self._list_offsets(topic, OFFSET_BEGINNING)

    def committed(self, group: str, topic: str) -> dict[int, int]:
        """What the group has committed in Kafka, by partition; partitions without a commit are left out."""
        wanted = [TopicPartition(topic, partition) for partition in self.partitions(topic)]
        with closing(self._observer(group)) as consumer:
            found = consumer.committed(wanted, timeout=REQUEST_DEADLINE_SECONDS)
        for partition in found:
            if partition.error is not None:
                raise KafkaException(partition.error)
        return {partition.partition: partition.offset for partition in found if partition.offset >= 0}

    # ── Records ──────────────────────────────────────────────────────────────────────────────────────────────────

    def produce(
        self, topic: str, records: Iterable[tuple[int, bytes | None, bytes | None, RecordHeaders | None, int]]
    ) -> list[Coordinate]:
        """Produce the records (`Record`s, or tuples of their fields), and return where each one went.

        Order within a partition is that of `records`. Blocks until the brokers have acknowledged all of them. Raises
        KafkaException where one was refused, AssertionError where one was not acknowledged in time.
        """
        coordinates: dict[int, Coordinate] = {}
        failures: list[KafkaError] = []

        def remember(index: int, error: KafkaError | None, message: Message) -> None:
            partition, offset = message.partition(), message.offset()
            if error is not None:
                failures.append(error)
            elif partition is not None and offset is not None:
                coordinates[index] = Coordinate(partition, offset)

        producer = self._producer or self._open_producer()
        count = 0
        for partition, key, value, headers, timestamp_ms in records:
            callback = functools.partial(remember, count)
            _produce(producer, topic, Record(partition, key, value, headers, timestamp_ms), callback)
            count += 1
        self._flush(producer, topic, failures)
        return [coordinates[index] for index in range(count)]

    def fill(
        self,
        topic: str,
        count: int,
        *,
        value: Callable[[int], bytes] = lambda index: b"%d" % index,
        key: Callable[[int], bytes | None] = lambda index: None,
    ) -> None:
        """Produce `count` records quickly, in turn over all partitions: record `i` is `key(i)`, `value(i)`.

        Record `i` is at offset `i // partitions` of partition `i % partitions`, counted from where the topic ended.
        Blocks and raises like `produce`.
        """
        failures: list[KafkaError] = []

        def remember(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                failures.append(error)

        producer = self._producer or self._open_producer()
        turns = itertools.cycle(self.partitions(topic))
        for index, partition in zip(range(count), turns, strict=False):
            _produce(producer, topic, Record(partition, key(index), value(index)), remember)
        self._flush(producer, topic, failures)

    # ── Inside ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _broker_properties(self) -> dict[str, str]:
        """Settings for tests: quick to start, quick to rebalance, quick to notice the dead."""
        replication = str(self._broker_count)
        in_sync = str(min(2, self._broker_count))
        return {
            "controller.quorum.voters": ",".join(f"{b.node_id}@127.0.0.1:{b.controller_port}" for b in self.brokers),
            "auto.create.topics.enable": "false",
            "default.replication.factor": replication,
            # With 1, a kill may lose what was acknowledged: a test that counts would blame the wrong program.
            "min.insync.replicas": in_sync,
            "offsets.topic.replication.factor": replication,
            "offsets.topic.num.partitions": "3",
            "transaction.state.log.replication.factor": replication,
            "transaction.state.log.min.isr": in_sync,
            "transaction.state.log.num.partitions": "3",
            "share.coordinator.state.topic.replication.factor": replication,
            "share.coordinator.state.topic.min.isr": in_sync,
            "share.coordinator.state.topic.num.partitions": "3",
            # The default, 128 MB, would be most of the heap.
            "log.cleaner.dedupe.buffer.size": "4194304",
            # Classic groups.
            "group.initial.rebalance.delay.ms": "0",
            "group.min.session.timeout.ms": "1000",
            # KIP-848 groups: the broker decides, and its defaults notice a killed member after 45 s.
            "group.consumer.min.session.timeout.ms": "1000",
            "group.consumer.session.timeout.ms": "6000",
            "group.consumer.min.heartbeat.interval.ms": "500",
            "group.consumer.heartbeat.interval.ms": "1000",
            "group.consumer.assignment.interval.ms": "0",
            # 9 s by default. A killed broker keeps its leadership for that long, and one that starts again, even after
            # a clean stop, is refused as a duplicate until then. One broker alone has nobody to fail over to.
            "broker.session.timeout.ms": "2000" if self._broker_count == 1 else "3000",
            "broker.heartbeat.interval.ms": "250",
        }

    def _create_offsets_topic(self) -> None:
        """Have the group coordinator's topic made now, with all replicas, and not within the first test."""

        def coordinator_answers() -> bool:
            with closing(self._observer("kafkasrcd-tests-warm-up")) as consumer:
                consumer.committed([TopicPartition("__consumer_offsets", 0)], timeout=REQUEST_DEADLINE_SECONDS)
            return True

        wait_until(
            coordinator_answers, LEADERS_DEADLINE_SECONDS, "the group coordinator to answer", ignoring=(KafkaException,)
        )

    def _wait_broker_ready(self, broker: KafkaBroker, expected: set[int], deadline_seconds: float) -> None:
        known: set[int] = set()

        def is_ready() -> bool:
            broker.require_running()
            known.clear()
            known.update(self._metadata_from(broker).brokers)
            return expected <= known

        wait_until(
            is_ready,
            deadline_seconds,
            f"it to serve clients and know of brokers {sorted(expected)}",
            seen=lambda: sorted(known),
            ignoring=(KafkaException,),
        )

    def _wait_leaders_at(self, broker: KafkaBroker, topic: str, partitions: int, deadline_seconds: float) -> None:
        leaders: dict[int, int] = {}

        def all_known() -> bool:
            leaders.clear()
            leaders.update(self._live_leaders(self._metadata_from(broker, topic), topic))
            return len(leaders) == partitions

        wait_until(
            all_known,
            deadline_seconds,
            f"broker {broker.node_id} to know the leaders of {partitions} partitions of {topic}",
            seen=lambda: leaders,
            ignoring=(KafkaException,),
        )

    def _live_leaders(self, metadata: ClusterMetadata, topic: str) -> dict[int, int]:
        # Kafka itself names a killed broker as the leader until its session ends; we know better.
        running = {broker.node_id for broker in self.brokers if broker.is_running}
        live = running & metadata.brokers.keys()
        return {p.id: p.leader for p in metadata.topics[topic].partitions.values() if not p.error and p.leader in live}

    def _wait_leaders_serve(self, deadline_seconds: float) -> None:
        """Wait until each partition that has a live leader is served by it, internal topics included.

        A broker that came back answers before it has taken up all of its partitions: for a moment a request for one
        of the others ends with NOT_LEADER_OR_FOLLOWER.
        """

        def all_answer() -> bool:
            metadata = self.admin.list_topics(timeout=REQUEST_DEADLINE_SECONDS)
            led = [TopicPartition(t, p, OFFSET_END) for t in metadata.topics for p in self._live_leaders(metadata, t)]
            self._ask_offsets(led)
            return True

        wait_until(all_answer, deadline_seconds, "the leaders of all partitions to answer", ignoring=(KafkaException,))

    def _list_offsets(self, topic: str, which: int) -> dict[int, int]:
        wanted = [TopicPartition(topic, partition, which) for partition in self.partitions(topic)]
        # Leadership moves while brokers come and go; the partitions do exist.
        found = wait_until(
            lambda: self._ask_offsets(wanted),
            REQUEST_DEADLINE_SECONDS,
            f"the offsets of {topic}",
            ignoring=(KafkaException,),
        )
        return {partition.partition: partition.offset for partition in found}

    def _ask_offsets(self, wanted: list[TopicPartition]) -> list[TopicPartition]:
        """Where each partition ends (OFFSET_END) or begins, as its leader says. Raises KafkaException."""
        if not wanted:
            return []
        with closing(self._observer("kafkasrcd-tests-observer")) as consumer:
            # Takes both constants for times, and asks each leader once for all of its partitions.
            found = consumer.offsets_for_times(wanted, timeout=REQUEST_DEADLINE_SECONDS)
        for partition in found:
            if partition.error is not None:
                raise KafkaException(partition.error)
        return found

    def _observer(self, group: str) -> Consumer:
        """A consumer that asks about the group's offsets and never joins it."""
        # read_committed, the default, would make it wait for open transactions to end.
        return Consumer({**self.client_settings(), "group.id": group, "isolation.level": "read_uncommitted"})

    def _metadata_from(self, broker: KafkaBroker, topic: str | None = None) -> ClusterMetadata:
        """What this broker believes: a new client knows no other to ask. Raises KafkaException."""
        with AdminClient({"bootstrap.servers": broker.address, **QUIET_CLIENT}) as client:
            if topic is None:
                return client.list_topics(timeout=2)
            return client.list_topics(topic, timeout=2)

    def _open_producer(self) -> Producer:
        """A new producer for `produce` and `fill`, which keep it.

        Idempotent, so that a killed broker leads neither to loss nor to duplicates; that takes half a second or a
        whole one to set up, once.
        """
        settings = {"enable.idempotence": True, "linger.ms": 5, "queue.buffering.max.messages": 200_000}
        self._producer = Producer({**self.client_settings(), **settings})
        return self._producer

    def _flush(self, producer: Producer, topic: str, failures: Sequence[KafkaError]) -> None:
        waiting = producer.flush(PRODUCE_DEADLINE_SECONDS)
        if waiting == 0 and not failures:
            return
        # What is still queued must not arrive during a later test, and a fatal error is for ever.
        producer.purge()
        self._producer = None
        if failures:
            raise KafkaException(failures[0])
        raise AssertionError(f"{waiting} records for {topic} not acknowledged within {PRODUCE_DEADLINE_SECONDS} s")


class _TopicAdmin(Protocol):
    """AdminClient as far as it is used here; its own annotations leave out what the futures hold."""

    def create_topics(self, new_topics: list[NewTopic], *, request_timeout: float) -> dict[str, Future[None]]: ...
    def create_partitions(
        self, new_partitions: list[NewPartitions], *, request_timeout: float
    ) -> dict[str, Future[None]]: ...
    def incremental_alter_configs(
        self, resources: list[ConfigResource], *, request_timeout: float
    ) -> dict[ConfigResource, Future[None]]: ...
    def delete_topics(self, topics: list[str], *, request_timeout: float) -> dict[str, Future[None]]: ...
    def delete_records(
        self, topic_partition_offsets: list[TopicPartition], *, request_timeout: float
    ) -> dict[TopicPartition, Future[object]]: ...


def _create(client: _TopicAdmin, topic: NewTopic) -> None:
    for created in client.create_topics([topic], request_timeout=REQUEST_DEADLINE_SECONDS).values():
        created.result(REQUEST_DEADLINE_SECONDS)


def _add_partitions(client: _TopicAdmin, more: NewPartitions) -> None:
    for added in client.create_partitions([more], request_timeout=REQUEST_DEADLINE_SECONDS).values():
        added.result(REQUEST_DEADLINE_SECONDS)


def _configure(client: _TopicAdmin, resource: ConfigResource) -> None:
    for changed in client.incremental_alter_configs([resource], request_timeout=REQUEST_DEADLINE_SECONDS).values():
        changed.result(REQUEST_DEADLINE_SECONDS)


def _delete(client: _TopicAdmin, topic: str) -> None:
    for deleted in client.delete_topics([topic], request_timeout=REQUEST_DEADLINE_SECONDS).values():
        deleted.result(REQUEST_DEADLINE_SECONDS)


def _delete_records(client: _TopicAdmin, before: list[TopicPartition]) -> None:
    for deleted in client.delete_records(before, request_timeout=REQUEST_DEADLINE_SECONDS).values():
        deleted.result(REQUEST_DEADLINE_SECONDS)


def _produce(
    producer: Producer, topic: str, record: Record, on_delivery: Callable[[KafkaError | None, Message], None]
) -> None:
    """Hand a record to the producer, waiting for room in its queue."""
    deadline = time.monotonic() + PRODUCE_DEADLINE_SECONDS
    partition, key, value, headers, timestamp_ms = record
    while True:
        try:
            producer.produce(
                topic, value, key, partition, on_delivery=on_delivery, timestamp=timestamp_ms, headers=headers or []
            )
        except BufferError:
            if time.monotonic() > deadline:
                raise
            producer.poll(0.1)
        else:
            producer.poll(0)
            return
