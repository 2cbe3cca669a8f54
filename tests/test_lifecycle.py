"""The states of a partition: every edge of the table, and none besides."""

from itertools import product
from pathlib import Path

import pytest

from kafkasrcd.daemon.lifecycle import ENDED, TRANSITIONS, WORKING, IllegalTransition, State, as_mermaid, transition

EDGES = {(source, target) for source, targets in TRANSITIONS.items() for target in targets}


@pytest.mark.parametrize(("source", "target"), list(product(State, State)))
def test_only_the_tables_edges_are_possible(source: State, target: State) -> None:
    if (source, target) in EDGES:
        assert transition(source, target) is target
    else:
        with pytest.raises(IllegalTransition, match=f"{source} to {target}"):
            transition(source, target)


def test_every_state_is_reached_and_ends() -> None:
    def reachable(start: State) -> set[State]:
        found, new = {start}, {start}
        while new:
            new = {target for source in new for target in TRANSITIONS[source]} - found
            found |= new
        return found

    assert reachable(State.CLAIMING) == set(State)
    for state in State:
        assert State.RELEASED in reachable(state)


def test_it_can_be_lost_at_any_time() -> None:
    """Until it is given back: the group asks nobody."""
    assert {source for source, target in EDGES if target is State.LOST} == set(State) - ENDED


def test_what_ends_does_not_work_again() -> None:
    for state in ENDED:
        assert not TRANSITIONS[state] & WORKING


def test_the_design_shows_this_graph() -> None:
    assert as_mermaid() in (Path(__file__).parent.parent / "DESIGN.md").read_text()
