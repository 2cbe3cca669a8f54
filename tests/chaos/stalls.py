"""How long nothing was handled although there was something to handle."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from tests.chaos.handling import Handling
from tests.ledger import Coordinate


def longest_stall_seconds(acknowledged_ns: Mapping[Coordinate, int], handlings: Iterable[Handling]) -> float:
    """The longest time in which no record at all was handled while one was waiting."""
    first_ns: dict[Coordinate, int] = {}
    # (when, how many more are waiting, whether a record was handled)
    events: list[tuple[int, int, bool]] = []
    for handling in handlings:
        known = first_ns.get(handling.coordinate)
        first_ns[handling.coordinate] = handling.at_ns if known is None else min(known, handling.at_ns)
        events.append((handling.at_ns, 0, True))
    for coordinate, at_ns in acknowledged_ns.items():
        handled_ns = first_ns.get(coordinate)
        if handled_ns is None or handled_ns > at_ns:  # a consumer may be faster than the acknowledgement
            events.append((at_ns, 1, False))
            if handled_ns is not None:
                events.append((handled_ns, -1, False))
    # At one moment: handled first, which ends a stall, and only then nothing waiting any more.
    events.sort(key=lambda event: (event[0], not event[2], event[1]))
    longest = waiting = since_ns = 0
    for at_ns, more, is_handling in events:
        if waiting and (is_handling or waiting + more == 0):
            longest = max(longest, at_ns - since_ns)
        if is_handling or not waiting:
            since_ns = at_ns
        waiting += more
    return longest / 1e9


def longest_stalls_by_partition(
    acknowledged_ns: Mapping[Coordinate, int], handlings: Iterable[Handling]
) -> dict[int, float]:
    """The same within each partition."""
    produced: defaultdict[int, dict[Coordinate, int]] = defaultdict(dict)
    for coordinate, at_ns in acknowledged_ns.items():
        produced[coordinate.partition][coordinate] = at_ns
    handled: defaultdict[int, list[Handling]] = defaultdict(list)
    for handling in handlings:
        handled[handling.coordinate.partition].append(handling)
    return {partition: longest_stall_seconds(produced[partition], handled[partition]) for partition in sorted(produced)}
