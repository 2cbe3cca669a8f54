"""What the supervisor and its child processes tell each other, and the sockets it travels on.

Decisions only: nothing is sent per record or per batch. Progress is in the shared cells. Each message is one packet of
a SOCK_SEQPACKET pair, with the descriptors that belong to it.
"""

import os
import signal
import socket
from typing import Final

import msgspec

from kafkasrcd.storage.offset_store import Layer, Layout
from kafkasrcd.workers.formats import Shape

STACKS_SIGNAL: Final = signal.SIGUSR2
"""Has a child write the stacks of its threads to its file for them, whatever it is doing."""
_MOST_DESCRIPTORS: Final = 250
_MOST_BYTES: Final = 128 * 1024


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first message to every child. ``settings`` is the Settings as JSON.

    Descriptors: to a handler process its bell; then a file for the stacks of its threads.
    """

    settings: bytes
    base_directory: str
    store_url: str
    slot: int
    schema_directory: str = ""
    """Where the registry's schemas are found, and kept."""

    def __repr__(self) -> str:
        """Without settings and URL, which may have passwords."""
        return f"Setup(slot={self.slot})"


class Quarantined(msgspec.Struct, frozen=True, kw_only=True):
    """The record at ``offset`` has ended its process ``attempts`` times, and is not given to the user's code again.
    ``traceback``: the stacks of a process that was killed, since the record did not end."""

    offset: int
    error: str
    reason: str
    attempts: int
    traceback: str = ""


