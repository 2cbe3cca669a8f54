"""What the demo asks of Kafka itself: is it there, the topic, how far the group has got."""

from concurrent.futures import Future
from typing import Protocol

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from kafkasrcd.daemon.broker_limits import silent_logger
from kafkasrcd.errors import GroupError
from kafkasrcd.workers.deadline import Deadline

PARTITIONS = 4
_ANSWER_SECONDS = 10.0


class GroupOffsets(msgspec.Struct, frozen=True):
    """One partition: where its records start and end, and what the group has committed, None where nothing."""

    start: int
    end: int
    committed: int | None

    @property
    def backlog(self) -> int:
        """Records that a member of the group starting now would be given."""
        return self.end - (self.start if self.committed is None else max(self.start, self.committed))


def prepare_topic(brokers: str, topic: str) -> None:
    """Create the topic where it is missing; blocks for about 20 s at most. Raises GroupError where that fails."""
    admin = AdminClient({"bootstrap.servers": brokers}, logger=silent_logger())
    try:
        metadata = admin.list_topics(timeout=_ANSWER_SECONDS)
        if topic not in metadata.topics:
            _create(admin, NewTopic(topic, PARTITIONS))
        deadline = Deadline(_ANSWER_SECONDS)
        while not deadline.passed:  # a broker learns of a new topic's leaders some moments later
            answer = admin.list_topics(topic, timeout=_ANSWER_SECONDS).topics[topic]
            if answer.error is None and answer.partitions and all(p.leader >= 0 for p in answer.partitions.values()):
                return
    except KafkaException as error:
        raise _unusable(brokers, error) from error
    raise GroupError(f"the topic {topic} at {brokers} has partitions without a leader")


class _TopicAdmin(Protocol):
    """AdminClient as far as it is used here; its own annotations leave out what the futures hold."""

    def create_topics(self, new_topics: list[NewTopic]) -> dict[str, Future[None]]: ...


def _create(admin: _TopicAdmin, topic: NewTopic) -> None:
    for created in admin.create_topics([topic]).values():
        created.result(_ANSWER_SECONDS)


def group_offsets(brokers: str, group: str, topic: str) -> dict[int, GroupOffsets]:
    """By partition. Joins nothing. Blocks; raises GroupError where the broker does not answer."""
    consumer = Consumer({"bootstrap.servers": brokers, "group.id": group}, logger=silent_logger())
    try:
        numbers = consumer.list_topics(topic, timeout=_ANSWER_SECONDS).topics[topic].partitions
        wanted = [TopicPartition(topic, number) for number in sorted(numbers)]
        offsets: dict[int, GroupOffsets] = {}
        for answer in consumer.committed(wanted, timeout=_ANSWER_SECONDS):
            partition = TopicPartition(topic, answer.partition)
            start, end = consumer.get_watermark_offsets(partition, timeout=_ANSWER_SECONDS)
            offsets[answer.partition] = GroupOffsets(start, end, answer.offset if answer.offset >= 0 else None)
        return offsets
    except KafkaException as error:
        raise _unusable(brokers, error) from error
    finally:
        consumer.close()


def _unusable(brokers: str, error: KafkaException) -> GroupError:
    reason: KafkaError = error.args[0]
    if reason.code() in (KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._ALL_BROKERS_DOWN):
        return GroupError(f"no broker answers at {brokers} within {_ANSWER_SECONDS:g} s: check --brokers")
    return GroupError(f"the broker at {brokers} refuses: {reason.str()}")
