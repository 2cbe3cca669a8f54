"""The lease of every partition at work: moved forward by the event loop, and held back until membership is proven.

A supervisor that was frozen longer than the lease may have been put out of the group meanwhile, without knowing it yet.
Its workers and handlers stand still, since their leases have run out; they go on only after the group has accepted a
commit of this member, and after every event that was pending by then has been told.
"""

import asyncio
from typing import Final

from kafkasrcd.daemon.assignment import Assignment
from kafkasrcd.daemon.lifecycle import WORKING
from kafkasrcd.daemon.membership import Membership
from kafkasrcd.workers.clock import boottime_ns
from kafkasrcd.workers.event_log import EventLog

_PROOF_RETRY_SECONDS: Final = 0.5


class LeaseKeeper:
    """``renew`` is called in every turn of the supervisor's loop, and for partitions that have just begun."""

    def __init__(self, lease_seconds: float, assignment: Assignment, membership: Membership) -> None:
        self._lease_seconds = lease_seconds
        self._assignment = assignment
        self._membership = membership
        self._renewed_ns = boottime_ns()
        self._proof: asyncio.Task[None] | None = None
        self._log = EventLog("lease")
        assignment.renew_leases = self.renew

    @property
    def held(self) -> bool:
        """Whether leases are being renewed: membership needs no proof, and the store takes what is processed."""
        return self._proof is None and not self._assignment.recording.store_problem

    def renew(self) -> None:
        """Move every lease forward, unless this loop was away for longer than a lease."""
        now = boottime_ns()
        away_seconds = (now - self._renewed_ns) / 1e9
        self._renewed_ns = now
        if away_seconds >= self._lease_seconds and self._proof is None:
            self._log.error(
                "lease_lapsed",
                f"the supervisor stood still for {away_seconds:.1f} s; nothing goes on before its membership is proven",
                seconds=round(away_seconds, 1),
            )
            self._proof = asyncio.get_running_loop().create_task(self._prove())
        if self.held:
            for partition in self._assignment.partitions.values():
                if partition.state in WORKING and partition.paused is None and partition.memory is not None:
                    partition.memory.extend_lease(self._lease_seconds)

    async def _prove(self) -> None:
        while True:
            if await self._assignment.recording.prove_membership():
                # A revocation that librdkafka had queued before the commit is told by a poll that begins after it.
                polls = self._membership.polls
                while self._membership.polls < polls + 2:
                    await asyncio.sleep(0.02)
                break
            await asyncio.sleep(_PROOF_RETRY_SECONDS)
        self._proof = None
        self._renewed_ns = boottime_ns()
        self._log.info("lease_resumed", "membership is proven; work goes on")
