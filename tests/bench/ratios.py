"""What the rows mean beside each other: kafkasrcd's figure, the peer's of the same run, and the goal."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from tests.bench.result import BenchResult


class Ratio(NamedTuple):
    """`figure` of the row `row` divided by that of the row `peer`; `goal` is a least or, with `at_most`, a most."""

    text: str
    row: str
    peer: str
    figure: Callable[[BenchResult], float]
    goal: float
    at_most: bool = False


def _throughput(result: BenchResult) -> float:
    return result.messages_per_second


def _cpu(result: BenchResult) -> float:
    return result.cpu_us_per_message


def _p99(result: BenchResult) -> float:
    return result.latency_p99_ms or 0.0


RATIOS = (
    Ratio("no-op messages/s, of the tuned loop's", "no-op", "raw-tuned", _throughput, 0.6),
    Ratio("no-op messages/s, of the default loop's", "no-op", "raw-default", _throughput, 3.0),
    Ratio("no-op CPU a message, of the tuned loop's", "no-op", "raw-tuned", _cpu, 2.2, at_most=True),
    Ratio("messages/s with work, of the loop's with the same work", "work", "raw-spin", _throughput, 1.8),
    Ratio("latency p99, of the poll() loop's", "latency", "raw-latency", _p99, 2.0, at_most=True),
)


def lines(results: Mapping[str, BenchResult]) -> list[str]:
    """A line for each ratio whose two rows were measured."""
    found: list[str] = []
    for ratio in RATIOS:
        if ratio.row in results and ratio.peer in results:
            value = ratio.figure(results[ratio.row]) / ratio.figure(results[ratio.peer])
            reached = value <= ratio.goal if ratio.at_most else value >= ratio.goal
            bound = "at most" if ratio.at_most else "at least"
            mark = "reached" if reached else "missed"
            found.append(f"{value:6.2f}  {ratio.text} (goal: {bound} {ratio.goal:g}, {mark})")
    return found
