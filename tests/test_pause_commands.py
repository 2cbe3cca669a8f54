"""``kafkasrcd pause`` and ``resume`` where nothing runs: what they say, and what is in the store then."""

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from kafkasrcd.daemon.exit_codes import ExitCode
from kafkasrcd.storage.intents import Intent, IntentKind, Scope
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.storage.opening import open_intents, open_store
from tests.daemon_process import COMMAND


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Desk:
    """A store in a folder that has worked on partitions 0 to 3 of orders, and the commands run there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"sqlite:///{folder / 'offsets.db'}"
        store = open_store(self.url, "billing", 5_000)
        store.claim([TopicPartition("orders", number) for number in range(4)], "a:1")
        store.close()

    def run(self, *arguments: str, url: str | None = None) -> Ended:
        settings = ["-s", "group_id=billing", "-s", f"store.url={url or self.url}"]
        ended = subprocess.run(
            [COMMAND, *arguments, *settings],
            cwd=self.folder,
            env={**os.environ, "SUDO_USER": "alice"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in ended.stderr
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def intents(self) -> dict[str, Intent]:
        store = open_intents(self.url, "billing", 5_000)
        try:
            return {str(intent.scope): intent for intent in store.intents()}
        finally:
            store.close()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_a_pause_says_who_and_why_and_a_resume_takes_it_back(desk: Desk) -> None:
    ended = desk.run("pause", "orders:0-1,3", "--reason", "a bad deploy")
    assert ended == (ExitCode.OK, "orders:0 paused\norders:1 paused\norders:3 paused\n", "")
    found = desk.intents()
    assert found.keys() == {"orders:0", "orders:1", "orders:3"}
    intent = found["orders:0"]
    assert (intent.kind, intent.scope, intent.reason) == (IntentKind.PAUSE, Scope("orders", 0), "a bad deploy")
    assert intent.set_by.startswith("alice as ")
    ended = desk.run("resume", "orders:0")
    assert (ended.code, ended.err) == (ExitCode.OK, "")
    assert ended.out == f"orders:0 resumed; paused by {intent.set_by}: a bad deploy\n"
    assert desk.intents().keys() == {"orders:1", "orders:3"}
    ended = desk.run("resume", "orders")
    assert ended.code == ExitCode.OK
    assert not desk.intents()
    assert desk.run("resume", "orders:3") == (ExitCode.OK, "orders:3 was not paused\n", "")
    assert desk.run("resume", "--all") == (ExitCode.OK, "nothing was paused\n", "")


def test_a_partition_stays_paused_with_its_topic(desk: Desk) -> None:
    assert desk.run("pause", "--all", "--reason", "the move").out == "all topics paused\n"
    assert desk.run("pause", "orders", "orders:3", "--reason", "both").code == ExitCode.OK
    ended = desk.run("resume", "orders:3")
    assert ended.code == ExitCode.FAILURE
    assert ended.out.startswith("orders:3 resumed; ")
    assert ended.err.startswith("kafkasrcd: orders:3 stays paused, with orders, by alice as ")
    assert ended.err.endswith(": both; `kafkasrcd resume orders` ends that\n")
    ended = desk.run("resume", "orders")
    assert ended.code == ExitCode.FAILURE
    assert "orders stays paused, with all topics," in ended.err
    assert desk.run("resume", "--all").code == ExitCode.OK
    assert not desk.intents()


def test_what_the_group_has_not_seen_is_paused_all_the_same_and_said(desk: Desk) -> None:
    ended = desk.run("pause", "ordesr", "orders:3-4", "--reason", "why")
    assert ended.code == ExitCode.OK
    assert ended.err == (
        "kafkasrcd: group 'billing' has not worked on ordesr, orders:4 so far; paused all the same, for when it does\n"
    )
    assert desk.intents().keys() == {"ordesr", "orders:3", "orders:4"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give --all, or topics as in orders, orders:3 or orders:0-3,7, and not both"),
        (("--all", "orders"), "give --all, or topics as in orders, orders:3 or orders:0-3,7, and not both"),
        (("or ders",), "'or ders': 'or ders' cannot be a topic's name"),
        ((":3",), "':3': '' cannot be a topic's name"),
        (("orders:",), "'orders:': '' is no partition; expected numbers as in orders:3 or 0-3,7"),
        (("orders:x",), "'orders:x': 'x' is no partition; expected numbers as in orders:3 or 0-3,7"),
        (("orders:3-1",), "'orders:3-1': '3-1' is no partition; expected numbers as in orders:3 or 0-3,7"),
        (("orders:1,",), "'orders:1,': '' is no partition; expected numbers as in orders:3 or 0-3,7"),
        (("orders:-1",), "'orders:-1': '-1' is no partition; expected numbers as in orders:3 or 0-3,7"),
        (("orders:9999999999",), "'9999999999' is no partition"),
        (("orders:0-2000000000",), "'orders:0-2000000000' names more than 10,000 partitions: give orders alone"),
    ],
)
def test_what_is_not_understood_changes_nothing(desk: Desk, arguments: tuple[str, ...], said: str) -> None:
    ended = desk.run("pause", *arguments, "--reason", "why")
    assert ended.code == ExitCode.USAGE
    assert ended.err.rstrip().endswith(said) or said in ended.err.splitlines()[-1]
    assert not desk.intents()


@pytest.mark.parametrize("reason", [(), ("--reason", " ")])
def test_a_pause_has_a_reason(desk: Desk, reason: tuple[str, ...]) -> None:
    ended = desk.run("pause", "orders", *reason)
    assert ended.code == ExitCode.USAGE
    assert "--reason" in ended.err
    assert not desk.intents()


@pytest.mark.parametrize("command", [("pause", "orders", "--reason", "why"), ("resume", "orders")])
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://", "store.url is memory://, out of reach of commands: name a database"),
        ("sqlite:///elsewhere.db", "there is no offset store at"),
    ],
)
def test_a_store_that_cannot_be_used(desk: Desk, command: tuple[str, ...], url: str, said: str) -> None:
    ended = desk.run(*command, url=url)
    assert ended.code == ExitCode.CONFIG
    assert said in ended.err
    assert not (desk.folder / "elsewhere.db").exists()