class StartWorker(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Fetch this partition from ``start_offset`` and spread it by ``layout``, but for what ``layers`` say is done.

    Descriptors: partition memory, worker's bell, the bell of each slot's handler process.
    """

    topic: str
    partition: int
    assignment_epoch: int
    start_offset: int
    layout: Layout
    layers: tuple[Layer, ...]
    shape: Shape = Shape.PLAIN
    """What its records are prepared as, where the worker has a part in that."""
    refused: tuple[Quarantined, ...] = ()
    """Records that are not prepared again, since that ended workers."""


class WorkerReady(msgspec.Struct, frozen=True, tag=True):
    """The worker's consumer is assigned; it hands off from now on."""


class OffsetOutOfRange(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The broker does not have ``position``; it has ``log_start`` up to ``high_watermark``. The worker has stopped."""

    position: int
    log_start: int
    high_watermark: int


class WorkerWaits(msgspec.Struct, frozen=True, tag=True):
    """The worker waits with what comes next: ``reason`` says for what. Empty: it goes on."""

    reason: str


class WorkerFault(msgspec.Struct, frozen=True, tag=True):
    """The worker cannot go on, and starting it again would not help: ``reason`` says why."""

    reason: str


class HandlerReady(msgspec.Struct, frozen=True, tag=True):
    """The handler process has imported its targets. ``shapes``: for each pattern of topics, what its records are to be
    prepared as; the pattern of all others is empty."""

    shapes: tuple[tuple[str, Shape], ...] = ()


class HandlerRefused(msgspec.Struct, frozen=True, tag=True):
    """A target cannot be imported, or has a signature that fits no kind of handler."""

    reason: str


class Bind(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Handle one slot of this partition. Descriptors: partition memory, worker's bell. ``binding`` names it from now
    on; ``slot`` is of ``layout``."""

    binding: int
    topic: str
    partition: int
    assignment_epoch: int
    slot: int
    layout: Layout
    quarantined: tuple[Quarantined, ...] = ()


class LetterDue(msgspec.Struct, frozen=True, kw_only=True):
    """A letter in the store whose record is to be handled again.

    ``alone``: with nothing else in the process's hands, since it may have ended one. ``ended``: it has, too often, and
    is not given to the handler.
    """

    id: int
    alone: bool = False
    ended: Quarantined | None = None


class Redeliver(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Handle the records of these letters, beside those in the ring."""

    binding: int
    letters: tuple[LetterDue, ...]


class LettersDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Nothing is left of a Redeliver. ``done``: how many were handled, or failed; the others are due as before."""

    binding: int
    done: int


class Unbind(msgspec.Struct, frozen=True, tag=True):
    """The ring is not to be looked at again. ``lost``: what was in hand was not waited for."""

    binding: int
    lost: bool = False


class RecordFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """``on_failure = "stop"``: the record failed for the last time; its partition stands still before it."""

    binding: int
    offset: int
    error: str


class RingBroken(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The ring holds what its writer did not publish; it is not read any more."""

    binding: int
    reason: str


class LetterRefused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A letter cannot be written down, and the slot waits: ``reason`` says which and why, and is empty once it is."""

    binding: int
    reason: str


class StoreAway(msgspec.Struct, frozen=True, tag=True):
    """With ``on_checkpoint``: the handler process cannot commit its transactions now, and waits."""

    reason: str


class Fenced(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """With ``on_checkpoint``: the store refused what was processed; the partition has another owner."""

    binding: int
    reason: str


class OpenSource(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a program, first: run for it. ``settings`` is the Settings as JSON."""

    settings: bytes
    base_directory: str
    store_url: str
    control_path: str

    def __repr__(self) -> str:
        """Without settings and URL, which may have passwords."""
        return f"OpenSource(control_path={self.control_path!r})"


class Record(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a program: record now what it has processed, or committed, and answer with ``Recorded`` of this number."""

    number: int


class Recorded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a program: store and Kafka have it; or ``problem`` says why not."""

    number: int
    problem: str = ""


class Seek(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a program: go on with this partition at ``offset``, now."""

    topic: str
    partition: int
    offset: int


class Close(msgspec.Struct, frozen=True, tag=True):
    """From a program: drain, record, leave the group, end."""


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a program: the engine ends, by an error of the class ``error``; or as it was told, and that is empty."""

    error: str = ""
    reason: str = ""


class Exit(msgspec.Struct, frozen=True, tag=True):
    """End now; nothing is in flight."""


class Spawn(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To the fork server: a new child of ``role`` worker or handler. Descriptor: the child's control socket."""

    child: int
    role: str
    title: str


class Spawned(msgspec.Struct, frozen=True, tag=True):
    """From the fork server. Descriptor: the child's pidfd."""

    child: int
    pid: int


class Exited(msgspec.Struct, frozen=True, tag=True):
    """From the fork server: the child was reaped. ``exit_code`` is negative for a signal."""

    child: int
    exit_code: int


ControlMessage = (
    Setup
    | StartWorker
    | WorkerReady
    | OffsetOutOfRange
    | WorkerFault
    | WorkerWaits
    | HandlerReady
    | HandlerRefused
    | Bind
    | Unbind
    | Redeliver
    | LettersDone
    | RecordFailed
    | RingBroken
    | LetterRefused
    | StoreAway
    | Fenced
    | OpenSource
    | Record
    | Recorded
    | Seek
    | Close
    | Ended
    | Exit
    | Spawn
    | Spawned
    | Exited
)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ControlMessage).decode


class ControlChannel:
    """One end of a control socket."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    @classmethod
    def pair(cls) -> tuple["ControlChannel", socket.socket]:
        """A channel, and the socket for the other process."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), theirs

    def fileno(self) -> int:
        return self._socket.fileno()

    def setblocking(self, flag: bool) -> None:
        self._socket.setblocking(flag)

    def send(self, message: ControlMessage, descriptors: tuple[int, ...] = ()) -> None:
        """Send; raises OSError where the other side is gone, or does not take its messages (non-blocking)."""
        socket.send_fds(self._socket, [_encode(message)], descriptors)

    def receive(self) -> tuple[ControlMessage, list[int]] | None:
        """The next message and its descriptors, which the caller owns; None where the other side is gone.

        Raises BlockingIOError where a non-blocking channel has none.
        """
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._socket, _MOST_BYTES, _MOST_DESCRIPTORS)
        except ConnectionResetError:
            return None
        if not packet:
            return None
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        return _decode(packet), descriptors

    def close(self) -> None:
        self._socket.close()
