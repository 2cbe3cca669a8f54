"""The dead letters of a storm, and whether they are those that there must be."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kafkasrcd.storage.dead_letters import DeadLetter, LetterFilter, LetterState, StoredLetter
from kafkasrcd.storage.opening import open_dead_letters
from tests.chaos.excuses import Excuses
from tests.chaos.payment import DIED, LETTER_ERRORS, Payment
from tests.chaos.report import shortened
from tests.ledger import Coordinate


class Letters(NamedTuple):
    """`payments` has what each letter is of; the others are findings, for people."""

    payments: dict[Coordinate, Payment]
    missing: list[Coordinate | Payment]
    """A flaw that nothing but a letter can come of, and none; a payment, where nobody knows its place."""
    foreign: list[str]
    """Of bytes that nobody has produced, there."""
    wrong: list[str]
    """With another error, key or state than it must have, or one of two of the same record."""
    undeserved: list[str]
    """Of a payment that is good."""
    quarantined: list[StoredLetter]
    """Of a payment that is good, and in whose handling processes died."""


def letters_in_store(url: str, group: str) -> list[StoredLetter]:
    """All of them, in the order in which they were first kept."""
    store = open_dead_letters(url, group, 5_000)
    try:
        return list(store.find(LetterFilter()))
    finally:
        store.close()


def judge_letters(
    produced: Mapping[Coordinate, Payment], letters: Iterable[StoredLetter], unplaced: Iterable[Payment] = ()
) -> Letters:
    """Compare. A letter is known by its value, which no two payments have in common. `unplaced`: produced too, with an
    offset that nobody knows."""
    by_value: dict[bytes | None, tuple[Payment, Coordinate | None]] = {
        payment.value: (payment, where) for where, payment in produced.items()
    }
    by_value |= {payment.value: (payment, None) for payment in unplaced}
    found = Letters({}, [], [], [], [], [])
    times: Counter[Payment] = Counter()
    for stored in letters:
        letter = stored.letter
        where = Coordinate(letter.partition, letter.offset)
        payment, placed = by_value.get(letter.value, (None, None))
        said = f"{where}: {letter.error}: {letter.reason}"
        if payment is None or placed not in (None, where):
            found.foreign.append(f"{said}: {letter.value!r}")
            continue
        found.payments[where] = payment
        times[payment] += 1
        if letter.key != payment.key or stored.state is not LetterState.OPEN or times[payment] > 1:
            found.wrong.append(f"{said}, key {letter.key!r}, {stored.state}: letter {times[payment]} of {payment}")
        if payment.flaw in LETTER_ERRORS:
            if letter.error != LETTER_ERRORS[payment.flaw]:
                found.wrong.append(f"{said}, for {payment}")
        elif letter.error == DIED:
            found.quarantined.append(stored)
        else:
            found.undeserved.append(f"{said}, for {payment}")
    found.missing.extend(
        where or payment for payment, where in by_value.values() if payment.flaw in LETTER_ERRORS and not times[payment]
    )
    return found


def letter_troubles(letters: Letters, both: Iterable[Coordinate], excuses: Excuses, *, undone: bool) -> list[str]:
    """What is wrong with them. `both` are handled too, which one may be that was done when its process was killed,
    unless such a thing is `undone`."""
    innocent = {Coordinate(each.letter.partition, each.letter.offset) for each in letters.quarantined}
    return [
        *shortened("handled and dead-lettered too", [where for where in both if undone or where not in innocent]),
        *shortened("without the dead letter that they must have", letters.missing),
        *shortened("dead letters of what was never produced", letters.foreign),
        *shortened("dead letters that say something else than they must", letters.wrong),
        *shortened("dead letters of good payments", letters.undeserved),
        *shortened(
            "dead letters of good payments that were blamed for deaths which no fault explains",
            [each for each in letters.quarantined if not _explains(excuses, each.letter)],
        ),
    ]


def _explains(excuses: Excuses, letter: DeadLetter) -> bool:
    wall_minus_monotonic_ns = time.time_ns() - time.monotonic_ns()
    return excuses.of_quarantine(letter.attempts, letter.last_failed_ms * 1_000_000 - wall_minus_monotonic_ns)
