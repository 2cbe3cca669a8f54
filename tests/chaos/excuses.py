"""Why a record was handled twice: a repeat that no fault explains is a defect.

A clean stop, a rebalance, a killed worker, and a freeze that the session outlasts, explain none. An outage explains
none by itself either, nor does a member that a rebalance waits for: they only keep others from committing meanwhile.
But a broker that dies, and is away for nearly a session, may have been the group's coordinator: then no member could
say that it lives, and each may have lost its partitions.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from enum import StrEnum
from itertools import pairwise

from tests.chaos.disturbance import Disturbance
from tests.chaos.fault import FaultKind, Role
from tests.chaos.handling import Handling
from tests.chaos.plan import SESSION_TIMEOUT_SECONDS

COMMIT_SECONDS = 4.0
"""How much of the past a commit may not cover: the interval (0.5 s), and what a commit takes on a busy machine."""
SETTLING_SECONDS = 6.0
"""How long after a thaw or an outage its consequences may come: the group notices, and gives partitions away."""

_OUTAGES = (
    FaultKind.KILL_BROKER,
    FaultKind.STOP_BROKER,
    FaultKind.RESTART_STORE,
    FaultKind.CRASH_STORE,
    FaultKind.CUT_STORE,
)
_FREEZES = (FaultKind.FREEZE, FaultKind.FREEZE_DAEMON)
_HURRIED_SECONDS = 2.0
"""A second SIGTERM that soon is for the same run of the daemon."""
_GIVEN_UP_SECONDS = 10.0
"""After a second SIGTERM: for the last commit, for leaving."""


class Excuse(StrEnum):
    """What explains a repeat."""

    IN_HANDS = "in the hands of a process that was killed"
    NOT_COMMITTED = "past the last commit of a daemon that was killed or lost its partitions"
    THAWED = "in the hands of a process that was frozen while its partition went to another"


class Excuses:
    """What was done in one storm, to ask what it explains."""

    def __init__(self, disturbances: Iterable[Disturbance], handlings: Sequence[Handling]) -> None:
        self._all = sorted(disturbances, key=lambda disturbance: disturbance.from_ns)
        self._daemons = {handling.daemon for handling in handlings}
        self._by_process: defaultdict[str, list[Handling]] = defaultdict(list)
        for handling in sorted(handlings, key=lambda handling: handling.at_ns):
            self._by_process[handling.process].append(handling)
        self._spans = [self._span(disturbance) for disturbance in self._uncommitted()]

    def excuse(self, earlier: Handling, later: Handling) -> Excuse | None:
        """Why `later` had to do again what `earlier` had done; None where nothing explains it."""
        if self._died_holding(earlier):
            return Excuse.IN_HANDS
        if any(
            daemon == earlier.daemon and from_ns <= earlier.at_ns <= until_ns
            for daemon, from_ns, until_ns in self._spans
        ):
            return Excuse.NOT_COMMITTED
        return Excuse.THAWED if self._thawed_holding(later) else None

    def of_quarantine(self, deaths: int, at_ns: int) -> bool:
        """Whether so many deaths by `at_ns`, of which a good record was blamed for each, may have been the storm's."""
        killed = Counter(
            disturbance.daemon
            for disturbance in self._all
            if disturbance.kind is FaultKind.KILL
            and disturbance.role in (Role.HANDLER, Role.FORK_SERVER)
            and disturbance.from_ns <= at_ns
        )
        return max(killed.values(), default=0) >= deaths

    def _died_holding(self, earlier: Handling) -> bool:
        """Whether it was the last of a process that was killed. A frozen one is killed when its partitions go, and so
        is one whose daemon is told twice to end."""
        if self._by_process[earlier.process][-1] is not earlier:
            return False
        return any(hurried.daemon == earlier.daemon for hurried in self._hurried()) or any(
            earlier.pid in disturbance.pids and earlier.at_ns <= disturbance.until_ns + SETTLING_SECONDS * 1e9
            for disturbance in self._all
        )

    def _thawed_holding(self, later: Handling) -> bool:
        """Whether it is the last thing its process had begun when it was frozen."""
        handlings = self._by_process[later.process]
        for disturbance in self._all:
            if disturbance.kind in _FREEZES and later.pid in disturbance.pids:
                before = [h for h in handlings if h.at_ns <= disturbance.from_ns]
                after = [h for h in handlings if h.at_ns > disturbance.from_ns]
                if later in (*before[-1:], *after[:1]):
                    return True
        return False

    def _hurried(self) -> Iterable[Disturbance]:
        """The ends that were told twice to come: the last commit is tried for some seconds, and no longer."""
        stops = [disturbance for disturbance in self._all if disturbance.kind is FaultKind.STOP]
        for daemon in {stop.daemon for stop in stops}:
            for first, second in pairwise(stop for stop in stops if stop.daemon == daemon):
                if second.from_ns - first.from_ns < _HURRIED_SECONDS * 1e9:
                    yield second._replace(until_ns=int(second.until_ns + _GIVEN_UP_SECONDS * 1e9))

    def _uncommitted(self) -> Iterable[Disturbance]:
        """What keeps a daemon from committing what it has processed, and gives its partitions to another."""
        yield from self._hurried()
        frozen_until: dict[int, tuple[int, int]] = {}
        for disturbance in self._all:
            daemon, role = disturbance.daemon, disturbance.role
            if disturbance.kind is FaultKind.KILL and role is Role.SUPERVISOR:
                yield disturbance
            elif disturbance.kind is FaultKind.KILL_BROKER:
                if disturbance.until_ns - disturbance.from_ns > (SESSION_TIMEOUT_SECONDS - 1.0) * 1e9:
                    until_ns = int(disturbance.until_ns + SETTLING_SECONDS * 1e9)
                    for each in self._daemons:
                        yield disturbance._replace(daemon=each, until_ns=until_ns)
            elif daemon is not None and (
                disturbance.kind is FaultKind.FREEZE_DAEMON
                or (disturbance.kind is FaultKind.FREEZE and role is Role.SUPERVISOR)
            ):
                # Two freezes with no time for a heartbeat between them are one.
                from_ns, until_ns = frozen_until.get(daemon, (disturbance.from_ns, 0))
                if disturbance.from_ns > until_ns + 3e9:
                    from_ns = disturbance.from_ns
                until_ns = max(until_ns, disturbance.until_ns)
                frozen_until[daemon] = from_ns, until_ns
                if until_ns - from_ns > (SESSION_TIMEOUT_SECONDS - 1.0) * 1e9:
                    yield disturbance._replace(from_ns=from_ns, until_ns=int(until_ns + SETTLING_SECONDS * 1e9))

    def _span(self, disturbance: Disturbance) -> tuple[int | None, int, int]:
        """Whose handlings it leaves uncommitted, from when, until when."""
        before_ns = int(COMMIT_SECONDS * 1e9)
        from_ns = disturbance.from_ns - before_ns
        for first_ns, last_ns in reversed(self._blocked()):
            if first_ns < disturbance.until_ns and last_ns > from_ns:
                from_ns = min(from_ns, first_ns - before_ns)
        return disturbance.daemon, from_ns, disturbance.until_ns

    def _blocked(self) -> list[tuple[int, int]]:
        """When commits may be refused, or kept waiting: in outages, and in a rebalance that waits for a member which is
        frozen, or dead and not missed yet. Ordered by their beginnings."""
        session_ns = int((SESSION_TIMEOUT_SECONDS + SETTLING_SECONDS) * 1e9)
        found: list[tuple[int, int]] = []
        for disturbance in self._all:
            if disturbance.kind in _OUTAGES or disturbance.kind is FaultKind.FREEZE_DAEMON:
                found.append((disturbance.from_ns, disturbance.until_ns))
            elif disturbance.role is Role.SUPERVISOR:
                until_ns = disturbance.until_ns + (session_ns if disturbance.kind is FaultKind.KILL else 0)
                found.append((disturbance.from_ns, until_ns))
        return found
