"""The error tree. Calls made by users raise only these.

A message says what happened, to which topic-partition-offset, and what to do about it.
"""


class KafkasrcdError(Exception):
    """Everything kafkasrcd raises on purpose."""


class ConfigurationError(KafkasrcdError):
    """The configuration, or a handler it names, cannot be used. The command exits with 78 (EX_CONFIG)."""


class NotRunning(KafkasrcdError):
    """No daemon listens at the control socket. The command exits with 3."""


class WorkerError(KafkasrcdError):
    """A worker or handler process did not do what it is there for."""


class WorkerBootError(WorkerError):
    """A process ended, or stayed silent, before it was ready."""


class WorkerHungError(WorkerError):
    """A process did not stop, or made no progress, within its deadline."""


class RestartLimitExceeded(WorkerError):
    """A process died more often than its restarts allow; its partition is failed until someone looks."""


class DeserializationError(KafkasrcdError):
    """A record's bytes are not what its format says.

    Attributes: ``topic``, ``partition``, ``offset`` of the record, and ``cause``, the reason in words.
    """

    def __init__(self, topic: str, partition: int, offset: int, cause: str) -> None:
        super().__init__(f"{topic}[{partition}]@{offset} cannot be deserialized: {cause}")
        self.topic = topic
        self.partition = partition
        self.offset = offset
        self.cause = cause


class RingError(KafkasrcdError):
    """The shared-memory hand-off between a worker and a handler failed."""


class RecordTooLarge(RingError):
    """A record does not fit the ring; raise ``supervisor.ring_bytes`` to at least twice the record's size."""


class RingCorrupted(RingError):
    """A ring holds bytes that its writer did not publish. Nothing was read from it; it is replaced."""


class StoreError(KafkasrcdError):
    """The offset store refused, or could not be used."""


class StoreUnavailable(StoreError):
    """The offset store cannot be reached or written now. Nothing was recorded; it is tried again."""


class OffsetWentBackwards(StoreError):
    """An advance to an offset before the recorded one. Nothing was recorded."""


class StaleAssignment(StoreError):
    """The partition was claimed by another owner since. Nothing was recorded; this owner must stop."""


class GroupError(KafkasrcdError):
    """The consumer group could not be joined, or a commit was not accepted."""


class BrokerUnavailable(KafkasrcdError):
    """No broker answers, or none lets us in. A command that needs one exits with 69."""


class AssignmentLost(GroupError):
    """The group gave the partition to another member."""


class DeadLetterRefused(KafkasrcdError):
    """A dead letter could not be kept. Its record is not passed over: the partition waits, and it is tried again."""


class HandlerError(KafkasrcdError):
    """The user's handler raised; ``__cause__`` is what it raised."""


class HandlerMisuse(HandlerError):
    """The handler uses kafkasrcd in a way that no record would make right. Its partition stops, whatever ``on_failure``
    says: otherwise a slip in the code would make dead letters of a whole topic."""
