"""The proof: what handlers did, held against what the producer had acknowledged."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

from kafkasrcd.settings import Ordering
from tests.chaos.handling import Handling
from tests.chaos.payment import Payment
from tests.ledger import Coordinate


class Verdict(NamedTuple):
    """`repeats` has each handling that was not the record's last, with the one that came after it."""

    lost: list[Coordinate | Payment]
    """Neither handled nor a dead letter; a payment, where nobody knows its place."""
    both: list[Coordinate]
    """Handled, and a dead letter too."""
    foreign: list[Coordinate]
    """Handled or a dead letter, and never acknowledged."""
    altered: list[str]
    """Handled with another content than was produced."""
    disorder: list[str]
    repeats: list[tuple[Handling, Handling]]


def judge(
    produced: Mapping[Coordinate, Payment],
    handlings: Iterable[Handling],
    ordering: Ordering,
    unplaced: Mapping[int, Payment] = MappingProxyType({}),
    letters: Mapping[Coordinate, Payment] = MappingProxyType({}),
) -> Verdict:
    """Compare; `ordering` says which records had to be handled in the order of their offsets. `unplaced`, by number:
    produced too, with an offset that nobody knows. `letters`: what has a dead letter."""
    times: defaultdict[Coordinate, list[Handling]] = defaultdict(list)
    altered: list[str] = []
    for handling in sorted(handlings, key=lambda handling: handling.order):
        times[handling.coordinate].append(handling)
        payment = produced.get(handling.coordinate)
        if payment is not None and payment != handling.payment:
            altered.append(f"{handling.coordinate} is {payment} and was handled as {handling.payment}")
    seen = {**letters, **{where: all_times[0].payment for where, all_times in times.items()}}
    unknown = {where: seen[where] for where in seen.keys() - produced.keys()}
    found = {payment.number for payment in unknown.values() if unplaced.get(payment.number) == payment}
    return Verdict(
        lost=[
            *sorted(produced.keys() - seen.keys()),
            *(payment for number, payment in sorted(unplaced.items()) if number not in found),
        ],
        both=sorted(times.keys() & letters.keys()),
        foreign=sorted(where for where, payment in unknown.items() if payment.number not in found),
        altered=altered,
        disorder=_disorder([all_times[0] for all_times in times.values()], ordering),
        repeats=[pair for all_times in times.values() for pair in pairwise(all_times)],
    )


def differences(expected: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """The accounts whose totals differ."""
    return [
        f"{account} has {found.get(account, 0)} and was paid {expected.get(account, 0)}"
        for account in sorted(expected.keys() | found.keys())
        if found.get(account, 0) != expected.get(account, 0)
    ]


def _disorder(firsts: Sequence[Handling], ordering: Ordering) -> list[str]:
    """Nothing may be handled for the first time before all that comes before it; a repeat is another matter."""
    units: defaultdict[tuple[object, ...], list[Handling]] = defaultdict(list)
    for first in firsts:
        by_key = (first.payment.account,) if ordering is Ordering.KEY else ()
        units[(first.coordinate.partition, *by_key)].append(first)
    found: list[str] = []
    for unit in units.values():
        unit.sort(key=lambda first: first.coordinate)
        found += [
            f"{after.coordinate} was handled before {before.coordinate}: by {after.process} of daemon {after.daemon} "
            f"and {before.process} of daemon {before.daemon}, {(before.at_ns - after.at_ns) / 1e9:.3f} s earlier"
            for before, after in pairwise(unit)
            if after.order <= before.order
        ]
    return found
