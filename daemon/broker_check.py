"""Asks the broker whether the configuration can work there: before a start, or for ``kafkasrcd config check``.

Nothing is changed: no group is joined, no topic created.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any

import msgspec

from kafkasrcd.daemon.broker_limits import check_limits, counted, silent_logger
from kafkasrcd.daemon.exit_codes import ExitCode
from kafkasrcd.daemon.finding import Finding, Outcome
from kafkasrcd.daemon.setting_fields import did_you_mean
from kafkasrcd.daemon.topic_patterns import is_pattern, subscribes
from kafkasrcd.settings import GroupProtocol, Settings
from kafkasrcd.workers.deadline import Deadline
from kafkasrcd.workers.kafka_settings import worker_config

if TYPE_CHECKING:
    from confluent_kafka import Consumer, KafkaError

# One attempt at metadata; between attempts the reasons for the failure are looked at. A broker answers in
# milliseconds, over a slow link in hundreds.
_ATTEMPT_SECONDS = 1.0

_MOST_NAMED = 5


class BrokerAnswer(msgspec.Struct, frozen=True):
    """``findings`` in the order they were made; ``partitions`` of each topic that will be consumed."""

    findings: tuple[Finding, ...]
    partitions: dict[str, int]


def check_broker(settings: Settings, timeout_seconds: float) -> BrokerAnswer:
    """Check that the broker can be reached, the topics exist, and their messages and the group's limits fit.

    Blocks for at most about ``timeout_seconds``. Never raises for what the broker says: that is a Finding.
    """
    from confluent_kafka.admin import AdminClient

    deadline = Deadline(timeout_seconds)
    errors: list[KafkaError] = []
    consumer = _consumer(settings, errors)
    try:
        cluster = _reach(consumer, errors, deadline)
        if cluster is None:
            return BrokerAnswer((_unreachable(settings, errors, timeout_seconds),), {})
        findings = [Finding(Outcome.GOOD, f"broker {settings.brokers} answers")]
        found: dict[str, int] = {}
        for entry in settings.topics:
            findings.append(_topic(consumer, settings, entry, cluster.topics, deadline))
            found |= {
                topic: count
                for topic, count in cluster.topics.items()
                if subscribes(entry, topic, settings.supervisor.group_protocol)
            }
    finally:
        consumer.close()
    # To librdkafka the admin client is a producer: silent, it does not complain about a consumer's settings.
    with AdminClient(worker_config(settings), logger=silent_logger()) as admin:
        findings += _committed(admin, settings, found, deadline)
        findings += check_limits(admin, settings, sorted(found), cluster.broker_id, deadline)
    return BrokerAnswer(tuple(findings), found)


class _Cluster(msgspec.Struct, frozen=True):
    """``topics``: the number of partitions of each. ``broker_id``: one that is there."""

    topics: dict[str, int]
    broker_id: int


def _consumer(settings: Settings, errors: list["KafkaError"]) -> "Consumer":
    """A worker's client, which finds what a worker will find, and creates no topic by asking for it."""
    from confluent_kafka import Consumer

    config = worker_config(settings) | {"allow.auto.create.topics": False}
    return Consumer({**config, "error_cb": errors.append}, logger=silent_logger())


def _reach(consumer: "Consumer", errors: "list[KafkaError]", deadline: Deadline) -> _Cluster | None:
    """What there is; None where no broker answered in time or would let us in."""
    from confluent_kafka import KafkaError, KafkaException

    while not deadline.passed:
        try:
            metadata = consumer.list_topics(timeout=min(_ATTEMPT_SECONDS, deadline.remaining))
        except KafkaException:
            consumer.poll(0)  # has the error callback called, with what went wrong in each connection
            # Neither gets better by waiting.
            if any(error.code() in {KafkaError._AUTHENTICATION, KafkaError._SSL} for error in errors):
                return None
        else:
            topics = {name: len(topic.partitions) for name, topic in metadata.topics.items() if topic.error is None}
            return _Cluster(topics, min(metadata.brokers, default=0))
    return None


