"""The broker's limits beside the configuration's: how large a message may be, and how long a session."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any

from kafkasrcd.daemon.exit_codes import ExitCode
from kafkasrcd.daemon.finding import Finding, Outcome
from kafkasrcd.settings import GroupProtocol, Settings
from kafkasrcd.workers.deadline import Deadline
from kafkasrcd.workers.kafka_settings import session_timeout_ms

if TYPE_CHECKING:
    from confluent_kafka.admin import ConfigEntry  # type: ignore[attr-defined]

# A frame takes at most half of a ring; this is what the frame of one record may need besides the record.
_FRAME_BYTES = 256
# Rings come in whole pages, up to a size: see ``supervisor.ring_bytes``.
_PAGE_BYTES = 4_096
_LARGEST_RING_BYTES = 1_073_741_824

# What is left of a deadline may be next to nothing; asked at all, a broker gets this long.
_LEAST_SECONDS = 1.0

_MESSAGE_BYTES = "max.message.bytes"
_KIP_848_SESSION = "group.consumer.session.timeout.ms"


def check_limits(
    admin: Any, settings: Settings, topics: Sequence[str], broker_id: int, deadline: Deadline
) -> Iterator[Finding]:
    """Compare the settings with those of ``topics`` and of a broker; that this user may not see them is a note.

    ``admin`` is an AdminClient, whose answers are declared as Any.
    """
    from confluent_kafka import KafkaException

    # The names are documented, and not declared as exported.
    from confluent_kafka.admin import ConfigResource, ResourceType  # type: ignore[attr-defined]

    broker = ConfigResource(ResourceType.BROKER, str(broker_id))
    resources = [*(ConfigResource(ResourceType.TOPIC, topic) for topic in topics), broker]
    seconds = max(_LEAST_SECONDS, deadline.remaining)
    answers: Mapping[ConfigResource, Future[Mapping[str, ConfigEntry]]]
    answers = admin.describe_configs(resources, request_timeout=seconds)
    values: dict[str, dict[str, str]] = {}
    for resource, answer in answers.items():
        is_broker = resource == broker
        try:
            entries = answer.result(timeout=seconds)
        except (KafkaException, FutureTimeout) as error:
            what = "the broker's limits" if is_broker else f"the message size of topic {resource.name!r}"
            reason = error.args[0].str() if isinstance(error, KafkaException) else "no answer in time"
            yield Finding(Outcome.NOTE, f"{what} cannot be looked at: {reason}")
            continue
        texts = {name: entry.value for name, entry in entries.items() if entry.value is not None}
        values["" if is_broker else resource.name] = texts
    sizes = {topic: int(values[topic][_MESSAGE_BYTES]) for topic in topics if _MESSAGE_BYTES in values.get(topic, {})}
    yield from _message_sizes(settings, sizes)
    if "" in values:
        yield from _session_timeout(settings, values[""])


def silent_logger() -> logging.Logger:
    """For clients whose lines would stand between a command's own; what they say comes as errors as well."""
    logger = logging.Logger("kafkasrcd.broker_check")
    logger.addHandler(logging.NullHandler())
    return logger


def counted(number: int, noun: str) -> str:
    """``1 topic``, ``2 topics``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _message_sizes(settings: Settings, sizes: Mapping[str, int]) -> Iterator[Finding]:
    """A record that fits no ring is a failure of its own; better to hear of it before there is one."""
    largest = settings.supervisor.ring_bytes // 2 - _FRAME_BYTES
    too_large = {topic: size for topic, size in sizes.items() if size > largest}
    for topic, size in too_large.items():
        needed = -(-2 * (size + _FRAME_BYTES) // _PAGE_BYTES) * _PAGE_BYTES
        cure = f"set supervisor.ring_bytes to {needed} or more"
        if needed > _LARGEST_RING_BYTES:
            cure = f"no ring is large enough: lower the topic's {_MESSAGE_BYTES}"
        text = f"topic {topic!r} takes messages of {size} bytes, and a ring records of up to {largest}"
        yield Finding(Outcome.BAD, text, cure, ExitCode.CONFIG)
    if sizes and not too_large:
        text = f"messages of up to {max(sizes.values())} bytes fit the ring, which takes records of {largest}"
        yield Finding(Outcome.GOOD, text)


def _session_timeout(settings: Settings, broker: Mapping[str, str]) -> Iterator[Finding]:
    if settings.supervisor.group_protocol is GroupProtocol.CONSUMER:
        yield _kip_848(settings, broker.get(_KIP_848_SESSION))
        return
    session_ms = session_timeout_ms(settings)
    least, most = broker.get("group.min.session.timeout.ms"), broker.get("group.max.session.timeout.ms")
    if least is None or most is None:
        return
    if int(least) <= session_ms <= int(most):
        yield Finding(Outcome.GOOD, f"a session timeout of {session_ms} ms is allowed")
    else:
        cure = f"set supervisor.session_timeout_ms from {least} to {most}"
        yield Finding(Outcome.BAD, f"a session timeout of {session_ms} ms is not allowed", cure, ExitCode.CONFIG)


def _kip_848(settings: Settings, session: str | None) -> Finding:
    if session is None:
        text = "the broker does not know group_protocol 'consumer' (KIP-848, Kafka 4.0)"
        return Finding(Outcome.BAD, text, "set supervisor.group_protocol to 'classic'", ExitCode.CONFIG)
    lease = settings.supervisor.lease_seconds
    if lease * 1_000 < int(session):
        return Finding(Outcome.GOOD, f"a lease of {lease:g} s is below the broker's session timeout, {session} ms")
    text = f"a lease of {lease:g} s is not below the broker's session timeout, {_KIP_848_SESSION} = {session}"
    return Finding(Outcome.BAD, text, "lower supervisor.lease_seconds", ExitCode.CONFIG)
