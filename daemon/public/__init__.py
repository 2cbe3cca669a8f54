"""kafkasrcd: Kafka consumer groups as Python function calls, on all cores.

What a handler imports is here. Every name is resolved on first use, so that a spawned process that imports this
package pays for nothing it does not need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kafkasrcd.daemon.async_kafka_source import AsyncKafkaSource
    from kafkasrcd.daemon.kafka_source import KafkaSource
    from kafkasrcd.daemon.source_config import KafkaSourceConfig
    from kafkasrcd.daemon.source_metrics import KafkaSourceMetrics
    from kafkasrcd.daemon.state_backends import MemoryStateBackend, SqlStateBackend
    from kafkasrcd.deserializer import Deserializer
    from kafkasrcd.errors import (
        AssignmentLost,
        BrokerUnavailable,
        ConfigurationError,
        DeadLetterRefused,
        DeserializationError,
        GroupError,
        HandlerError,
        HandlerMisuse,
        KafkasrcdError,
        NotRunning,
        OffsetWentBackwards,
        RecordTooLarge,
        RestartLimitExceeded,
        RingCorrupted,
        RingError,
        StaleAssignment,
        StoreError,
        StoreUnavailable,
        WorkerBootError,
        WorkerError,
        WorkerHungError,
    )
    from kafkasrcd.message import Headers, Message
    from kafkasrcd.outcomes import BatchFailed, Reject, RetryLater
    from kafkasrcd.settings import CommitStrategy

__all__ = [
    "AssignmentLost",
    "AsyncKafkaSource",
    "BatchFailed",
    "BrokerUnavailable",
    "CommitStrategy",
    "ConfigurationError",
    "DeadLetterRefused",
    "DeserializationError",
    "Deserializer",
    "GroupError",
    "HandlerError",
    "HandlerMisuse",
    "Headers",
    "KafkaSource",
    "KafkaSourceConfig",
    "KafkaSourceMetrics",
    "KafkasrcdError",
    "MemoryStateBackend",
    "Message",
    "NotRunning",
    "OffsetWentBackwards",
    "RecordTooLarge",
    "Reject",
    "RestartLimitExceeded",
    "RetryLater",
    "RingCorrupted",
    "RingError",
    "SqlStateBackend",
    "StaleAssignment",
    "StoreError",
    "StoreUnavailable",
    "WorkerBootError",
    "WorkerError",
    "WorkerHungError",
]

_HOMES = {
    "AsyncKafkaSource": "daemon.async_kafka_source",
    "BatchFailed": "outcomes",
    "CommitStrategy": "settings",
    "Deserializer": "deserializer",
    "Headers": "message",
    "KafkaSource": "daemon.kafka_source",
    "KafkaSourceConfig": "daemon.source_config",
    "KafkaSourceMetrics": "daemon.source_metrics",
    "MemoryStateBackend": "daemon.state_backends",
    "Message": "message",
    "Reject": "outcomes",
    "RetryLater": "outcomes",
    "SqlStateBackend": "daemon.state_backends",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'kafkasrcd' has no attribute {name!r}")
    value = getattr(import_module(f"kafkasrcd.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value
