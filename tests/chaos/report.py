"""What a storm came to: a line for the table, and all there is to say."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kafkasrcd.settings import CommitStrategy, Ordering

TABLE_HEAD = (
    "| seed | minutes | strategy | ordering | faults | messages | lost | repeated | letters | expected letters | sums "
    "| longest stall s |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
)
MOST_SHOWN = 20
"""Of each kind of finding; the rest is counted."""


class StormReport(NamedTuple):
    """`troubles` is empty where all that was promised was kept."""

    seed: int
    seconds: float
    strategy: CommitStrategy
    ordering: Ordering
    injected: Counter[str]
    messages: int
    lost: int
    repeated: Counter[str]
    """By what explains them."""
    letters: int
    letters_expected: int
    longest_stall_seconds: float
    stalls_by_partition: dict[int, float]
    sums: int
    """How often the counts of a partition were seen to add up."""
    alarms: dict[str, int]
    gave_up: int
    troubles: list[str]
    folder: Path

    @property
    def command(self) -> str:
        """What does the same again."""
        return (
            f"make chaos SEED={self.seed} MINUTES={self.seconds / 60:g} STRATEGY={self.strategy} "
            f"ORDERING={self.ordering}"
        )

    @property
    def table_row(self) -> str:
        """A line under `TABLE_HEAD`."""
        return (
            f"| {self.seed} | {self.seconds / 60:g} | {self.strategy} | {self.ordering} | {self.injected.total()} "
            f"| {self.messages:,} | {self.lost} | {self.repeated.total()} "
            f"| {self.letters} | {self.letters_expected} | {self.sums:,} | {self.longest_stall_seconds:.1f} |"
        )

    def lines(self) -> list[str]:
        """For people."""
        told = [
            f"seed {self.seed}, {self.seconds:g} s, {self.strategy}, order by {self.ordering}: "
            f"{self.messages:,} messages, {self.lost} lost, {self.repeated.total()} repeated, "
            f"{self.letters} dead letters of {self.letters_expected} expected",
            f"faults: {_counts(self.injected)}",
            f"repeats: {_counts(self.repeated)}",
            f"longest stall {self.longest_stall_seconds:.1f} s; by partition: "
            + ", ".join(f"{partition}: {seconds:.1f}" for partition, seconds in self.stalls_by_partition.items()),
            f"the counts of a partition were compared {self.sums:,} times",
            f"logged: {_counts(self.alarms)}",
        ]
        if self.gave_up:
            told.append(f"{self.gave_up} times a daemon ended since something was not reachable, and was started again")
        if self.troubles:
            told += [f"FAILED: {trouble}" for trouble in self.troubles]
            told += [f"logs: {self.folder}", f"again: {self.command}"]
        return told


def shortened(what: str, found: Sequence[object]) -> list[str]:
    """One trouble for all of `found`, with the first of them; none where it is empty."""
    if not found:
        return []
    shown = [f"\n    {one}" for one in found[:MOST_SHOWN]]
    more = f"\n    and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
    return [f"{len(found)} {what}:{''.join(shown)}{more}"]


def _counts(counts: Counter[str] | dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{count} {name}" for name, count in ordered) or "none"