def _unreachable(settings: Settings, errors: "Sequence[KafkaError]", timeout_seconds: float) -> Finding:
    from confluent_kafka import KafkaError

    # That all brokers are down only follows from what happened to each.
    reasons = [error for error in errors if error.code() != KafkaError._ALL_BROKERS_DOWN]
    if not reasons:
        text = f"broker {settings.brokers} does not answer within {timeout_seconds:g} s"
        return Finding(Outcome.BAD, text, "check brokers, the network and firewalls", ExitCode.UNAVAILABLE)
    last = reasons[-1]
    reason = re.sub(r" \(after \d+ms in state .*\)$", "", last.str())
    cures = {
        KafkaError._AUTHENTICATION: "check sasl.mechanism, sasl.username and sasl.password in extra_config",
        KafkaError._SSL: "check security.protocol and the ssl.… settings in extra_config",
        KafkaError._RESOLVE: "check the host's name in brokers",
    }
    cure = cures.get(last.code(), "check that a broker runs there, brokers, and security.protocol in extra_config")
    return Finding(Outcome.BAD, f"broker {settings.brokers} cannot be used: {reason}", cure, ExitCode.UNAVAILABLE)


def _topic(consumer: "Consumer", settings: Settings, entry: str, topics: dict[str, int], deadline: Deadline) -> Finding:
    if is_pattern(entry):
        return _pattern(settings, entry, topics)
    if entry in topics:
        return Finding(Outcome.GOOD, f"topic {entry!r} exists, with {counted(topics[entry], 'partition')}")
    # A broker leaves out of its list what may not be seen; asked by name, it says so.
    if _is_forbidden(consumer, entry, deadline):
        cure = "allow this user to DESCRIBE and READ it"
        return Finding(Outcome.BAD, f"topic {entry!r} may not be read by this user", cure, ExitCode.CONFIG)
    cure = f"create it, or correct topics{did_you_mean(entry, topics)}"
    return Finding(Outcome.BAD, f"topic {entry!r} does not exist", cure, ExitCode.CONFIG)


def _is_forbidden(consumer: "Consumer", topic: str, deadline: Deadline) -> bool:
    from confluent_kafka import KafkaError, KafkaException

    try:
        answer = consumer.list_topics(topic, timeout=max(_ATTEMPT_SECONDS, deadline.remaining)).topics.get(topic)
    except KafkaException:
        return False
    return (
        answer is not None and answer.error is not None and answer.error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED
    )


def _pattern(settings: Settings, entry: str, topics: dict[str, int]) -> Finding:
    protocol = settings.supervisor.group_protocol
    matching = sorted(topic for topic in topics if subscribes(entry, topic, protocol))
    if matching:
        named = ", ".join(matching[:_MOST_NAMED]) + (", …" if len(matching) > _MOST_NAMED else "")
        return Finding(Outcome.GOOD, f"expression {entry!r} matches {counted(len(matching), 'topic')}: {named}")
    cure = "it will be consumed once there is one"
    if any(subscribes(entry, topic, GroupProtocol.CLASSIC) for topic in topics):
        cure = f"with group_protocol 'consumer' it must match the whole name, as in {entry.rstrip('$') + '.*'!r}"
    return Finding(Outcome.NOTE, f"expression {entry!r} matches no topic", cure)


def _committed(admin: Any, settings: Settings, found: dict[str, int], deadline: Deadline) -> Iterator[Finding]:
    """Whether this user may use the group, and where it would begin."""
    from confluent_kafka import ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicPartition

    partitions = [TopicPartition(topic, number) for topic, count in found.items() for number in range(count)]
    if not partitions:
        return
    group = settings.group_id
    # A consumer's committed() would ask for the coordinator until its time is up, and not say that it may not.
    wanted = ConsumerGroupTopicPartitions(group, partitions)
    seconds = max(_ATTEMPT_SECONDS, deadline.remaining)
    future: Future[ConsumerGroupTopicPartitions]
    (future,) = admin.list_consumer_group_offsets([wanted], request_timeout=seconds).values()
    try:
        answer = future.result(timeout=seconds).topic_partitions or []
    except FutureTimeout:
        yield Finding(Outcome.NOTE, f"group {group!r} cannot be looked at: no answer in time")
        return
    except KafkaException as error:
        reason: KafkaError = error.args[0]
        if reason.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
            cure = "allow this user to READ the group, or correct group_id"
            yield Finding(Outcome.BAD, f"group {group!r} may not be used by this user", cure, ExitCode.CONFIG)
        else:
            yield Finding(Outcome.NOTE, f"group {group!r} cannot be looked at: {reason.str()}")
        return
    committed = sum(partition.offset >= 0 for partition in answer)
    text = f"group {group!r} has committed offsets for {committed} of {counted(len(answer), 'partition')}"
    policy = settings.auto_offset_reset.value
    rest = "" if committed == len(answer) else f"; the rest start by auto_offset_reset, {policy!r}"
    yield Finding(Outcome.GOOD, text + rest)
