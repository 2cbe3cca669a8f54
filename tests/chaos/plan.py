"""The plan of a storm: which faults, when. Drawn from the seed alone, before anything is started."""

import random
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from tests.chaos.fault import Fault, FaultKind, Role

K = TypeVar("K")

BROKERS = 3
PARTITIONS = 6
SESSION_TIMEOUT_SECONDS = 6.0
"""Of the daemons' membership. Freezes are well below or well above it: near it, either is right."""
SHORT_FREEZE_SECONDS = (0.3, 4.0)
LONG_FREEZE_SECONDS = (8.0, 14.0)
SHORT_SECONDS = 60.0
"""A shorter storm adds no partitions: librdkafka 2.16 puts a member out of action that hears of new ones while its
application is giving others back. It never joins again, and its daemon does not know."""

_ROLES = {Role.SUPERVISOR: 2, Role.FORK_SERVER: 2, Role.WORKER: 4, Role.HANDLER: 4}
_DAEMON_KINDS = {FaultKind.KILL: 6, FaultKind.FREEZE: 3, FaultKind.FREEZE_DAEMON: 2, FaultKind.STOP: 3}
_STORE_KINDS = {FaultKind.RESTART_STORE: 2, FaultKind.CRASH_STORE: 2, FaultKind.CUT_STORE: 3}


class Plan(NamedTuple):
    """`faults` are in the order of their times."""

    seed: int
    seconds: float
    daemons: int
    faults: tuple[Fault, ...]


def draw_plan(seed: int, seconds: float) -> Plan:
    """The storm of `seed`: the same for the same arguments, on every machine."""
    draw = random.Random(seed)
    daemons = draw.choice((2, 3))
    # Each lane has a generator of its own: a change to one leaves the others' faults as they were.
    lanes: list[Callable[[random.Random, float], list[Fault]]] = [_brokers, _store, _topic]
    faults: list[Fault] = []
    for lane in lanes:
        faults += lane(random.Random(draw.getrandbits(64)), seconds)
    for daemon in range(daemons):
        faults += _daemon(random.Random(draw.getrandbits(64)), seconds, daemon)
    return Plan(seed, seconds, daemons, tuple(sorted(faults, key=lambda fault: fault.at_seconds)))


def _daemon(draw: random.Random, seconds: float, number: int) -> list[Fault]:
    """What happens to one daemon: it is started again some time after it was told to end or its supervisor killed."""
    faults: list[Fault] = []
    at = draw.uniform(0.5, 5.0)
    while at < seconds:
        kind = _weighted(draw, _DAEMON_KINDS)
        role = _weighted(draw, _ROLES) if kind in (FaultKind.KILL, FaultKind.FREEZE) else None
        lasts = _freeze_seconds(draw) if kind in (FaultKind.FREEZE, FaultKind.FREEZE_DAEMON) else 0.0
        faults.append(Fault(at, kind, number, role, draw.randrange(60), lasts))
        if kind is FaultKind.STOP or (kind is FaultKind.KILL and role is Role.SUPERVISOR):
            if kind is FaultKind.STOP and draw.random() < 0.4:
                # While it drains: an impatient operator, or one more death.
                again = draw.choice((FaultKind.STOP, FaultKind.KILL))
                role = _weighted(draw, _ROLES) if again is FaultKind.KILL else None
                faults.append(Fault(at + draw.uniform(0.05, 0.5), again, number, role, draw.randrange(60)))
            at += draw.uniform(0.6, 9.0)
            faults.append(Fault(at, FaultKind.START, number))
            at += 1.0
        at += 0.2 + draw.expovariate(1 / 5.0)
    return [fault for fault in faults if fault.at_seconds < seconds]


def _brokers(draw: random.Random, seconds: float) -> list[Fault]:
    faults: list[Fault] = []
    at = draw.uniform(4.0, 12.0)
    while at < seconds:
        kind = draw.choice((FaultKind.KILL_BROKER, FaultKind.STOP_BROKER))
        down = draw.uniform(0.2, 7.0)
        faults.append(Fault(at, kind, draw.randrange(BROKERS), lasts_seconds=down))
        # The next waits until every replica is in sync again, however long that takes.
        at += down + draw.uniform(8.0, 20.0)
    return faults


def _store(draw: random.Random, seconds: float) -> list[Fault]:
    faults: list[Fault] = []
    at = draw.uniform(5.0, 14.0)
    while at < seconds:
        kind = _weighted(draw, _STORE_KINDS)
        down = 0.0 if kind is FaultKind.CUT_STORE else draw.choice((draw.uniform(0.0, 1.5), draw.uniform(3.0, 9.0)))
        faults.append(Fault(at, kind, lasts_seconds=down))
        at += down + draw.uniform(5.0, 15.0)
    return faults


def _topic(draw: random.Random, seconds: float) -> list[Fault]:
    if seconds < SHORT_SECONDS:
        return []
    times = [draw.uniform(0.2, 0.8) * seconds for _ in range(draw.choice((1, 2)))]
    return [Fault(at, FaultKind.ADD_PARTITION) for at in sorted(times)]


def _freeze_seconds(draw: random.Random) -> float:
    return draw.uniform(*draw.choice((SHORT_FREEZE_SECONDS, SHORT_FREEZE_SECONDS, LONG_FREEZE_SECONDS)))


def _weighted(draw: random.Random, weights: dict[K, int]) -> K:
    return draw.choices(list(weights), list(weights.values()))[0]
