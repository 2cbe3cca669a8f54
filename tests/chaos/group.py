"""The consumer group as the broker sees it: a daemon that runs and is no member does nothing, and does not know."""

from concurrent.futures import Future
from typing import NamedTuple, Protocol

from confluent_kafka import TopicPartition

from tests.kafka_cluster import REQUEST_DEADLINE_SECONDS, KafkaCluster


class GroupView(NamedTuple):
    """`state` is Kafka's word; `assigned` has each partition as often as a member has it."""

    state: str
    members: int
    assigned: list[int]


class _State(Protocol):
    name: str


class _Assignment(Protocol):
    topic_partitions: list[TopicPartition]


class _Member(Protocol):
    assignment: _Assignment


class _Description(Protocol):
    state: _State
    members: list[_Member]


class _GroupAdmin(Protocol):
    """AdminClient as far as it is used here; its own annotations leave out what the futures hold."""

    def describe_consumer_groups(
        self, group_ids: list[str], *, request_timeout: float
    ) -> dict[str, Future[_Description]]: ...


def view_group(cluster: KafkaCluster, group: str) -> GroupView:
    """Blocks for a request. Raises KafkaException where the coordinator does not answer."""
    return _view(cluster.admin, group)


def _view(admin: _GroupAdmin, group: str) -> GroupView:
    described = admin.describe_consumer_groups([group], request_timeout=REQUEST_DEADLINE_SECONDS)[group]
    found = described.result(REQUEST_DEADLINE_SECONDS)
    assigned = [partition.partition for member in found.members for partition in member.assignment.topic_partitions]
    return GroupView(found.state.name, len(found.members), sorted(assigned))
