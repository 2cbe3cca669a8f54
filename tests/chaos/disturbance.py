"""What was really done to the processes, and when: what repeats are explained with."""

from typing import NamedTuple

from tests.chaos.fault import FaultKind, Role


class Disturbance(NamedTuple):
    """A fault that was injected, from before its beginning to after its end (CLOCK_MONOTONIC).

    `daemon` is None where it concerns all of them. `pids` are the processes that were killed, died with those, or were
    frozen.
    """

    kind: FaultKind
    daemon: int | None
    role: Role | None
    from_ns: int
    until_ns: int
    pids: frozenset[int] = frozenset()
