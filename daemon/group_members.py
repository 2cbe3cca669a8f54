"""The group as its coordinator describes it: who is a member, from where, and of which partitions."""

from typing import Final

import msgspec
from confluent_kafka import ConsumerGroupState, KafkaException
from confluent_kafka.admin import AdminClient

from kafkasrcd.daemon.broker_limits import silent_logger
from kafkasrcd.settings import Settings
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.workers.kafka_settings import worker_config

_ASK_SECONDS: Final = 10.0


class Member(msgspec.Struct, frozen=True):
    """``host`` is its address, as the broker sees it."""

    member_id: str
    host: str
    partitions: frozenset[TopicPartition]


class Group(msgspec.Struct, frozen=True):
    """While it is not ``stable``, in a rebalance, a member may be shown without its partitions."""

    stable: bool
    members: tuple[Member, ...]

    def gives(self, member_id: str, name: TopicPartition) -> bool | None:
        """Whether the member has this partition; None where that is not known before the group is stable."""
        if any(member.member_id == member_id and name in member.partitions for member in self.members):
            return True
        return False if self.stable else None


def describe_group(settings: Settings) -> Group | None:
    """Blocks up to ``_ASK_SECONDS``. None where the broker does not say: no such group, no right to see it, away."""
    admin = AdminClient(worker_config(settings), logger=silent_logger())
    try:
        future = admin.describe_consumer_groups([settings.group_id], request_timeout=_ASK_SECONDS)[settings.group_id]
        group = future.result()
    except KafkaException:
        return None
    members = [
        Member(
            each.member_id,
            each.host,
            frozenset(TopicPartition(of.topic, of.partition) for of in each.assignment.topic_partitions),
        )
        for each in group.members or ()
    ]
    return Group(group.state is ConsumerGroupState.STABLE, tuple(members))
