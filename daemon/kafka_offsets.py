"""Questions and commits about a group's offsets, in our types. Called on the membership's thread; each may block."""

from collections.abc import Mapping, Sequence
from typing import Final

from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, Consumer, KafkaException
from confluent_kafka import TopicPartition as KafkaTopicPartition

from kafkasrcd.errors import GroupError
from kafkasrcd.storage.offset_store import TopicPartition

_ANSWER_SECONDS: Final = 10.0
"""For committed offsets and for the ends of partitions: many times what a slow broker takes."""


def committed_offsets(consumer: Consumer, names: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
    """What the group has committed; a partition without is left out. Raises GroupError where that is not known now."""
    try:
        return _valid(consumer.committed([_kafka(name) for name in names], timeout=_ANSWER_SECONDS))
    except KafkaException as exception:
        raise GroupError(f"the committed offsets cannot be read: {exception.args[0].str()}") from exception


def end_offsets(consumer: Consumer, names: Sequence[TopicPartition], *, first: bool) -> dict[TopicPartition, int]:
    """The ``first`` offset that is there, or the next to be given out, of every partition: one request for all.

    Raises GroupError where the broker does not say.
    """
    wanted = [_kafka(name, OFFSET_BEGINNING if first else OFFSET_END) for name in names]
    try:
        found = _valid(consumer.offsets_for_times(wanted, timeout=_ANSWER_SECONDS))
    except KafkaException as exception:
        raise GroupError(f"the partitions' ends cannot be read: {exception.args[0].str()}") from exception
    if len(found) < len(names):
        raise GroupError(f"the broker does not say where {min(set(names) - found.keys())} starts")
    return found


def commit(consumer: Consumer, offsets: Mapping[TopicPartition, tuple[int, int]]) -> dict[TopicPartition, str]:
    """Commit ``{partition: (assignment_epoch, next_offset)}``; the refusals, by partition.

    Blocks a millisecond with a broker, 8 s without (librdkafka's own limit). Raises GroupError where nothing was
    accepted. The epoch goes along as the commit's metadata, for whoever looks at the group with Kafka's tools.
    """
    wanted = [
        KafkaTopicPartition(name.topic, name.partition, next_offset, metadata=f"kafkasrcd epoch {epoch}")
        for name, (epoch, next_offset) in offsets.items()
    ]
    try:
        answered = consumer.commit(offsets=wanted, asynchronous=False)
    except KafkaException as exception:
        raise GroupError(f"the commit was not accepted: {exception.args[0].str()}") from exception
    return {_name(partition): partition.error.str() for partition in answered or () if partition.error is not None}


def broker_answers(consumer: Consumer, seconds: float) -> bool:
    """Whether some broker answers within ``seconds``."""
    try:
        consumer.list_topics(topic="", timeout=seconds)  # no topic: the cheapest question there is
    except KafkaException:
        return False
    return True


def _kafka(name: TopicPartition, offset: int | None = None) -> KafkaTopicPartition:
    if offset is None:
        return KafkaTopicPartition(name.topic, name.partition)
    return KafkaTopicPartition(name.topic, name.partition, offset)


def _name(partition: KafkaTopicPartition) -> TopicPartition:
    return TopicPartition(partition.topic, partition.partition)


def _valid(answered: Sequence[KafkaTopicPartition]) -> dict[TopicPartition, int]:
    """The offsets that are there; raises GroupError for a partition that came with an error."""
    for partition in answered:
        if partition.error is not None:
            raise GroupError(f"{_name(partition)}: {partition.error.str()}")
    return {_name(partition): partition.offset for partition in answered if partition.offset >= 0}
