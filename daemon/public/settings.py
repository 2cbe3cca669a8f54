"""The typed configuration: one model, with the defaults. Loading it is ``kafkasrcd.daemon.configuration``."""

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta, field

# Every number has an upper bound, so that a slipped digit, or ``inf``, is refused where it stands and not met later
# as an overflow. A day, a million: far above what anyone means.
Positive = Annotated[int, Meta(ge=1, le=1_000_000)]
NotNegative = Annotated[int, Meta(ge=0, le=1_000_000)]
PositiveMilliseconds = Annotated[int, Meta(ge=1, le=86_400_000)]
NotNegativeMilliseconds = Annotated[int, Meta(ge=0, le=86_400_000)]
PositiveSeconds = Annotated[float, Meta(gt=0, le=86_400)]
NotNegativeSeconds = Annotated[float, Meta(ge=0, le=86_400)]


class CommitStrategy(StrEnum):
    """When, and as far as what, an offset is committed."""

    AUTO = "auto"
    MANUAL = "manual"
    PERIODIC = "periodic"
    ON_CHECKPOINT = "on_checkpoint"


class AutoOffsetReset(StrEnum):
    """Where a partition goes on whose offset the broker no longer has, and where one without an offset starts."""

    EARLIEST = "earliest"
    LATEST = "latest"
    ERROR = "error"


class OnFailure(StrEnum):
    """What happens to a record that still fails after its last attempt."""

    DEAD_LETTER = "dead_letter"
    STOP = "stop"
    SKIP = "skip"


class Retry(StrEnum):
    """Where a record waits that is to be tried again."""

    IN_PLACE = "in_place"
    SCHEDULED = "scheduled"


class Ordering(StrEnum):
    """Which records are handled in the order they were produced; others may pass each other."""

    PARTITION = "partition"
    KEY = "key"
    """Those of one key; records without a key have no order."""
    NONE = "none"


class GroupProtocol(StrEnum):
    """The consumer group protocol: ``consumer`` is KIP-848 (Kafka 4.0 and newer)."""

    CLASSIC = "classic"
    CONSUMER = "consumer"


class AssignmentStrategy(StrEnum):
    """How the classic protocol divides partitions over members."""

    COOPERATIVE_STICKY = "cooperative-sticky"
    RANGE = "range"


class LogFormat(StrEnum):
    """``auto`` is for people on a terminal and JSON lines elsewhere."""

    AUTO = "auto"
    HUMAN = "human"
    JSON = "json"


class LogLevel(StrEnum):
    """The least that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"


class HandlerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[handler]``: the user's function and the processes that run it."""

    target: str = ""
    """``package.module:function``, called for every topic that ``topics`` does not name."""
    topics: dict[str, str] = field(default_factory=dict[str, str])
    """Topic name, or regular expression starting with ``^``, to the target for it; the first match wins."""
    path: list[str] = field(default_factory=lambda: ["."])
    """Folders searched for the target's module first, relative to the configuration file."""
    processes: Annotated[int, Meta(ge=0, le=1_024)] = 0
    """Handler processes; 0 is one per core."""
    ordering: Ordering = Ordering.PARTITION
    """``partition``, ``key`` or ``none``: with the last two, one partition's records go to all processes."""
    concurrency: Annotated[int, Meta(ge=1, le=100_000)] = 100
    """For an ``async def`` handler: records in the hands of one process at once, in as many ordering units."""
    threads: Annotated[int, Meta(ge=1, le=1_000)] = 1
    """For a plain handler that waits on others: threads in each process, each with one record."""
    batch_max_messages: Positive = 500
    """For a handler of ``list[Message[T]]``: the most it is given at once."""
    batch_max_wait_ms: NotNegativeMilliseconds = 100
    """For a handler of ``list[Message[T]]``: how long a batch waits to fill."""
    retry: Retry = Retry.IN_PLACE
    """``in_place``: a record that failed holds up what comes behind it in its order until it is tried again;
    ``scheduled``: it is put aside in the offset store and handled at its time by whoever has its partition then, and
    what comes behind it goes on."""
    on_failure: OnFailure = OnFailure.DEAD_LETTER
    """After the last attempt: ``dead_letter`` keeps the record whole and goes on (with a ``memory://`` store and no
    topic for it there is no place, and the partition stops), ``stop`` stops the partition, visibly, ``skip`` skips the
    record, counted."""
    dead_letter_store: bool = True
    """Whether dead letters go to the offset store's database."""
    dead_letter_topic: str = ""
    """A topic that dead letters go to as well, or instead; ``{topic}`` stands for the record's, as in
    ``{topic}.DLQ``."""
    max_dead_letter_ratio: Annotated[float, Meta(ge=0, le=1)] = 1
    """Above which share of dead letters among its last records a partition is paused, until ``kafkasrcd resume``; 1 is
    never."""
    dead_letter_window_seconds: PositiveSeconds = 60
    """For ``max_dead_letter_ratio``: the last records are those of so many seconds, and 1 000 at most."""
    dead_letter_min_records: Positive = 20
    """For ``max_dead_letter_ratio``: of fewer records nothing follows."""
    non_retryable: list[str] = field(default_factory=list[str])
    """Exceptions, as ``ValueError`` or ``package.module.Error``, after which no further attempt is made."""
    crash_attempts: Positive = 3
    """How often one record may end its handler process, or its worker, before it has failed for good."""
    timeout_seconds: NotNegativeSeconds = 300
    """How long one call of the handler, or the worker's half of a record's format, may take before its process is
    killed, as if the record had ended it; 0 is for ever."""


class StoreSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[store]``: the offset store."""

    url: str = ""
    """``sqlite:///path``, ``postgresql://user@host/database`` or ``memory://``; empty is ``offsets.db`` in the state
    directory."""
    busy_timeout_ms: PositiveMilliseconds = 5_000
    """How long a write waits for another's: SQLite's lock, PostgreSQL's lock_timeout."""

    def __repr__(self) -> str:
        """Without the URL, which may have a password."""
        return f"StoreSettings(url=<not shown>, busy_timeout_ms={self.busy_timeout_ms})"


class SupervisorSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[supervisor]``: group membership, lifetime and the control socket."""

    group_protocol: GroupProtocol = GroupProtocol.CLASSIC
    partition_assignment_strategy: AssignmentStrategy | None = None
    """Classic protocol only; unset is ``cooperative-sticky``."""
    group_instance_id: str = ""
    """A name that stays through restarts (static membership), different on every host; empty is dynamic."""
    session_timeout_ms: Annotated[int, Meta(ge=1_000, le=3_600_000)] | None = None
    """Classic protocol only; unset is 45 000. With ``consumer`` the broker sets it."""
    heartbeat_interval_ms: Annotated[int, Meta(ge=100, le=1_200_000)] | None = None
    """Classic protocol only, at most a third of the session timeout; unset is 3 000, or a third of a session timeout
    below 9 000. With ``consumer`` the broker sets it."""
    drain_timeout_seconds: Annotated[float, Meta(gt=0, le=3_600)] = 20.0
    """One budget for a whole revocation or stop: finish what handlers hold, record, commit."""
    lease_seconds: PositiveSeconds = 5.0
    """How long processes go on without a sign of their supervisor; must be below the session timeout."""
    ring_bytes: Annotated[int, Meta(ge=65_536, le=1_073_741_824, multiple_of=4_096)] = 4 * 1024 * 1024
    """Shared memory between a worker and its handler; the largest record is a little under half of it."""
    worker_restarts: Positive = 10
    """Deaths of one partition's worker within ``restart_window_seconds`` before the partition is failed."""
    restart_window_seconds: PositiveSeconds = 60.0
    runtime_directory: str = ""
    """Holds the control socket; empty is $RUNTIME_DIRECTORY, then $XDG_RUNTIME_DIR/kafkasrcd, then /tmp."""
    control_socket: str = ""
    """Empty is ``<group_id>.sock`` in the runtime directory."""
    log_format: LogFormat = LogFormat.AUTO
    log_level: LogLevel = LogLevel.INFO


class FormatSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[formats."topic"]``: how one topic's records are written; the topic is a name, or a regular expression starting
    with ``^``, and the first that matches counts."""

    value_format: str = ""
    """As ``value_format`` for all topics; empty is what that says."""
    key_format: str = ""
    """As ``key_format`` for all topics; empty is what that says."""
    value_schema: str = ""
    """The schema that values were written with, in a file (``.avsc``, ``.proto``, ``.json``): there is no registry's
    header before them. Relative to the configuration file."""
    key_schema: str = ""
    """The same for keys."""
    value_reader_schema: str = ""
    """Avro: the schema that values are read as, in a file, whichever they were written with."""
    key_reader_schema: str = ""
    """The same for keys."""
    value_message: str = ""
    """Protobuf from a file: the message's name, as in ``shop.Order``; empty is the file's only one."""
    key_message: str = ""
    """The same for keys."""


class SchemaRegistrySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[schema_registry]``: where the schemas of ``avro``, ``protobuf`` and ``json_schema`` are, unless in files."""

    url: str = ""
    """Of the Confluent API, as in ``https://registry:8081``; several, separated by commas, are tried in turn."""
    username: str = ""
    """With ``password``: basic authentication."""
    password: str = ""
    bearer_token: str = ""
    """Instead of username and password."""
    bearer_issuer_endpoint_url: str = ""
    """Or: where an OAuth 2 client gets its tokens, with ``bearer_client_id`` and ``bearer_client_secret``."""
    bearer_client_id: str = ""
    bearer_client_secret: str = ""
    bearer_scope: str = ""
    """What the token is to be good for, where the provider wants to be told."""
    bearer_logical_cluster: str = ""
    """Sent along with a token as ``target-sr-cluster``: Confluent Cloud's name of the registry, as in ``lsrc-…``."""
    bearer_identity_pool_id: str = ""
    """Sent along with a token as ``Confluent-Identity-Pool-Id``."""
    ca_location: str = ""
    """Certificates to trust, PEM; empty is the system's. Paths are relative to the configuration file."""
    certificate_location: str = ""
    """This client's certificate, PEM, where the registry wants one; with the key in it or in ``key_location``."""
    key_location: str = ""
    key_password: str = ""
    timeout_ms: PositiveMilliseconds = 5_000
    """For one request."""

    def __repr__(self) -> str:
        """Without anything that may be a password."""
        return "SchemaRegistrySettings(<not shown>)"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything kafkasrcd can be told. The top level has the names and defaults of KafkaSourceConfig."""

    brokers: str = "localhost:9092"
    """Comma-separated ``host:port``; an IPv6 address stands in brackets."""
    group_id: str = "kafkasrcd"
    topics: list[str] = field(default_factory=list[str])
    """Topic names; one that starts with ``^`` is a regular expression."""
    commit_strategy: CommitStrategy = CommitStrategy.PERIODIC
    commit_interval_secs: PositiveSeconds = 5.0
    checkpoint_interval_ms: PositiveMilliseconds = 100
    """With ``on_checkpoint``: a transaction is committed this long after its first record at the latest."""
    checkpoint_max_messages: Positive = 10_000
    """With ``on_checkpoint``: or when it has so many records."""
    auto_offset_reset: AutoOffsetReset = AutoOffsetReset.EARLIEST
    start_from: str = ""
    """Where a partition without an offset starts: ``earliest``, ``latest``, ``offset:1000``, or
    ``timestamp:2026-01-31T12:00:00+00:00``; empty is ``auto_offset_reset``."""
    extra_config: dict[str, str] = field(default_factory=dict[str, str])
    """librdkafka settings, such as ``security.protocol``; those the design depends on are refused, with the reason."""
    max_retries: NotNegative = 3
    """Further attempts after a handler raised; 0 is none."""
    retry_backoff_ms: NotNegativeMilliseconds = 100
    """Before the first further attempt; doubles, jittered, up to ``retry_backoff_max_ms``."""
    retry_backoff_max_ms: NotNegativeMilliseconds = 10_000
    poll_timeout_ms: Annotated[int, Meta(ge=1, le=10_000)] = 100
    """The longest a worker waits in one poll of the broker."""
    value_format: str = "json"
    """``json``, ``string``, ``bytes``, ``msgpack``, ``avro``, ``protobuf``, ``json_schema``, or a class of yours, as
    in ``custom:package.module:Class``."""
    key_format: str = "bytes"
    """The same for keys."""
    formats: dict[str, FormatSettings] = field(default_factory=dict[str, FormatSettings])
    """What differs for some topics."""
    handler: HandlerSettings = field(default_factory=HandlerSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    supervisor: SupervisorSettings = field(default_factory=SupervisorSettings)
    schema_registry: SchemaRegistrySettings = field(default_factory=SchemaRegistrySettings)

    def __repr__(self) -> str:
        """With the names in ``extra_config`` only: some of its values are passwords."""
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        shown["extra_config"] = sorted(self.extra_config)
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"
