"""Workers that do not get on: one that has prepared a record for too long is ended, and its stacks are kept."""

import asyncio

from kafkasrcd.daemon.hung_calls import Stacks
from kafkasrcd.daemon.partition import Partition
from kafkasrcd.workers.event_log import EventLog


class HungWorkers:
    """``timeout_seconds`` is for the preparing of one record, its key and its value; 0 is for ever.

    Needs nothing of the worker but the PREPARING cell, which it writes in any case. Waiting for a registry, for the
    broker or for room in a ring is no preparing.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.stacks = Stacks()
        """Of all workers: it is rare that one is asked, and then it is one after the other."""
        self._timeout_seconds = timeout_seconds
        self._one_at_a_time = asyncio.Lock()
        self._log = EventLog("worker")

    def look(self, partition: Partition, now: float) -> bool:
        """Note what the worker of ``partition`` does; whether it is time to ``end`` it."""
        partition.hands.look(0, partition.preparing, now)
        if not self._timeout_seconds or partition.hands.longer_than(self._timeout_seconds) is None:
            return False
        partition.hands.clear()  # it is told once
        return True

    async def end(self, partition: Partition) -> None:
        """Kill its worker, unless that gets on meanwhile: where its threads are, its end is blamed on the record."""
        child, offset = partition.worker, partition.preparing
        async with self._one_at_a_time:
            if child is None or offset is None or (partition.worker, partition.preparing) != (child, offset):
                return
            stacks = await self.stacks.ask(child)
        if (partition.worker, partition.preparing) != (child, offset) or child.exit_code is not None:
            return
        self._log.error(
            "worker_hung",
            f"{partition.name}@{offset} is being prepared for longer than handler.timeout_seconds, and its worker is "
            f"killed:\n{stacks or 'no stacks: it does not answer'}",
            topic=partition.name.topic,
            partition=partition.name.partition,
            offset=offset,
        )
        partition.hung_stacks = stacks
        child.kill()
