"""A program of the user's in the place of the handler processes: it reads the rings itself.

It is not ours to start, to end or to watch: a message may stay in its hands for as long as it likes, but for a
revocation, which waits for it until its deadline. What it says after that is not heard.
"""

from collections.abc import Callable, Sequence
from typing import Any

from kafkasrcd.daemon.child_processes import ChildProcess, OnExit, OnMessage
from kafkasrcd.daemon.handler_pool import HandlerPool, HandlerSlot
from kafkasrcd.daemon.partition import Partition
from kafkasrcd.workers.control import ControlChannel, ControlMessage, LetterDue, Unbind


class Program(ChildProcess):
    """The other end of the channel. ``on_gone`` is told where there is nobody any more."""

    def __init__(
        self, pid: int, channel: ControlChannel, on_message: OnMessage, on_exit: OnExit, on_gone: Callable[[], None]
    ) -> None:
        super().__init__("program", channel, on_message, on_exit)
        self.pid = pid
        self._on_gone = on_gone

    def kill(self) -> None:
        """It is not ours to end: where it does not take what it is told, it is gone, which is heard elsewhere."""

    def closed(self) -> None:
        self._on_gone()


class ProgramPool(HandlerPool):
    """All partitions are bound to the program."""

    def __init__(
        self,
        *arguments: Any,
        pid: int,
        channel: ControlChannel,
        on_asked: Callable[[ControlMessage], None],
        on_gone: Callable[[], None],
        **named: Any,
    ) -> None:
        """``on_asked``: what the program wants that is not about handling records."""
        super().__init__(*arguments, **named)
        self._pid = pid
        self._channel = channel
        self._on_asked = on_asked
        self._on_gone = on_gone

    def _process(self, slot: HandlerSlot) -> ChildProcess:
        def heard(message: ControlMessage) -> None:
            self._on_message(slot, message)
            self._on_asked(message)

        return Program(self._pid, self._channel, heard, lambda _: None, self._on_gone)

    def redeliver(self, binding: int, letters: Sequence[LetterDue]) -> bool:
        """A program has no handler that letters could go through: they wait for a daemon of the group."""
        return False

    def watch(self, now: float) -> None:
        """There is nothing that takes too long."""

    async def kill(self, partition: Partition) -> None:
        """At a drain's deadline: what is in its hands is not waited for any more."""
        for binding, number in partition.bindings.items():
            child = self.slots[number].child
            if child is not None:
                child.send(Unbind(binding, lost=True))
        if partition.memory is not None:
            for memory in partition.memory.slots:
                memory.handler_ended()

    async def stop(self, seconds: float) -> None:
        """It goes on without the engine; it is told by the end of the channel."""
