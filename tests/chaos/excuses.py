"""Why a record was handled twice: a repeat that no fault explains is a defect.

A clean stop, a rebalance, a killed worker, and a freeze that the session outlasts, explain none.
"""

from collections import defaultdict
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


class Excuse(StrEnum):
    """What explains a repeat."""

    IN_HANDS = "in the hands of a process that was killed"
    NOT_COMMITTED = "past the last commit of a daemon that was killed or lost its partitions"
    THAWED = "in the hands of a process that was frozen while its partition went to another"


class Excuses:
    """What was done in one storm, to ask what it explains."""

    def __init__(self, disturbances: Iterable[Disturbance], handlings: Sequence[Handling]) -> None:
        self._all = sorted(disturbances, key=lambda disturbance: disturbance.from_ns)
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

    def _died_holding(self, earlier: Handling) -> bool:
        """Whether it was the last of a process that was killed. A frozen one is killed when its partitions go, and so
        is one whose daemon is told twice to end."""
        if self._by_process[earlier.process][-1] is not earlier:
            return False
        stops = [d for d in self._all if d.kind is FaultKind.STOP and d.daemon == earlier.daemon]
        hurried = any(second.from_ns - first.from_ns < 2e9 for first, second in pairwise(stops))
        return hurried or any(
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

    def _uncommitted(self) -> Iterable[Disturbance]:
        """What keeps a daemon from committing what it has processed, and gives its partitions to another."""
        frozen_until: dict[int, tuple[int, int]] = {}
        for disturbance in self._all:
            daemon, role = disturbance.daemon, disturbance.role
            if disturbance.kind is FaultKind.KILL and role is Role.SUPERVISOR:
                yield disturbance
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
        """Whose handlings it leaves uncommitted, from when, until when. During an outage nothing was committed."""
        from_ns = disturbance.from_ns - int(COMMIT_SECONDS * 1e9)
        for outage in reversed(self._all):
            if outage.kind in _OUTAGES and outage.from_ns < disturbance.until_ns and outage.until_ns > from_ns:
                from_ns = min(from_ns, outage.from_ns - int(COMMIT_SECONDS * 1e9))
        return disturbance.daemon, from_ns, disturbance.until_ns
