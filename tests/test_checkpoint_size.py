"""The size of transactions that get in each other's way."""

from kafkasrcd.workers.checkpoint_size import CheckpointSize

SECOND = 1_000_000_000


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> int:
        return int(self.seconds * SECOND)


def test_it_stays_as_configured_without_conflicts() -> None:
    size = CheckpointSize(10_000, Clock())
    size.committed()
    assert size.now == 10_000


def test_it_halves_what_there_was_and_never_ends() -> None:
    size = CheckpointSize(10_000, Clock())
    seen: list[int] = []
    for count in (40, 40, 7, 1, 1, 0):
        size.conflict(count)
        seen.append(size.now)
    assert seen == [20, 10, 3, 1, 1, 1]


def test_commits_do_not_let_it_grow_before_the_hold_is_over() -> None:
    clock = Clock()
    size = CheckpointSize(10_000, clock)
    size.conflict(8)
    for _ in range(1_000):
        size.committed()
    assert size.now == 4
    clock.seconds = 2.0
    size.committed()
    size.committed()
    assert size.now == 8


def test_conflicts_that_come_again_are_waited_out_longer() -> None:
    """Where a larger size always ends in a conflict, conflicts get rare: that is what the hold is for."""
    clock = Clock()
    size = CheckpointSize(10_000, clock)
    conflicts: list[float] = []
    while clock.seconds < 600:
        if size.now > 2:
            size.conflict(size.now)
            conflicts.append(clock.seconds)
            clock.seconds += 1
        else:
            size.committed()
            clock.seconds += 0.01
    assert len([at for at in conflicts if at > 60]) < 15


def test_it_is_as_configured_again_within_minutes() -> None:
    clock = Clock()
    size = CheckpointSize(1_000, clock)
    for _ in range(20):
        size.conflict(1)
    while size.now < 1_000:
        clock.seconds += 0.1
        size.committed()
    assert clock.seconds < 180
