"""Records put aside and letters replayed, on a real broker: whoever has their partition handles them, once."""

import os
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

import orjson
import psutil
import pytest

from kafkasrcd.storage.dead_letters import LetterFilter, StoredLetter
from kafkasrcd.storage.opening import open_dead_letters
from tests.daemon_process import COMMAND, QUICK_SESSION, DaemonProcess
from tests.kafka_cluster import KafkaCluster, Record
from tests.ledger import Coordinate, Ledger
from tests.postgres import PostgresServer
from tests.test_strategies import Effects
from tests.waiting import wait_until

DEADLINE_SECONDS = 40.0
PLAIN = orjson.dumps({})
NEEDY = orjson.dumps({"needs": "bank"})


@pytest.fixture
def topic(kafka: KafkaCluster, topic_name: str) -> str:
    kafka.create_topic(topic_name, partitions=2)
    return topic_name


class Shop:
    """Daemons of one group, their store, and the command that replays."""

    def __init__(self, kafka: KafkaCluster, topic: str, folder: Path, url: str = "", *, on_checkpoint: bool = False):
        self.kafka, self.topic, self.folder = kafka, topic, folder
        self.url = url or f"sqlite:///{folder / 'offsets.db'}"
        self.on_checkpoint = on_checkpoint

    def daemon(self, handler: str, *settings: str, name: str = "a") -> DaemonProcess:
        whole = (*QUICK_SESSION, f"store.url={self.url}", "retry_backoff_ms=1", *settings)
        if self.on_checkpoint:
            whole = (*whole, "commit_strategy=on_checkpoint")
        target = f"tests.redelivery_handlers:{handler}"
        return DaemonProcess(self.folder, self.kafka.bootstrap, self.topic, target, name=name, settings=whole)

    def produce(self, values: Iterable[bytes], partition: int = 0) -> None:
        self.kafka.produce(self.topic, [Record(partition, b"key", value) for value in values])

    def letters(self) -> list[StoredLetter]:
        store = open_dead_letters(self.url, self.topic, 5_000, shared_with_effects=self.on_checkpoint)
        try:
            return list(store.find(LetterFilter()))
        finally:
            store.close()

    def states(self) -> dict[Coordinate, str]:
        return {Coordinate(each.letter.partition, each.letter.offset): each.state.value for each in self.letters()}

    def mend(self) -> None:
        """What records depend on is there again."""
        (self.folder / "bank").touch()

    def replay(self, *arguments: str) -> "subprocess.Popen[str]":
        settings = [f"brokers={self.kafka.bootstrap}", f"group_id={self.topic}", f"topics={self.topic}"]
        settings += [f"store.url={self.url}", "handler.target=a:b"]
        if self.on_checkpoint:
            settings.append("commit_strategy=on_checkpoint")
        words = [word for setting in settings for word in ("-s", setting)]
        return subprocess.Popen(
            [COMMAND, "dead-letters", "replay", *words, *arguments],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_states(self, expected: dict[Coordinate, str]) -> None:
        wait_until(lambda: self.states() == expected, DEADLINE_SECONDS, "the letters", seen=self.states)


@pytest.fixture
def shop(kafka: KafkaCluster, topic: str, tmp_path: Path) -> Shop:
    return Shop(kafka, topic, tmp_path)


def _all(partition: int, count: int) -> set[Coordinate]:
    return {Coordinate(partition, offset) for offset in range(count)}


@pytest.mark.parametrize("handler", ["handle", "handle_async"])
def test_a_partition_goes_on_while_records_wait_and_they_are_handled_at_their_time(shop: Shop, handler: str) -> None:
    shop.produce([PLAIN, NEEDY, PLAIN, NEEDY, PLAIN])
    settings = ("handler.retry=scheduled", "max_retries=1000", "retry_backoff_max_ms=300")
    with shop.daemon(handler, *settings) as daemon:
        status = daemon.wait_caught_up({0: 5, 1: 0})
        first = status.partitions[0]
        assert (first.messages, first.succeeded, first.scheduled, first.dead_lettered) == (5, 3, 2, 0)
        assert set(shop.states().values()) == {"retrying"}
        shown = daemon.wait_status(lambda status: status.retrying, "the waiting records to be shown")
        assert [(each.topic, each.error, each.count) for each in shown.retrying] == [(shop.topic, "ConnectionError", 2)]
        assert shown.dead_letters == []
        shop.mend()
        daemon.wait_status(lambda status: status.partitions[0].redelivered == 2, "both to be handled")
        assert daemon.terminate() == 0
    assert shop.states() == {}
    assert Ledger(shop.folder).counts == dict.fromkeys(_all(0, 5), 1)


def test_after_the_last_attempt_it_is_a_dead_letter_with_what_was_last(shop: Shop) -> None:
    shop.produce([NEEDY])
    with shop.daemon("handle", "handler.retry=scheduled", "max_retries=2") as daemon:
        shop.wait_states({Coordinate(0, 0): "open"})
        assert daemon.terminate() == 0
    (stored,) = shop.letters()
    assert (stored.letter.error, stored.letter.attempts, stored.letter.due_ms) == ("ConnectionError", 3, None)
    assert "bank is away" in stored.letter.reason
    assert "redelivery_handlers.py" in stored.letter.traceback
    assert "sync_runner" not in stored.letter.traceback
    assert stored.letter.first_failed_ms < stored.letter.last_failed_ms


def test_whoever_has_the_partition_later_handles_them(shop: Shop) -> None:
    """The first daemon is killed with records put aside; another one takes over."""
    shop.produce([NEEDY] * 3)
    settings = ("handler.retry=scheduled", "max_retries=1000", "retry_backoff_max_ms=100")
    with shop.daemon("handle", *settings) as first:
        first.wait_caught_up({0: 3, 1: 0})
        psutil.wait_procs(first.kill(), timeout=5)
    with shop.daemon("handle", *settings, name="b") as second:
        second.wait_running(2)
        shop.mend()
        shop.wait_states({})
        assert second.terminate() == 0
    assert Ledger(shop.folder).counts == dict.fromkeys(_all(0, 3), 1)


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def test_with_on_checkpoint_a_handler_killed_over_and_over_leaves_each_effect_once(
    kafka: KafkaCluster, topic: str, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{tmp_path / 'effects.db'}"
    if kind == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        url = server.url(server.create_database())
    database = Effects(url)
    shop = Shop(kafka, topic, tmp_path, url, on_checkpoint=True)
    shop.produce([orjson.dumps({"needs": "bank", "seconds": 0.01})] * 60)
    settings = ("handler.retry=scheduled", "max_retries=100000", "retry_backoff_max_ms=50", "handler.crash_attempts=99")
    with shop.daemon("effect", *settings) as daemon:
        daemon.wait_caught_up({0: 60, 1: 0})
        shop.mend()
        killed = 0
        while shop.states():
            handlers = [each for each in daemon.children() if each.name().startswith("kafkasrcd-h")]
            if handlers and killed < 5 and len(database.counts()) > 10 * killed:
                os.kill(handlers[killed % len(handlers)].pid, signal.SIGKILL)
                killed += 1
        assert killed == 5
        assert daemon.terminate() == 0
    assert database.counts() == dict.fromkeys(_all(0, 60), 1)
    database.close()


@pytest.mark.parametrize("on_checkpoint", [False, True])
def test_replaying_through_the_handler(kafka: KafkaCluster, topic: str, tmp_path: Path, on_checkpoint: bool) -> None:
    url = f"sqlite:///{tmp_path / 'effects.db'}"
    database = Effects(url) if on_checkpoint else None
    shop = Shop(kafka, topic, tmp_path, url if on_checkpoint else "", on_checkpoint=on_checkpoint)
    shop.produce([NEEDY] * 30)
    shop.produce([orjson.dumps({"needs": "nothing"})], partition=1)
    with shop.daemon("effect" if on_checkpoint else "handle", "max_retries=0") as daemon:
        daemon.wait_caught_up({0: 30, 1: 1})
        assert set(shop.states().values()) == {"open"}
        shop.mend()
        command = shop.replay("--yes")
        out, err = command.communicate(timeout=DEADLINE_SECONDS)
        assert (command.returncode, out) == (1, "30 dead letters replayed\n")
        assert "1 dead letter of 31 not replayed" in err
        assert daemon.terminate() == 0
    assert shop.states() == dict.fromkeys(_all(0, 30), "replayed") | {Coordinate(1, 0): "open"}
    assert [each.letter.attempts for each in shop.letters() if each.letter.partition == 1] == [2]
    assert set(Ledger(tmp_path).counts) == _all(0, 30)
    if database is not None:
        assert database.counts() == dict.fromkeys(_all(0, 30), 1)
        database.close()


def test_a_command_that_is_killed_leaves_them_to_the_daemon(shop: Shop) -> None:
    shop.produce([NEEDY] * 50)
    with shop.daemon("handle", "max_retries=0") as daemon:
        daemon.wait_caught_up({0: 50, 1: 0})
        assert daemon.terminate() == 0
    shop.mend()
    command = shop.replay("--yes")
    wait_until(lambda: "replaying" in shop.states().values(), DEADLINE_SECONDS, "the letters to be marked")
    command.kill()
    command.communicate()
    assert set(shop.states().values()) == {"replaying"}
    with shop.daemon("handle", "max_retries=0") as daemon:
        shop.wait_states(dict.fromkeys(_all(0, 50), "replayed"))
        assert daemon.terminate() == 0
    assert Ledger(shop.folder).counts == dict.fromkeys(_all(0, 50), 1)


def test_without_a_daemon_the_command_says_so_and_ctrl_c_leaves_them(shop: Shop) -> None:
    shop.produce([NEEDY])
    with shop.daemon("handle", "max_retries=0") as daemon:
        daemon.wait_caught_up({0: 1, 1: 0})
        assert daemon.terminate() == 0
    command = shop.replay("--yes")
    assert command.stderr is not None
    assert "1 wait for a daemon that has their partitions" in command.stderr.readline()
    command.send_signal(signal.SIGINT)
    out, err = command.communicate(timeout=DEADLINE_SECONDS)
    assert (command.returncode, out) == (1, "0 dead letters replayed\n")
    assert "1 dead letter of 1 not replayed yet, and left to the daemon" in err
    assert set(shop.states().values()) == {"replaying"}


@pytest.mark.parametrize("handler", ["handle", "handle_async"])
def test_a_letter_that_ends_its_process_is_open_again_and_the_rest_is_handled(shop: Shop, handler: str) -> None:
    deadly = orjson.dumps({"needs": "bank", "do": "exit"})
    shop.produce([NEEDY, NEEDY, deadly, NEEDY])
    settings = ("max_retries=0", "handler.crash_attempts=2", "handler.processes=1", "handler.ordering=none")
    with shop.daemon(handler, *settings) as daemon:
        daemon.wait_caught_up({0: 4, 1: 0})
        shop.mend()
        command = shop.replay("--yes")
        shop.produce([PLAIN] * 20)
        _, err = command.communicate(timeout=DEADLINE_SECONDS)
        assert "1 dead letter of 4 not replayed" in err
        daemon.wait_caught_up({0: 24, 1: 0})
        assert daemon.terminate() == 0
    states = dict.fromkeys(_all(0, 4), "replayed") | {Coordinate(0, 2): "open"}
    assert shop.states() == states
    (stored,) = [each for each in shop.letters() if each.state.value == "open"]
    assert stored.letter.error == "HandlerProcessEnded"
    assert "exit code 7" in stored.letter.reason
    assert set(Ledger(shop.folder).counts) == _all(0, 24) - {Coordinate(0, 2)}


def test_the_workers_half_of_a_format_is_done_again(shop: Shop) -> None:
    shop.produce([b"knab"])
    settings = ("max_retries=0", "value_format=custom:tests.redelivery_handlers:Reversed")
    with shop.daemon("word", *settings) as daemon:
        daemon.wait_caught_up({0: 1, 1: 0})
        (stored,) = shop.letters()
        assert (stored.letter.value, stored.letter.error) == (b"knab", "ConnectionError")
        shop.mend()
        command = shop.replay(str(stored.id))
        out, _ = command.communicate(timeout=DEADLINE_SECONDS)
        assert (command.returncode, out) == (0, "1 dead letter replayed\n")
        assert daemon.terminate() == 0
    assert Ledger(shop.folder).counts == {Coordinate(0, 0): 1}
