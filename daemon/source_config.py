"""What a KafkaSource is told, and the settings of the engine that this comes to."""

from typing import Any

import msgspec

from kafkasrcd.settings import (
    AutoOffsetReset,
    CommitStrategy,
    FormatSettings,
    HandlerSettings,
    LogLevel,
    NotNegative,
    NotNegativeMilliseconds,
    OnFailure,
    PositiveSeconds,
    SchemaRegistrySettings,
    Settings,
    StoreSettings,
    SupervisorSettings,
)

PROGRAM = "kafkasrcd:KafkaSource"
"""In the place of a handler's name: the program that polls."""


class KafkaSourceConfig(msgspec.Struct, kw_only=True):
    """The ten fields of a source, with their defaults; then what differs from JSON and from a plain supervisor."""

    brokers: str = "localhost:9092"
    group_id: str = "kafkasrcd"
    topics: list[str] = []
    commit_strategy: CommitStrategy = CommitStrategy.PERIODIC
    commit_interval_secs: PositiveSeconds | None = 5.0
    auto_offset_reset: AutoOffsetReset | None = AutoOffsetReset.EARLIEST
    extra_config: dict[str, str] = {}
    max_retries: NotNegative | None = 3
    """Of ``start``: how often in a row it comes back from an error before it raises."""
    retry_backoff_ms: NotNegativeMilliseconds | None = 100
    poll_timeout_ms: int | None = 1_000
    """The longest ``poll`` waits."""
    value_format: str = "json"
    key_format: str = "bytes"
    formats: dict[str, FormatSettings] = {}
    schema_registry: SchemaRegistrySettings = SchemaRegistrySettings()
    supervisor: SupervisorSettings = SupervisorSettings(log_level=LogLevel.WARNING)

    def __repr__(self) -> str:
        """As Settings have it: what may be a password is not shown."""
        return f"KafkaSourceConfig({settings_of(self, self.topics, 'memory://')!r})"


def settings_of(config: KafkaSourceConfig, topics: list[str], store_url: str) -> Settings:
    """The engine's. None stands for the default; what does not fit its type raises ConfigurationError later."""
    is_auto = config.commit_strategy is CommitStrategy.AUTO
    given: dict[str, Any] = {
        "commit_interval_secs": config.commit_interval_secs,
        "auto_offset_reset": config.auto_offset_reset,
        "max_retries": config.max_retries,
        "retry_backoff_ms": config.retry_backoff_ms,
    }
    return Settings(
        brokers=config.brokers,
        group_id=config.group_id,
        topics=topics,
        # With ``auto`` what is polled counts as processed at once; the engine makes no difference.
        commit_strategy=CommitStrategy.PERIODIC if is_auto else config.commit_strategy,
        extra_config=config.extra_config,
        value_format=config.value_format,
        key_format=config.key_format,
        formats=config.formats,
        schema_registry=config.schema_registry,
        store=StoreSettings(url=store_url),
        # A record that cannot be deserialized is counted and logged, and its partition goes on. The program may keep a
        # message for as long as it likes.
        handler=HandlerSettings(target=PROGRAM, processes=1, on_failure=OnFailure.SKIP, timeout_seconds=0),
        supervisor=config.supervisor,
        **{name: value for name, value in given.items() if value is not None},
    )
