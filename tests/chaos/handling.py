"""What handlers did: one entry a record and time, however it was kept."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.chaos.payment import Flaw, Payment
from tests.ledger import Coordinate


class Handling(NamedTuple):
    """A record, handled once. `order` grows from one handling to the next: of any two it says which came first.

    `process` is the process's own name, of `daemon`; `at_ns` is CLOCK_MONOTONIC.
    """

    coordinate: Coordinate
    payment: Payment
    order: int
    at_ns: int
    daemon: int
    pid: int
    process: str


def handlings_in_files(folders: Mapping[int, Path]) -> list[Handling]:
    """What `handlers.append` wrote into the folder of each daemon, in the order of the clock."""
    return sorted(_from_files(folders), key=lambda handling: handling.order)


def _from_files(folders: Mapping[int, Path]) -> Iterable[Handling]:
    for daemon, folder in folders.items():
        for path in folder.glob("payments-*"):
            pid = int(path.name.split("-")[1])
            for line in path.read_text().splitlines():
                partition, offset, account, number, amount, flaw, at_ns = line.split()
                yield Handling(
                    Coordinate(int(partition), int(offset)),
                    Payment(int(number), account, int(amount), Flaw(flaw)),
                    int(at_ns),
                    int(at_ns),
                    daemon,
                    pid,
                    path.name,
                )
