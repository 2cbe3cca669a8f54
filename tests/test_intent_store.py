"""The intents' store, the same on both databases, and as the daemon sees it."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import create_engine, text

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.storage.intent_store import IntentStore
from kafkasrcd.storage.intents import Intent, IntentKind, Scope
from kafkasrcd.storage.offset_store import OffsetStore, TopicPartition
from kafkasrcd.storage.opening import MEMORY_URL, open_intents, open_store
from tests.postgres import PostgresServer

PAUSE = IntentKind.PAUSE
EVERYTHING = Scope()
ORDERS = Scope("orders")
THIRD = Scope("orders", 3)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        return server.url(server.create_database())
    return f"sqlite:///{tmp_path / 'offsets.db'}"


@pytest.fixture
def store(url: str) -> Iterator[IntentStore]:
    store = open_intents(url, "billing", 5_000)
    yield store
    store.close()


def pause(scope: Scope, by: str = "alice@a", *, at_ms: int = 1_000) -> Intent:
    return Intent(kind=PAUSE, scope=scope, set_by=by, set_ms=at_ms, reason="a bad deploy")


def test_an_intent_is_found_as_it_was_set(store: IntentStore) -> None:
    wanted = [pause(EVERYTHING), pause(ORDERS), msgspec.structs.replace(pause(THIRD), value="40/s")]
    store.set(reversed(wanted))
    assert store.intents() == wanted


def test_the_last_word_about_a_scope_counts(store: IntentStore) -> None:
    store.set([pause(THIRD), pause(THIRD, "bob@b", at_ms=2_000)])
    assert store.intents() == [pause(THIRD, "bob@b", at_ms=2_000)]


def test_taking_back_takes_the_parts_along_and_nothing_around(store: IntentStore) -> None:
    fourth, bills = Scope("orders", 4), Scope("bills", 3)
    store.set(map(pause, (EVERYTHING, ORDERS, THIRD, fourth, bills)))
    assert store.clear(PAUSE, [THIRD]) == [pause(THIRD)]
    assert store.clear(PAUSE, [THIRD]) == []
    assert store.clear(PAUSE, [ORDERS]) == [pause(ORDERS), pause(fourth)]
    assert store.intents() == [pause(EVERYTHING), pause(bills)]
    assert store.clear(PAUSE, [EVERYTHING]) == [pause(EVERYTHING), pause(bills)]


def test_intents_are_the_groups_own(url: str, store: IntentStore) -> None:
    other = open_intents(url, "audit", 5_000)
    store.set([pause(ORDERS)])
    assert other.intents() == other.clear(PAUSE, [EVERYTHING]) == []
    assert store.intents() == [pause(ORDERS)]
    other.close()


def test_what_a_later_kafkasrcd_tells_is_not_heard(url: str, store: IntentStore) -> None:
    store.set([pause(ORDERS)])
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE kafkasrcd_intents SET kind = 'hurry'"))
    engine.dispose()
    assert store.intents() == []


def test_the_partitions_of_the_group_are_known_once_they_were_claimed(url: str, store: IntentStore) -> None:
    name = TopicPartition("orders", 3)
    assert store.partitions() == []
    offsets = open_store(url, "billing", 5_000)
    offsets.claim([name], "a:1")
    offsets.close()
    assert store.partitions() == [name]


@pytest.fixture
def offsets(url: str) -> Iterator[OffsetStore]:
    store = open_store(url, "billing", 5_000)
    yield store
    store.close()


def test_the_daemon_sees_them_and_does_not_take_a_persons_place(store: IntentStore, offsets: OffsetStore) -> None:
    store.set([pause(THIRD)])
    offsets.set_intent(pause(THIRD, "breaker"))
    offsets.set_intent(pause(Scope("orders", 4), "breaker"))
    assert offsets.intents() == store.intents() == [pause(THIRD), pause(Scope("orders", 4), "breaker")]


def test_memory_keeps_those_of_its_own_process_and_has_no_place_for_others() -> None:
    offsets = open_store(MEMORY_URL, "billing", 5_000)
    offsets.set_intent(pause(THIRD, "breaker"))
    offsets.set_intent(pause(THIRD, "breaker", at_ms=2_000))
    assert offsets.intents() == [pause(THIRD, "breaker")]
    with pytest.raises(ConfigurationError, match="memory://"):
        open_intents(MEMORY_URL, "billing", 5_000)


def test_scopes_are_written_as_the_commands_take_them() -> None:
    assert [str(scope) for scope in THIRD.around()] == ["orders:3", "orders", "--all"]
    assert [str(scope) for scope in EVERYTHING.around()] == ["--all"]
