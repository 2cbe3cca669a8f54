"""The envelope a handler receives."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Headers(Mapping[str, bytes | None]):
    """A record's headers, in the order they were produced.

    As a mapping it answers with the last value of a name, as Kafka's ``lastHeader`` does; ``get_all`` has every
    value of a repeated name, and ``items_all`` every pair. A header's value may be None.
    """

    __slots__ = ("_last", "_pairs")

    def __init__(self, pairs: Sequence[tuple[str, bytes | None]] = ()) -> None:
        self._pairs = tuple(pairs)
        self._last = dict(self._pairs)

    def __getitem__(self, name: str) -> bytes | None:
        return self._last[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._last)

    def __len__(self) -> int:
        """The number of different names."""
        return len(self._last)

    def get_all(self, name: str) -> list[bytes | None]:
        """Every value of ``name``, in order; empty where there is none."""
        return [value for key, value in self._pairs if key == name]

    def items_all(self) -> tuple[tuple[str, bytes | None], ...]:
        """Every (name, value) pair in order, repeated names included."""
        return self._pairs

    def __repr__(self) -> str:
        return f"Headers({list(self._pairs)!r})"


NO_HEADERS = Headers()
_decode_headers = msgspec.msgpack.Decoder(list[tuple[str, bytes | None]]).decode


class Message(msgspec.Struct, Generic[T], frozen=True):
    """One record, as the handler sees it.

    ``payload``: the deserialized value; None for a tombstone (a record whose value is null). ``key``: the key's bytes,
    or what ``key_format`` makes of them, or None. ``topic``, ``partition``, ``offset``: this record's coordinates.
    ``timestamp_ms``: milliseconds since 1970 as the broker has it, -1 where it has none; ``timestamp`` is the same
    as an aware datetime. ``headers``: a mapping of name to bytes.

    ``Message(payload)`` is enough in a test; the rest has defaults.
    """

    payload: T
    key: Any = None
    topic: str = ""
    partition: int = 0
    offset: int = 0
    timestamp_ms: int = -1
    encoded_headers: bytes | None = None

    def commit(self) -> None:
        """With ``commit_strategy = "manual"``: this record is done, and may be committed.

        Does not wait. It is recorded within 0.1 s once every record before it in its partition (with ordering by key
        or none: its part of it) is committed too. May be called later, out of order, twice, and from any thread.
        Raises HandlerError with another strategy; outside of the daemon, as in a test, does nothing.
        """
        if _commit is not None:
            _commit(self)

    @property
    def timestamp(self) -> datetime | None:
        """The record's time (UTC), or None where it has none."""
        return None if self.timestamp_ms < 0 else _EPOCH + timedelta(milliseconds=self.timestamp_ms)

    @property
    def headers(self) -> Headers:
        """The record's headers; decoded when asked for, since most handlers never look."""
        return NO_HEADERS if self.encoded_headers is None else decode_headers(self.encoded_headers)


def decode_headers(encoded: bytes) -> Headers:
    """What ``encode_headers`` made."""
    return Headers(_decode_headers(encoded))


_commit: "Callable[[Message[Any]], None] | None" = None


def commit_through(commit: "Callable[[Message[Any]], None] | None") -> None:
    """Have ``Message.commit`` call ``commit`` in this process."""
    global _commit
    _commit = commit


def encode_headers(pairs: Sequence[tuple[str, bytes | None]]) -> bytes:
    """``pairs`` as ``Message.encoded_headers`` carries them."""
    return _encode_headers(list(pairs))


_encode_headers = msgspec.msgpack.Encoder().encode
