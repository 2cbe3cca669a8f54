"""What a handler may raise to say more than that it failed."""

from collections.abc import Sequence
from typing import Any

from kafkasrcd.message import Message


class Reject(Exception):
    """The record is not worth another attempt: to the dead letters (or as ``on_failure`` says) at once, with the
    reason."""


class RetryLater(Exception):
    """Not now: the next attempt is ``after`` seconds from now, in place of ``retry_backoff_ms``. It counts as an
    attempt: after ``max_retries`` further ones the record has failed."""

    def __init__(self, after: float, reason: str = "") -> None:
        super().__init__(reason or f"again in {after:g} s")
        self.after = after


class BatchFailed(Exception):
    """Of a batch, only ``failed`` did: the others are done, and are not given to the handler again.

    Each of ``failed`` is tried again alone, so one that succeeds then has been handled after those behind it. With
    ``on_checkpoint`` the whole call is rolled back, so all are given to the handler once more, in their order: the
    failed ones alone, and those between them together. ``__cause__`` (``raise BatchFailed(…) from error``) is what the
    log and a dead letter show.
    """

    def __init__(self, failed: Sequence[Message[Any]], reason: str = "") -> None:
        if not all(isinstance(message, Message) for message in failed):
            raise TypeError("BatchFailed takes the messages that failed, as the handler was given them")
        super().__init__(reason or f"{len(failed)} records of the batch failed")
        self.failed = tuple(failed)


for _outcome in (Reject, RetryLater, BatchFailed):
    _outcome.__module__ = "kafkasrcd"  # as they are imported, in logs and dead letters
