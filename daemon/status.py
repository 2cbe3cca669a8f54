"""What ``kafkasrcd status --json`` answers: the shape, and nothing else."""

import msgspec

from kafkasrcd.storage.dead_letters import LetterCount

STATUS_VERSION = 1


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A worker process. ``cpu_percent`` is of one core, over the last sampling interval; ``rss_bytes`` resident."""

    pid: int | None
    restarts: int
    cpu_percent: float
    rss_bytes: int


class PauseStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Why a partition is paused, or about to be: ``by`` whom, ``since_ms`` 1970, and for which ``reason``; ``scope`` is
    what was paused with it, and ``way_on`` what ends it."""

    by: str
    since_ms: int
    reason: str
    scope: str
    way_on: str


class PartitionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One assigned partition.

    ``position`` >= ``processed`` >= ``committed``, each the *next* offset; None until known. ``lag`` is
    ``high_watermark - processed``, never negative. ``rate`` is messages a second over a rolling window of up to 60 s.
    ``since_ms`` is when ``state`` was entered, ``last_commit_ms`` the last accepted commit, both ms since 1970.
    """

    topic: str
    partition: int
    state: str
    since_ms: int
    problem: str
    """Empty where nothing is wrong; else one sentence: what, and what to do."""
    assignment_epoch: int
    handlers: list[int]
    """The handler processes it is bound to: one, or with ordering by key or none all."""
    position: int | None
    processed: int | None
    committed: int | None
    high_watermark: int | None
    lag: int | None
    messages: int
    """Handed off to handlers. Of these as many are in flight as are not succeeded, skipped or dead-lettered; what is
    handled again, since it was rolled back or not committed, is so once more."""
    succeeded: int
    skipped: int
    dead_lettered: int
    scheduled: int = 0
    """Put aside to be handled again later, with ``handler.retry = "scheduled"``."""
    redelivered: int = 0
    """Handled then, or in a replay; not among ``messages``, which has them once."""
    failures: int
    """Attempts that raised, and records that could not be deserialized."""
    bytes: int
    rate: float
    bytes_rate: float
    last_commit_ms: int | None
    worker: WorkerStatus
    paused: PauseStatus | None = None


class HandlerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A handler process."""

    slot: int
    pid: int | None
    state: str
    restarts: int
    cpu_percent: float
    rss_bytes: int
    partitions: int


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The whole daemon, at one moment.

    ``state``: ``starting``, ``joining``, ``running``, ``stopping``. ``problems``: one sentence each, what is wrong
    with the daemon as a whole (broker or store unreachable, since when) and what to do; empty when healthy.
    ``dead_letters``: some seconds old, most first; empty also where letters are not kept in the store. ``retrying``:
    the same of records that wait to be handled again, with ``handler.retry = "scheduled"``.
    """

    version: int = STATUS_VERSION
    kafkasrcd: str
    group_id: str
    state: str
    pid: int
    started_ms: int
    now_ms: int
    problems: list[str]
    rebalances: int
    total_commits: int
    partitions: list[PartitionStatus]
    handlers: list[HandlerStatus]
    dead_letters: list[LetterCount] = []
    retrying: list[LetterCount] = []
