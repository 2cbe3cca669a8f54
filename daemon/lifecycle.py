"""The states of an assigned partition, and the only way from one to another.

Imports nothing of the program, so that everything may import it.
"""

from enum import StrEnum


class State(StrEnum):
    """Where a partition is between its assignment and its release."""

    CLAIMING = "claiming"
    """Assigned; its epoch and start offset are being fetched."""
    STARTING = "starting"
    """Its worker is coming up, for the first time or again."""
    RUNNING = "running"
    PAUSED = "paused"
    """Assigned, claimed and healthy, but told not to go on."""
    DRAINING = "draining"
    """No further record is started; what a handler holds is being finished, then recorded."""
    FAILED = "failed"
    """Standing still until someone looks; what was processed is recorded."""
    LOST = "lost"
    """The group has given it to another member already; nothing is recorded any more."""
    RELEASED = "released"
    """Given back. The end."""


TRANSITIONS: dict[State, frozenset[State]] = {
    State.CLAIMING: frozenset({State.STARTING, State.DRAINING, State.FAILED, State.LOST}),
    State.STARTING: frozenset({State.RUNNING, State.PAUSED, State.DRAINING, State.FAILED, State.LOST}),
    State.RUNNING: frozenset({State.STARTING, State.PAUSED, State.DRAINING, State.FAILED, State.LOST}),
    State.PAUSED: frozenset({State.RUNNING, State.STARTING, State.DRAINING, State.FAILED, State.LOST}),
    # Back to claiming: it stays assigned, and starts anew at another offset, with another ring or with a new claim.
    State.DRAINING: frozenset({State.RELEASED, State.CLAIMING, State.LOST}),
    State.FAILED: frozenset({State.DRAINING, State.LOST}),
    State.LOST: frozenset({State.RELEASED}),
    State.RELEASED: frozenset(),
}

WORKING = frozenset({State.STARTING, State.RUNNING, State.PAUSED})
"""It has memory and a worker, or is about to have one again; its lease is extended unless it is paused."""
ENDED = frozenset({State.LOST, State.RELEASED})
"""Nothing of it is recorded any more."""


class IllegalTransition(AssertionError):
    """A defect: the program tried an edge that the table does not have."""


def transition(current: State, target: State) -> State:
    """``target``, where the table has the edge from ``current``; the one function that changes a state."""
    if target not in TRANSITIONS[current]:
        raise IllegalTransition(f"no way from {current} to {target}")
    return target


def as_mermaid() -> str:
    """The graph, for the documentation."""
    edges = [
        f"    {source} --> {target}" for source, targets in TRANSITIONS.items() for target in State if target in targets
    ]
    return "\n".join(["stateDiagram-v2", "    [*] --> claiming", *edges, "    released --> [*]"])
