"""The librdkafka configuration of the group's member and of the workers.

Two clients with different jobs. The *member*, one in the supervisor, joins the group and commits; its partitions are
paused as soon as they are assigned, so it never fetches. A *worker*, one for each partition, is told with ``assign()``
what to read; it neither joins a group nor commits. What is set here and is not protected is tuning: ``extra_config``
wins there.
"""

from collections.abc import Mapping

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.settings import AssignmentStrategy, GroupProtocol, Settings
from kafkasrcd.workers.redaction import HIDDEN, hide_url_passwords, is_secret

KafkaConfig = dict[str, str | int | float | bool]
"""As confluent-kafka's clients take it; there are no floats in it."""

DEFAULT_SESSION_TIMEOUT_MS = 45_000
"""librdkafka's default, and the broker's for KIP-848 (``group.consumer.session.timeout.ms``)."""

DEFAULT_HEARTBEAT_INTERVAL_MS = 3_000
"""librdkafka's default; a shorter session timeout shortens it, see ``heartbeat_interval_ms``."""

QUIET: KafkaConfig = {"log_level": 2}
"""For the daemon's clients, below whatever ``extra_config`` says: librdkafka's own lines on standard error end at
"critical". What matters comes as an error to the client, and would stand there a second time, in a form of its own,
twenty times a second while a broker is away."""

REVOCATION_SLACK_MS = 40_000
"""What a revocation may take besides the drain: a commit while the broker is away blocks 8 s, one between revoke and
assign up to 5 s, and the recorder waits for the store's lock. The member polls again only after all of it."""

_COMMITS = "the supervisor alone commits, and only what has been processed; see commit_strategy"
_CALLBACK = "a function cannot come from a configuration"
_MOCK = "every process would start a cluster of its own; `kafkasrcd demo` runs one for all"
_OFFSET_FILE = "offsets are kept by the broker and the offset store"

PROTECTED: Mapping[str, str] = {
    "bootstrap.servers": "use brokers",
    "metadata.broker.list": "use brokers",
    "group.id": "use group_id",
    "group.protocol": "use supervisor.group_protocol",
    "group.protocol.type": "kafkasrcd is a consumer",
    "group.instance.id": "use supervisor.group_instance_id",
    "partition.assignment.strategy": "use supervisor.partition_assignment_strategy",
    "session.timeout.ms": "use supervisor.session_timeout_ms",
    "heartbeat.interval.ms": "use supervisor.heartbeat_interval_ms",
    "auto.offset.reset": "use auto_offset_reset",
    "enable.auto.commit": _COMMITS,
    "auto.commit.enable": _COMMITS,
    "auto.commit.interval.ms": "use commit_interval_secs",
    "enable.auto.offset.store": _COMMITS,
    "offset.store.method": _OFFSET_FILE,
    "offset.store.path": _OFFSET_FILE,
    "offset.store.sync.interval.ms": _OFFSET_FILE,
    "enable.partition.eof": "workers need it to publish a batch when nothing more is waiting",
    "statistics.interval.ms": "nothing reads them; `kafkasrcd status` has the figures",
    "log.queue": "nothing would read the queue",
    "enabled_events": "nothing would read the events",
    "internal.termination.signal": "kafkasrcd handles signals itself",
    "opaque": _CALLBACK,
    "logger": _CALLBACK,
    "on_commit": _CALLBACK,
    "interceptors": _CALLBACK,
    "ssl_engine_callback_data": _CALLBACK,
    "default_topic_conf": "give the topic's setting by its own name",
    "default.topic.config": "give the topic's setting by its own name",
    "max.poll.records": "librdkafka has no use for it; handler.batch_max_messages limits a batch",
    "share.acknowledgement.mode": "kafkasrcd is not a share group",
    "builtin.features": "it lists what the library can do and sets nothing",
}
"""librdkafka's names that ``extra_config`` may not set, and why, or what to use in their place."""


def protected_reason(name: str) -> str | None:
    """Why ``extra_config`` may not set ``name``; None where it may."""
    if name.endswith("_cb"):
        return _CALLBACK
    if name.startswith("test.mock."):
        return _MOCK
    return PROTECTED.get(name)


# Only the group's member has a use for these; a worker joins no group.
_MEMBER_ONLY = frozenset({"group.remote.assignor", "max.poll.interval.ms", "topic.blacklist"})


def member_config(settings: Settings) -> KafkaConfig:
    """The configuration of the group's member.

    Raises ConfigurationError where ``extra_config`` holds a protected key.
    """
    supervisor = settings.supervisor
    config = _common(settings)
    config |= {
        "group.protocol": supervisor.group_protocol.value,
        "max.poll.interval.ms": max_poll_interval_ms(settings),
        # Never used, since the member does not read; but with "error" it would report every partition that has no
        # committed offset yet as failed (_AUTO_OFFSET_RESET).
        "auto.offset.reset": "latest",
        "enable.partition.eof": False,
    }
    if supervisor.group_instance_id:
        config["group.instance.id"] = supervisor.group_instance_id
    # librdkafka refuses these three with KIP-848, where the broker decides them.
    if supervisor.group_protocol is GroupProtocol.CLASSIC:
        strategy = supervisor.partition_assignment_strategy or AssignmentStrategy.COOPERATIVE_STICKY
        config |= {
            "partition.assignment.strategy": strategy.value,
            "session.timeout.ms": session_timeout_ms(settings),
            "heartbeat.interval.ms": heartbeat_interval_ms(settings),
        }
    return config | _allowed(settings)


