"""The dead letters' store, the same on both databases."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.storage.dead_letter_store import DeadLetterStore
from kafkasrcd.storage.dead_letters import MOST_TEXT, DeadLetter, LetterCount, LetterFilter, LetterState, as_text
from kafkasrcd.storage.opening import open_dead_letters
from tests.postgres import PostgresServer


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        return server.url(server.create_database())
    return f"sqlite:///{tmp_path / 'offsets.db'}"


@pytest.fixture
def store(url: str) -> Iterator[DeadLetterStore]:
    store = open_dead_letters(url, "billing", 5_000)
    yield store
    store.close()


def letter(offset: int, *, topic: str = "orders", error: str = "ValueError", at_ms: int = 1_000) -> DeadLetter:
    return DeadLetter(
        topic=topic,
        partition=3,
        offset=offset,
        timestamp_ms=-1,
        key=b"\x00key",
        value=b"\xff\x00value",
        headers=None,
        value_format="json",
        error=error,
        reason="no luck",
        attempts=4,
        first_failed_ms=at_ms,
        last_failed_ms=at_ms,
        host="a",
        version="1",
    )


def test_a_letter_is_found_as_it_was_buried(store: DeadLetterStore) -> None:
    whole = letter(7)
    bare = msgspec.structs.replace(whole, key=None, value=None, offset=2**62)
    for each in (whole, bare):
        store.bury(each)
    found = list(store.find(LetterFilter()))
    assert [each.letter for each in found] == [whole, bare]
    assert [each.state for each in found] == [LetterState.OPEN] * 2


def test_a_record_has_one_letter(store: DeadLetterStore) -> None:
    store.bury(letter(7, at_ms=1_000))
    (first,) = store.find(LetterFilter())
    assert store.change(first.id, [LetterState.OPEN], LetterState.REPLAYED, by="me")
    store.bury(letter(7, at_ms=2_000, error="KeyError"))
    (again,) = store.find(LetterFilter())
    assert (again.id, again.state, again.note, again.changed_by) == (first.id, LetterState.OPEN, "", "")
    assert (again.letter.error, again.letter.first_failed_ms, again.letter.last_failed_ms) == ("KeyError", 1_000, 2_000)


def test_letters_are_the_groups_own(url: str, store: DeadLetterStore) -> None:
    other = open_dead_letters(url, "audit", 5_000)
    store.bury(letter(7))
    other.bury(letter(7))
    (mine,) = store.find(LetterFilter())
    assert not other.change(mine.id, [LetterState.OPEN], LetterState.DISCARDED, by="me")
    assert store.count(LetterFilter()) == other.count(LetterFilter()) == 1
    other.close()


def test_what_is_asked_for(store: DeadLetterStore) -> None:
    for each in (letter(1), letter(2, topic="bills"), letter(3, error="KeyError"), letter(4, at_ms=9_000)):
        store.bury(each)
    ids = [each.id for each in store.find(LetterFilter())]

    def offsets(wanted: LetterFilter, most: int | None = None) -> list[int]:
        found = [each.letter.offset for each in store.find(wanted, most)]
        assert most is not None or store.count(wanted) == len(found)
        return found

    assert offsets(LetterFilter(), 2) == [1, 2]
    assert offsets(LetterFilter(topic="bills")) == [2]
    assert offsets(LetterFilter(partition=4)) == []
    assert offsets(LetterFilter(error="KeyError")) == [3]
    assert offsets(LetterFilter(since_ms=9_000)) == [4]
    assert offsets(LetterFilter(ids=(ids[0], ids[2], 10_000))) == [1, 3]
    assert offsets(LetterFilter(states=(LetterState.DISCARDED,))) == []
    assert store.counts(LetterState.OPEN) == [
        LetterCount("orders", "ValueError", 2),
        LetterCount("bills", "ValueError", 1),
        LetterCount("orders", "KeyError", 1),
    ]


def test_many_are_read_in_pages(store: DeadLetterStore) -> None:
    for offset in range(250):
        store.bury(letter(offset))
    assert [each.letter.offset for each in store.find(LetterFilter())] == list(range(250))
    assert len(list(store.find(LetterFilter(), 101))) == 101


def test_of_two_who_change_a_letter_one_does(store: DeadLetterStore) -> None:
    store.bury(letter(7))
    (found,) = store.find(LetterFilter())
    assert store.change(found.id, [LetterState.OPEN], LetterState.DISCARDED, by="ops", note="a test order")
    assert not store.change(found.id, [LetterState.OPEN], LetterState.REPLAYING, by="ops")
    (found,) = store.find(LetterFilter(states=(LetterState.DISCARDED,)))
    assert (found.changed_by, found.note) == ("ops", "a test order")
    assert store.counts(LetterState.OPEN) == []


def test_no_text_is_refused(store: DeadLetterStore) -> None:
    """PostgreSQL takes no NUL, and neither database a lone surrogate."""
    said = as_text("a\0b\ud800c" + "x" * MOST_TEXT * 2)
    assert said.startswith("a\\x00b\\ud800c")
    whole = letter(7)
    store.bury(msgspec.structs.replace(whole, reason=said))
    (found,) = store.find(LetterFilter())
    assert found.letter.reason == said
    assert len(said) < MOST_TEXT + 10


def test_memory_keeps_none() -> None:
    with pytest.raises(ConfigurationError, match="dead_letter_topic"):
        open_dead_letters("memory://", "billing", 5_000)
