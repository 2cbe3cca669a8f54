"""One fault of a storm: what, to whom, and when. Nothing in it depends on a run, so that a replay does the same."""

from enum import StrEnum
from typing import NamedTuple


class FaultKind(StrEnum):
    """What is done. Daemons are `daemon a`, `daemon b`, …; brokers are numbered."""

    START = "start a daemon"
    STOP = "SIGTERM a daemon"
    KILL = "SIGKILL a process"
    FREEZE = "SIGSTOP a process"
    FREEZE_DAEMON = "SIGSTOP a daemon"
    KILL_BROKER = "SIGKILL a broker"
    STOP_BROKER = "stop a broker"
    RESTART_STORE = "restart the store"
    CRASH_STORE = "crash the store"
    CUT_STORE = "cut the store's connections"
    ADD_PARTITION = "add a partition"


class Lane(StrEnum):
    """Faults of one lane follow each other; those of different lanes overlap."""

    DAEMON = "daemon"
    """One for each of them."""
    BROKERS = "brokers"
    STORE = "store"


class Role(StrEnum):
    """A process of a daemon."""

    SUPERVISOR = "supervisor"
    FORK_SERVER = "fork server"
    WORKER = "worker"
    HANDLER = "handler"


LANE_OF = {
    FaultKind.START: Lane.DAEMON,
    FaultKind.STOP: Lane.DAEMON,
    FaultKind.KILL: Lane.DAEMON,
    FaultKind.FREEZE: Lane.DAEMON,
    FaultKind.FREEZE_DAEMON: Lane.DAEMON,
    FaultKind.KILL_BROKER: Lane.BROKERS,
    FaultKind.STOP_BROKER: Lane.BROKERS,
    FaultKind.RESTART_STORE: Lane.STORE,
    FaultKind.CRASH_STORE: Lane.STORE,
    FaultKind.CUT_STORE: Lane.STORE,
    # While all brokers are up: a new partition wants a replica on each.
    FaultKind.ADD_PARTITION: Lane.BROKERS,
}


class Fault(NamedTuple):
    """`target` is a daemon's or a broker's number. `nth` picks among the processes of the role, by partition or slot
    and modulo how many there are then. `lasts_seconds` is until it is undone: thawed, or started again."""

    at_seconds: float
    kind: FaultKind
    target: int = 0
    role: Role | None = None
    nth: int = 0
    lasts_seconds: float = 0.0

    @property
    def lane(self) -> tuple[Lane, int]:
        """Which of them it is in, and of which daemon."""
        lane = LANE_OF[self.kind]
        return lane, self.target if lane is Lane.DAEMON else 0

    def __str__(self) -> str:
        words = [f"{self.at_seconds:6.1f} s  {self.kind}"]
        if self.lane[0] is Lane.DAEMON:
            words.append(daemon_name(self.target))
        elif self.kind in (FaultKind.KILL_BROKER, FaultKind.STOP_BROKER):
            words.append(str(self.target))
        if self.role is not None:
            words.append(f"({self.role} {self.nth})" if self.role in (Role.WORKER, Role.HANDLER) else f"({self.role})")
        if self.lasts_seconds:
            words.append(f"for {self.lasts_seconds:.1f} s")
        return " ".join(words)


def daemon_name(number: int) -> str:
    """`a`, `b`, …: as in the names of its log and its socket."""
    return chr(ord("a") + number)