def worker_config(settings: Settings) -> KafkaConfig:
    """The configuration of a worker, which reads one partition that it is given by ``assign()``.

    Raises ConfigurationError where ``extra_config`` holds a protected key.
    """
    config = _common(settings)
    config |= {
        # Out of range is then an event, which the supervisor answers by its policy, and not a silent jump.
        "auto.offset.reset": "error",
        # "Nothing more is buffered" is the moment to publish a batch that is not full.
        "enable.partition.eof": True,
        # Whatever a broker has can be fetched: 100000000, the default, is less than a broker takes by its defaults.
        # A fetch has one batch that is larger than its limits, where that is the next one (KIP-74).
        "receive.message.max.bytes": 2_147_483_647,
        # The bound of what waits in front of a full ring. 65536, the default, costs 55 MB for each worker, this 5 MB.
        "queued.max.messages.kbytes": 2_048,
        # How long fetching rests once the queue was full. 1000, the default, caps a reader at 140k messages/s
        # with its default queue and at 10k with a small one; at 10 this queue is as fast as any.
        "fetch.queue.backoff.ms": 10,
    }
    return config | {name: value for name, value in _allowed(settings).items() if name not in _MEMBER_ONLY}


def producer_config(settings: Settings, delivery_seconds: float) -> KafkaConfig:
    """The configuration of a producer that reports each record delivered, or not within ``delivery_seconds``.

    Raises ConfigurationError where ``extra_config`` holds a protected key.
    """
    config: KafkaConfig = {
        "bootstrap.servers": settings.brokers,
        "client.id": f"kafkasrcd-{settings.group_id}",
        "log.connection.close": False,
        # What the topic allows counts, and not what librdkafka guesses. Still below what brokers read at all
        # (socket.request.max.bytes, 104857600): beyond that they close the connection, and nothing says why.
        "message.max.bytes": 100_000_000,
    }
    # A consumer's settings are nothing to a producer.
    config |= {name: value for name, value in _allowed(settings).items() if name not in _MEMBER_ONLY}
    return config | {
        "acks": "all",
        "enable.idempotence": True,
        "delivery.timeout.ms": round(delivery_seconds * 1_000),
        "linger.ms": 0,
    }


def session_timeout_ms(settings: Settings) -> int:
    """How long the broker waits for a heartbeat; with KIP-848 the broker's default, since a client cannot see it."""
    if settings.supervisor.group_protocol is GroupProtocol.CONSUMER:
        return DEFAULT_SESSION_TIMEOUT_MS
    return settings.supervisor.session_timeout_ms or DEFAULT_SESSION_TIMEOUT_MS


def heartbeat_interval_ms(settings: Settings) -> int:
    """The classic protocol's heartbeat interval: at most a third of the session timeout, as Kafka recommends."""
    return settings.supervisor.heartbeat_interval_ms or min(
        DEFAULT_HEARTBEAT_INTERVAL_MS, session_timeout_ms(settings) // 3
    )


def max_poll_interval_ms(settings: Settings) -> int:
    """How long the member may go without polling before it leaves the group, and the group's rebalance timeout.

    No user code runs in the member, so only a revocation keeps it from polling: the drain and the commit after it.
    librdkafka's default of 5 minutes would leave the partitions of a hung supervisor unread for as long. It may not
    be below the session timeout.
    """
    drain_ms = round(settings.supervisor.drain_timeout_seconds * 1_000)
    return max(session_timeout_ms(settings), drain_ms + REVOCATION_SLACK_MS)


def redacted(config: Mapping[str, str | int | float | bool]) -> KafkaConfig:
    """``config`` with its secrets hidden, to be logged."""
    return {
        name: HIDDEN if is_secret(name) else hide_url_passwords(value) if isinstance(value, str) else value
        for name, value in config.items()
    }


def _common(settings: Settings) -> KafkaConfig:
    return {
        "bootstrap.servers": settings.brokers,
        "client.id": f"kafkasrcd-{settings.group_id}",
        # A worker joins no group, but librdkafka asks for the coordinator of the one it is given: with another name
        # here, access lists would have to allow that one too.
        "group.id": settings.group_id,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        # Brokers close idle connections (connections.max.idle.ms); with one client for each partition that is a
        # stream of lines that mean nothing.
        "log.connection.close": False,
    }


def _allowed(settings: Settings) -> dict[str, str]:
    for name in settings.extra_config:
        if reason := protected_reason(name):
            raise ConfigurationError(f"extra_config.{name}: cannot be set: {reason}")
    return settings.extra_config
