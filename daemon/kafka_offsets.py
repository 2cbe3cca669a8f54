"""Questions and commits about a group's offsets, in our types. Each may block."""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from confluent_kafka import OFFSET_END, Consumer, KafkaException
from confluent_kafka import TopicPartition as KafkaTopicPartition

from kafkasrcd.daemon.reached import Reached, layers_of, note_of
from kafkasrcd.errors import GroupError
from kafkasrcd.storage.offset_store import Layer, TopicPartition

_ANSWER_SECONDS: Final = 10.0
"""For committed offsets and for the ends of partitions: many times what a slow broker takes."""


class Committed(msgspec.Struct, frozen=True):
    """A group's record of one partition: everything before ``next_offset`` is done, and what ``layers`` say."""

    next_offset: int
    layers: tuple[Layer, ...]


def committed_offsets(consumer: Consumer, names: Sequence[TopicPartition]) -> dict[TopicPartition, Committed]:
    """What the group has committed; a partition without is left out. Raises GroupError where that is not known now."""
    try:
        answered = consumer.committed([_kafka(name) for name in names], timeout=_ANSWER_SECONDS)
    except KafkaException as exception:
        raise GroupError(f"the committed offsets cannot be read: {exception.args[0].str()}") from exception
    notes = {_name(partition): partition.metadata or "" for partition in answered}
    return {name: Committed(offset, layers_of(notes[name], offset)) for name, offset in _valid(answered).items()}


def offsets_at(consumer: Consumer, names: Sequence[TopicPartition], at_ms: int) -> dict[TopicPartition, int]:
    """The first offset whose record is not older than ``at_ms`` (milliseconds since 1970, or librdkafka's
    OFFSET_BEGINNING or OFFSET_END), or the next to be given out where all are: one request for all.

    Raises GroupError where the broker does not say.
    """
    try:
        found = _valid(consumer.offsets_for_times([_kafka(name, at_ms) for name in names], timeout=_ANSWER_SECONDS))
    except KafkaException as exception:
        raise GroupError(f"the partitions' offsets cannot be read: {exception.args[0].str()}") from exception
    beyond_end = [name for name in names if name not in found]
    if beyond_end and at_ms != OFFSET_END:
        found |= offsets_at(consumer, beyond_end, OFFSET_END)
    elif beyond_end:
        raise GroupError(f"the broker does not say where {beyond_end[0]} starts")
    return found


def commit(consumer: Consumer, offsets: Mapping[TopicPartition, Reached]) -> dict[TopicPartition, str]:
    """Commit how far each partition has got; the refusals, by partition.

    Blocks a millisecond with a broker, 8 s without (librdkafka's own limit). Raises GroupError where nothing was
    accepted.
    """
    wanted = [
        KafkaTopicPartition(name.topic, name.partition, reached.next_offset, metadata=note_of(reached))
        for name, reached in offsets.items()
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
