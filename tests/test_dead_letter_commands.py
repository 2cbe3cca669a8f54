"""``kafkasrcd dead-letters``, run as people run it: on both databases, and against a real broker."""

import base64
import contextlib
import json
import os
import pty
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, cast

import click
import msgspec
import pytest
from confluent_kafka import TIMESTAMP_CREATE_TIME, Consumer

from kafkasrcd.daemon import places
from kafkasrcd.daemon.dead_letter_commands import export, list_letters
from kafkasrcd.daemon.dead_letter_lines import LINE_VERSION, LetterLine, WholeLetterLine
from kafkasrcd.daemon.dead_letter_replay import Outcome, Replay
from kafkasrcd.daemon.exit_codes import ExitCode
from kafkasrcd.errors import BrokerUnavailable, DeadLetterRefused, StoreUnavailable
from kafkasrcd.message import encode_headers
from kafkasrcd.settings import Settings, StoreSettings
from kafkasrcd.storage.dead_letter_store import DeadLetterStore
from kafkasrcd.storage.dead_letters import DeadLetter, LetterFilter, LetterState, StoredLetter
from kafkasrcd.storage.opening import open_dead_letters
from tests.daemon_process import DaemonProcess
from tests.kafka_cluster import KafkaCluster, Record
from tests.postgres import PostgresServer
from tests.waiting import wait_until

KAFKASRCD = Path(sys.executable).with_name("kafkasrcd")
GROUP = "billing"
NO_BROKER = "127.0.0.1:1"
DEADLINE_SECONDS = 30.0


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Desk:
    """A folder with a configuration, the store it names, and the commands run there."""

    def __init__(self, folder: Path, url: str, brokers: str = NO_BROKER) -> None:
        self.folder = folder
        self.settings = {
            "brokers": brokers,
            "group_id": GROUP,
            "topics": ["orders"],
            "handler.target": "handlers:handle",
            "store.url": url,
        }
        self.store = open_dead_letters(url, GROUP, 5_000)

    def command(self, *arguments: object) -> list[str]:
        lines = [f"{name} = {msgspec.json.encode(value).decode()}" for name, value in self.settings.items()]
        (self.folder / "kafkasrcd.toml").write_text("\n".join(lines))
        return [str(KAFKASRCD), "dead-letters", *map(str, arguments)]

    def run(self, *arguments: object) -> Ended:
        ended = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in ended.stderr
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def bury(self, *letters: DeadLetter) -> list[int]:
        """Their IDs."""
        for each in letters:
            self.store.bury(each)
        return [self.found(each).id for each in letters]

    def found(self, letter: DeadLetter) -> StoredLetter:
        (found,) = (
            stored
            for stored in self.store.find(LetterFilter(topic=letter.topic, partition=letter.partition))
            if stored.letter.offset == letter.offset
        )
        return found

    def get(self, letter_id: int) -> StoredLetter:
        (found,) = self.store.find(LetterFilter(ids=(letter_id,)))
        return found

    def states(self) -> list[str]:
        return [stored.state.value for stored in self.store.find(LetterFilter())]


def in_a_terminal(desk: Desk, *arguments: object) -> str:
    """What the command shows in one, of 80 columns."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 80))
    with subprocess.Popen(
        desk.command(*arguments), cwd=desk.folder, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs
    ):
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # EIO: nobody has it open any more
            pass
        finally:
            os.close(ours)
    return shown.decode()


def environment() -> Mapping[str, str]:
    """This process's, without settings."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("KAFKASRCD_") or name.startswith("KAFKASRCD_TEST_")
    }


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    """On each database."""
    url = f"sqlite:///{tmp_path / 'offsets.db'}"
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        url = server.url(server.create_database())
    desk = Desk(tmp_path, url)
    yield desk
    desk.store.close()


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Desk]:
    """On SQLite, where the database makes no difference."""
    desk = Desk(tmp_path, f"sqlite:///{tmp_path / 'offsets.db'}")
    yield desk
    desk.store.close()


@pytest.fixture
def topic(kafka: KafkaCluster, topic_name: str) -> str:
    kafka.create_topic(topic_name, partitions=2)
    return topic_name


@pytest.fixture
def on_kafka(kafka: KafkaCluster, tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path, f"sqlite:///{tmp_path / 'offsets.db'}", kafka.bootstrap)
    yield desk
    desk.store.close()


def letter(
    offset: int, *, topic: str = "orders", error: str = "ValueError", at_ms: int = 1_764_000_000_000
) -> DeadLetter:
    return DeadLetter(
        topic=topic,
        partition=1,
        offset=offset,
        timestamp_ms=1_763_999_999_000,
        key=b"key-%d" % offset,
        value=b'{"n": %d}' % offset,
        headers=encode_headers([("trace", b"1"), ("trace", None), ("raw", b"\xff\x00")]),
        value_format="json",
        error=error,
        reason="no luck",
        attempts=4,
        first_failed_ms=at_ms,
        last_failed_ms=at_ms,
        host="a",
        version="1",
        traceback="Traceback\n  somewhere",
    )


# ── list ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_list_has_a_line_for_each_open_letter(desk: Desk) -> None:
    assert desk.run("list") == (ExitCode.OK, "no open dead letters of group 'billing'\n", "")
    first, second = desk.bury(letter(7), letter(8, error="KeyError"))
    ended = desk.run("list")
    assert (ended.code, ended.err) == (ExitCode.OK, "")
    heading, *rows = [line.split() for line in ended.out.splitlines()]
    assert heading == ["id", "record", "last", "failed", "attempts", "error", "reason"]
    assert [(row[0], row[1], row[5]) for row in rows] == [
        (str(first), "orders[1]@7", "ValueError"),
        (str(second), "orders[1]@8", "KeyError"),
    ]
    assert desk.store.change(first, [LetterState.OPEN], LetterState.DISCARDED, by="me")
    assert "@7" not in desk.run("list").out
    shown = desk.run("list", "--state", "all").out
    assert "discarded" in shown
    assert "by me" in shown


def test_list_filters(desk: Desk) -> None:
    now = int(time.time() * 1000)
    desk.bury(letter(1), letter(2, topic="bills"), letter(3, error="KeyError"), letter(4, at_ms=now - 60_000))

    def offsets(*arguments: object) -> list[int]:
        ended = desk.run("list", "--json", *arguments)
        assert ended.code == ExitCode.OK
        return [json.loads(line)["offset"] for line in ended.out.splitlines()]

    assert offsets() == [1, 2, 3, 4]
    assert offsets("--topic", "bills") == [2]
    assert offsets("--partition", 0) == []
    assert offsets("--error", "KeyError", "--topic", "orders") == [3]
    assert offsets("--since", "5m") == [4]
    assert offsets("--since", "20000d") == [1, 2, 3, 4]
    assert offsets("--since", "2025-11-24T16:00:00+00:00") == [1, 2, 3, 4]
    assert offsets("--since", "2025-11-24T17:00:00.001+01:00") == [4]
    assert offsets("--limit", 2) == [1, 2]
    assert offsets("--state", "discarded") == []
    limited = desk.run("list", "--limit", 3).out
    assert "and 1 more: --limit 4" in limited


def test_list_as_json_is_a_documented_shape(plain: Desk) -> None:
    plain.bury(letter(7))
    ended = plain.run("list", "--json")
    line = msgspec.json.decode(ended.out, type=LetterLine, strict=True)
    assert (line.version, line.topic, line.offset, line.error, line.state) == (
        LINE_VERSION,
        "orders",
        7,
        "ValueError",
        "open",
    )
    assert set(json.loads(ended.out)) == {field.name for field in msgspec.structs.fields(LetterLine)}


@pytest.mark.parametrize(("command", "shape"), [(list_letters, LetterLine), (export, WholeLetterLine)])
def test_every_field_is_in_the_help(command: click.Command, shape: type[msgspec.Struct]) -> None:
    assert command.help is not None
    assert list_letters.help is not None
    words = re.findall(r"\w+", list_letters.help + (command.help if command is export else ""))
    assert {field.name for field in msgspec.structs.fields(shape)} <= set(words)


def test_a_narrow_terminal_has_all_but_the_end_of_the_reason(plain: Desk) -> None:
    (found,) = plain.bury(msgspec.structs.replace(letter(7), reason="no luck at all, and more of that " * 5))
    shown = in_a_terminal(plain, "list").replace("\r\n", "\n").splitlines()[1]
    assert re.match(rf" *{found}  orders\[1\]@7  \S+ \S+ +4  ValueError  no luck at all.*…", shown)


def test_list_tells_of_letters_left_replaying(plain: Desk) -> None:
    (first, _) = plain.bury(letter(7), letter(8))
    assert plain.store.change(first, [LetterState.OPEN], LetterState.REPLAYING, by="ops@a, pid 1")
    ended = plain.run("list")
    assert "@7" not in ended.out
    assert "! 1 dead letter left replaying" in ended.out
    assert "replay --state replaying --to-topic" in ended.out
    assert "twice" in ended.out
    shown = plain.run("list", "--state", "replaying").out
    assert "by ops@a, pid 1" in shown
    # The line that it advises to.
    assert plain.run("replay", "--state", "replaying", "--to-topic", "--yes").code == ExitCode.UNAVAILABLE


def test_nothing_of_a_record_reaches_a_terminal_as_a_control_sequence(plain: Desk) -> None:
    nasty = "\x1b]0;owned\x07\u202eevil\nsecond"
    whole = msgspec.structs.replace(
        letter(7),
        reason=nasty,
        error="E\x1b[31m",
        traceback=nasty,
        key=nasty.encode(),
        value="a\u202eb".encode(),
        headers=encode_headers([("h\x1b", nasty.encode())]),
    )
    (found,) = plain.bury(whole)
    for arguments in (("list",), ("show", found)):
        out = plain.run(*arguments).out
        assert not set("\x1b\x07\u202e") & set(out)
        assert "\\x1b" in out


# ── show ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_show_has_everything(desk: Desk) -> None:
    (found,) = desk.bury(letter(7))
    ended = desk.run("show", found)
    assert (ended.code, ended.err) == (ExitCode.OK, "")
    for expected in (
        "record: orders[1]@7",
        "error: ValueError",
        "reason: no luck",
        "attempts: 4",
        "kafkasrcd 1 on a",
        "key: key-7",
        'value, json: {"n": 7}',
        "header trace: 1",
        "header trace: (null)",
        "header raw:\n  2 bytes, in hex\n  ff 00",
        "traceback:\n  Traceback\n    somewhere",
    ):
        assert expected in ended.out, expected


def test_show_as_json_has_the_bytes(desk: Desk) -> None:
    binary = msgspec.structs.replace(letter(7), key=None, value=bytes(range(256)))
    (found,) = desk.bury(binary)
    ended = desk.run("show", found, "--json")
    line = msgspec.json.decode(ended.out, type=WholeLetterLine)
    assert (line.key, line.value, line.traceback) == (None, binary.value, binary.traceback)
    assert line.headers == [("trace", b"1"), ("trace", None), ("raw", b"\xff\x00")]
    assert base64.b64decode(json.loads(ended.out)["value"]) == binary.value


# ── discard ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_discard_keeps_the_letter_with_the_reason_and_who_did_it(desk: Desk) -> None:
    first, second = desk.bury(letter(7), letter(8))
    ended = desk.run("discard", first, "--reason", "a test order")
    assert ended == (ExitCode.OK, "1 dead letter discarded\n", "")
    discarded = desk.get(first)
    assert (discarded.state, discarded.note) == (LetterState.DISCARDED, "a test order")
    assert "@" in discarded.changed_by
    assert discarded.letter == letter(7)
    assert desk.get(second).state is LetterState.OPEN
    again = desk.run("discard", first, second, "--reason", "again")
    assert again.code == ExitCode.FAILURE
    assert f"dead letter {first} is discarded" in again.err
    assert desk.get(second).state is LetterState.OPEN, "nothing was changed"


def test_discard_by_filter_asks(desk: Desk) -> None:
    desk.bury(*(letter(offset) for offset in range(3)), letter(9, error="KeyError"))
    arguments = ("discard", "--error", "ValueError", "--reason", "old")
    ended = desk.run(*arguments)
    assert ended.code == ExitCode.USAGE
    assert "discard 3 open dead letters of group 'billing' with error ValueError?" in ended.err
    assert "--yes" in ended.err
    assert desk.states() == ["open"] * 4
    assert desk.run(*arguments, "--yes") == (ExitCode.OK, "3 dead letters discarded\n", "")
    assert desk.states() == ["discarded"] * 3 + ["open"]
    assert (
        desk.run(*arguments, "--yes").out
        == "no open dead letters of group 'billing' with error ValueError: nothing to discard\n"
    )


@pytest.mark.parametrize(
    ("answer", "code", "states"), [(b"n\n", ExitCode.FAILURE, "open"), (b"y\n", ExitCode.OK, "discarded")]
)
def test_on_a_terminal_the_answer_counts(plain: Desk, answer: bytes, code: ExitCode, states: str) -> None:
    plain.bury(letter(7))
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            plain.command("discard", "--reason", "x"),
            cwd=plain.folder,
            env=environment(),
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            os.write(ours, answer)
            _, said = process.communicate(timeout=DEADLINE_SECONDS)
    finally:
        os.close(ours)
        os.close(theirs)
    assert process.returncode == code
    assert b"discard 1 open dead letters of group 'billing'? [y/N]" in said
    assert plain.states() == [states]


# ── export ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_export_writes_whole_letters(desk: Desk) -> None:
    letters = [letter(offset) for offset in range(120)]
    ids = desk.bury(*letters)
    ended = desk.run("export")
    lines = [msgspec.json.decode(line, type=WholeLetterLine) for line in ended.out.splitlines()]
    assert [(line.id, line.value) for line in lines] == [
        (letter_id, each.value) for letter_id, each in zip(ids, letters, strict=True)
    ]
    file = desk.folder / "letters.jsonl"
    assert desk.run("export", ids[3], "--output", file) == (ExitCode.OK, "", "")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert msgspec.json.decode(file.read_bytes(), type=WholeLetterLine) == lines[3]
    again = desk.run("export", "--output", file)
    assert again.code == ExitCode.FAILURE
    assert "is there already" in again.err


def test_a_long_export_shows_a_bar_on_a_terminal_and_only_there(plain: Desk) -> None:
    plain.bury(*(letter(offset) for offset in range(60)))
    shown = in_a_terminal(plain, "export", "--output", "a.jsonl")
    assert "exporting" in shown
    assert "60/60" in shown
    assert plain.run("export", "--output", "b.jsonl") == (ExitCode.OK, "", "")
    assert (plain.folder / "a.jsonl").read_bytes() == (plain.folder / "b.jsonl").read_bytes()
    assert "exporting" not in in_a_terminal(plain, "export"), "where the lines themselves are seen"


def test_an_export_that_fails_leaves_no_file(plain: Desk) -> None:
    (found,) = plain.bury(letter(7))
    assert plain.run("export", found, 999, "--output", "letters.jsonl").code == ExitCode.FAILURE
    assert not (plain.folder / "letters.jsonl").exists()
    missing = plain.run("export", "--output", "nowhere/letters.jsonl")
    assert missing.code == ExitCode.FAILURE
    assert "nowhere/letters.jsonl" in missing.err


# ── What cannot be done ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "arguments",
    [
        ("show",),
        ("show", "x"),
        ("show", 0),
        ("show", 2**63),
        ("list", "--since", "yesterday"),
        ("list", "--since", "2026-01-31T12:00:00"),
        ("list", "--limit", 0),
        ("list", "--partition", -1),
        ("list", "--state", "nonsense"),
        ("list", "--topic", "\x1b"),
        ("discard", 1),
        ("discard", 1, "--reason", " "),
        ("discard", 1, "--topic", "orders", "--reason", "x"),
        ("discard", "--state", "replayed", "--reason", "x"),
        ("replay",),
        ("replay", 1, "--no-wait", "--to-topic"),
        ("replay", "--to-topic", 1),
    ],
    ids=lambda arguments: " ".join(map(str, arguments)).replace("\x1b", "ESC"),
)
def test_a_wrong_command_line_exits_with_2(plain: Desk, arguments: tuple[object, ...]) -> None:
    plain.bury(letter(7))
    ended = plain.run(*arguments)
    assert ended.code == ExitCode.USAGE
    assert "Error: " in ended.err
    assert plain.states() == ["open"]


@pytest.mark.parametrize("command", ["show", "discard", "export", "replay"])
def test_an_unknown_id_is_one_line(plain: Desk, command: str) -> None:
    (found,) = plain.bury(letter(7))
    ids = [99] if command == "show" else [found, 99]
    more = {"discard": ("--reason", "x"), "replay": ("--to-topic",)}.get(command, ())
    ended = plain.run(command, *ids, *more)
    assert ended == (
        ExitCode.FAILURE,
        "",
        "kafkasrcd: group 'billing' has no dead letter 99: "
        "`kafkasrcd dead-letters list --state all` has all there are\n",
    )
    assert plain.states() == ["open"]


def test_a_store_that_is_not_there_is_not_made(plain: Desk) -> None:
    gone = plain.folder / "folder" / "other.db"
    plain.settings["store.url"] = f"sqlite:///{gone}"
    for arguments in (
        ("list",),
        ("show", 1),
        ("discard", 1, "--reason", "x"),
        ("export",),
        ("replay", 1, "--to-topic"),
    ):
        ended = plain.run(*arguments)
        assert (ended.code, ended.out) == (ExitCode.CONFIG, "")
        assert ended.err.startswith(f"kafkasrcd: there is no offset store at {gone}: ")
        assert ended.err.count("\n") == 1
    assert not gone.parent.exists()


def test_the_place_where_the_daemon_has_its_store_is_found(plain: Desk) -> None:
    """Without store.url: the default of the user who runs it."""
    plain.bury(letter(7))
    state = plain.folder / "kafkasrcd"
    state.mkdir()
    plain.store.close()
    (plain.folder / "offsets.db").rename(state / "offsets.db")
    del plain.settings["store.url"]
    command = plain.command("list")
    found = subprocess.run(
        command, cwd=plain.folder, env={**environment(), "XDG_STATE_HOME": str(plain.folder)}, capture_output=True
    )
    assert b"orders[1]@7" in found.stdout


def test_beside_the_service_its_store_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = tmp_path / "service.db"
    monkeypatch.setattr(places, "_SERVICE_STORE", service)
    own = tmp_path / "kafkasrcd" / "offsets.db"
    environ = {"XDG_STATE_HOME": str(tmp_path)}

    def found(settings: Settings) -> str:
        return places.existing_store_url(settings, tmp_path, environ)

    assert found(Settings()) == f"sqlite:///{own}"
    service.touch()
    assert found(Settings()) == f"sqlite:///{service}"
    assert found(Settings(store=StoreSettings(url="sqlite:///x.db"))) == f"sqlite:///{tmp_path / 'x.db'}"
    own.parent.mkdir()
    own.touch()
    assert found(Settings()) == f"sqlite:///{own}"


def test_a_store_of_an_older_version_is_left_to_the_daemon(plain: Desk) -> None:
    with contextlib.closing(sqlite3.connect(plain.folder / "offsets.db")) as database:
        database.execute("UPDATE kafkasrcd_version SET version_num = '0002'")
        database.commit()
        ended = plain.run("list")
        assert ended.code == ExitCode.CONFIG
        assert "older kafkasrcd (schema 0002" in ended.err
        assert "kafkasrcd start" in ended.err
        assert database.execute("SELECT version_num FROM kafkasrcd_version").fetchone() == ("0002",)


def test_in_a_database_of_the_users_own(plain: Desk) -> None:
    plain.settings["commit_strategy"] = "on_checkpoint"
    (found,) = plain.bury(letter(7))
    with contextlib.closing(sqlite3.connect(plain.folder / "offsets.db")) as database:
        database.execute("CREATE TABLE orders (id)")
        database.commit()
    assert plain.run("discard", found, "--reason", "x").code == ExitCode.OK
    assert plain.states() == ["discarded"]


@pytest.mark.parametrize("content", [b"no database " * 100, b""], ids=["no database", "empty"])
def test_a_foreign_file_is_left_as_it_is(plain: Desk, content: bytes) -> None:
    file = plain.folder / "foreign.db"
    file.write_bytes(content)
    plain.settings["store.url"] = f"sqlite:///{file}"
    ended = plain.run("list")
    assert (ended.code, ended.out) == (ExitCode.CONFIG, "")
    assert str(file) in ended.err
    assert file.read_bytes() == content


def test_a_database_without_our_tables_gets_none(postgres: PostgresServer, plain: Desk) -> None:
    database = postgres.create_database()
    plain.settings |= {"store.url": postgres.url(database), "commit_strategy": "on_checkpoint"}
    for _ in range(2):
        ended = plain.run("list")
        assert ended.code == ExitCode.CONFIG
        assert "is no offset store yet" in ended.err
        assert ended.err.count("\n") == 1


def test_a_memory_store_keeps_none(plain: Desk) -> None:
    plain.settings["store.url"] = "memory://"
    ended = plain.run("list")
    assert ended.code == ExitCode.CONFIG
    assert "memory://" in ended.err


def test_a_store_that_is_away_exits_with_69(plain: Desk) -> None:
    plain.settings["store.url"] = "postgresql://ops:hunter2@127.0.0.1:1/offsets"
    ended = plain.run("list")
    assert ended.code == ExitCode.UNAVAILABLE
    assert "cannot be reached" in ended.err
    assert "hunter2" not in ended.err


def test_no_broker_changes_nothing(plain: Desk) -> None:
    (found,) = plain.bury(letter(7))
    ended = plain.run("replay", found, "--to-topic")
    assert ended.code == ExitCode.UNAVAILABLE
    assert f"no broker answers at {NO_BROKER}" in ended.err
    assert ended.err.count("\n") == 1
    assert plain.get(found).changed_by == ""
    assert plain.states() == ["open"]


def test_the_commands_load_no_library_before_they_need_it(plain: Desk) -> None:
    plain.bury(letter(7))
    plain.command()
    program = (
        "import sys; from kafkasrcd.daemon.commands import main; main(sys.argv[1:], standalone_mode=False);"
        "print(*(m for m in ('confluent_kafka', 'sqlalchemy', 'rich', 'asyncio') if m in sys.modules))"
    )

    def loaded(*arguments: str) -> list[str]:
        run = [sys.executable, "-c", program, "dead-letters", *arguments]
        ended = subprocess.run(run, cwd=plain.folder, env=environment(), capture_output=True, text=True, check=True)
        return ended.stdout.splitlines()[-1].split()

    assert loaded("--help") == []
    assert loaded("list", "--help") == []
    assert "confluent_kafka" not in loaded("list", "--json")


# ── replay, one letter at a time ─────────────────────────────────────────────────────────────────────────────────────


class Produced:
    """A producer that answers as it is told, and looks at the letter meanwhile."""

    def __init__(self, store: DeadLetterStore, answer: Exception | None = None) -> None:
        self._store = store
        self._answer = answer
        self.meanwhile: list[StoredLetter] = []

    def produce(self, letter: DeadLetter, topic: str) -> str:
        self.meanwhile += self._store.find(LetterFilter())
        if self._answer is not None:
            raise self._answer
        return f"{topic}[0]@1"


def test_each_change_is_one_transaction(desk: Desk) -> None:
    (found,) = desk.bury(letter(7))
    producer = Produced(desk.store)
    replay = Replay(desk.store, producer, "ops@a, pid 1", lambda each: each.topic, lambda _: None)
    assert replay.replay(found, LetterState.OPEN) is Outcome.REPLAYED
    (meanwhile,) = producer.meanwhile
    assert (meanwhile.state, meanwhile.changed_by) == (LetterState.REPLAYING, "ops@a, pid 1")
    after = desk.get(found)
    assert (after.state, after.note) == (LetterState.REPLAYED, "as orders[0]@1")
    assert replay.replay(found, LetterState.OPEN) is Outcome.NOT_OURS


@pytest.mark.parametrize("error", [DeadLetterRefused("too large"), BrokerUnavailable("not confirmed")])
def test_what_is_not_produced_is_open_again(desk: Desk, error: Exception) -> None:
    (found,) = desk.bury(letter(7))
    said: list[str] = []
    replay = Replay(desk.store, Produced(desk.store, error), "ops@a, pid 1", lambda each: each.topic, said.append)
    if isinstance(error, BrokerUnavailable):
        with pytest.raises(BrokerUnavailable) as raised:
            replay.replay(found, LetterState.OPEN)
        said.append(str(raised.value))
    else:
        assert replay.replay(found, LetterState.OPEN) is Outcome.REFUSED
    after = desk.get(found)
    assert (after.state, after.note) == (LetterState.OPEN, f"not replayed: {error}")
    assert said == [f"dead letter {found} (orders[1]@7) is not replayed, and open: {error}"]


def test_a_store_that_goes_away_meanwhile_leaves_it_replaying(plain: Desk) -> None:
    (found,) = plain.bury(letter(7))
    file = plain.folder / "offsets.db"

    class MovesTheStore:
        def produce(self, letter: DeadLetter, topic: str) -> str:
            file.rename(plain.folder / "elsewhere.db")
            return "orders[0]@1"

    replay = Replay(plain.store, MovesTheStore(), "ops@a, pid 1", lambda each: each.topic, lambda _: None)
    with pytest.raises(StoreUnavailable, match=r"is replayed as orders\[0\]@1, but stays replaying"):
        replay.replay(found, LetterState.OPEN)
    (plain.folder / "elsewhere.db").rename(file)
    assert plain.states() == ["replaying"]


def test_of_two_who_take_up_the_same_letter_one_does(desk: Desk) -> None:
    (found,) = desk.bury(letter(7))
    assert desk.store.change(found, [LetterState.OPEN], LetterState.REPLAYING, by="dead")
    before = [LetterState.REPLAYING]
    assert desk.store.change(found, before, LetterState.REPLAYING, by="first", seen="dead")
    assert not desk.store.change(found, before, LetterState.REPLAYING, by="second", seen="dead")


# ── replay, against a real broker ────────────────────────────────────────────────────────────────────────────────────

Found = tuple[int, int, bytes | None, bytes | None, list[tuple[str, bytes | None]], int]


def read(kafka: KafkaCluster, topic: str, count: int) -> list[Found]:
    """(partition, offset, key, value, headers, timestamp) of that many records."""
    consumer = Consumer(
        {"bootstrap.servers": kafka.bootstrap, "group.id": f"{topic}-reader", "auto.offset.reset": "earliest"}
    )
    consumer.subscribe([topic])
    found: list[Found] = []
    try:
        while len(found) < count:
            message = consumer.poll(30)
            assert message is not None
            assert message.error() is None
            kind, timestamp_ms = message.timestamp()
            assert kind == TIMESTAMP_CREATE_TIME
            headers = cast(list[tuple[str, bytes | None]], message.headers() or [])
            partition, offset = message.partition(), message.offset()
            assert partition is not None
            assert offset is not None
            found.append((partition, offset, message.key(), message.value(), headers, timestamp_ms))
    finally:
        consumer.close()
    return found


def recent(offset: int, topic: str) -> DeadLetter:
    """Of an hour ago, so that no retention takes it."""
    return msgspec.structs.replace(letter(offset, topic=topic), timestamp_ms=int(time.time() * 1000) - 3_600_000)


def test_a_record_goes_back_as_it_was(kafka: KafkaCluster, topic: str, on_kafka: Desk) -> None:
    whole = recent(7, topic)
    bare = msgspec.structs.replace(recent(8, topic), key=None, value=None, headers=None)
    empty = msgspec.structs.replace(recent(9, topic), key=b"", value=b"", partition=0)
    ids = on_kafka.bury(whole, bare, empty)
    ended = on_kafka.run("replay", *ids, "--to-topic")
    assert ended == (ExitCode.OK, "3 dead letters replayed\n", "")
    assert on_kafka.states() == ["replayed"] * 3
    assert on_kafka.get(ids[0]).note == f"as {topic}[1]@0"
    found = sorted(read(kafka, topic, 3))
    headers = [("trace", b"1"), ("trace", None), ("raw", b"\xff\x00")]
    assert found == [
        (0, 0, b"", b"", headers, empty.timestamp_ms),
        (1, 0, whole.key, whole.value, headers, whole.timestamp_ms),
        (1, 1, None, None, [], bare.timestamp_ms),
    ]


def test_to_another_topic_and_by_filter(kafka: KafkaCluster, topic: str, on_kafka: Desk) -> None:
    kafka.create_topic(f"{topic}.again", partitions=1)
    on_kafka.bury(*(recent(offset, topic) for offset in range(30)), letter(30, topic=topic, error="KeyError"))
    arguments = ("replay", "--topic", topic, "--error", "ValueError", "--to-topic", "{topic}.again")
    asked = on_kafka.run(*arguments)
    assert asked.code == ExitCode.USAGE
    assert re.search(r"replay 30 open dead letters .* into topic \{topic\}.again\?", asked.err)
    assert on_kafka.run(*arguments, "--yes") == (ExitCode.OK, "30 dead letters replayed\n", "")
    assert on_kafka.states() == ["replayed"] * 30 + ["open"]
    assert kafka.end_offsets(f"{topic}.again") == {0: 30}
    assert [value for _, _, _, value, _, _ in read(kafka, f"{topic}.again", 30)] == [
        b'{"n": %d}' % n for n in range(30)
    ]


def test_what_the_broker_refuses_is_open_again_and_the_others_go_on(
    kafka: KafkaCluster, topic: str, on_kafka: Desk
) -> None:
    kafka.create_topic(f"{topic}.small", partitions=2, config={"max.message.bytes": "1000"})
    large = msgspec.structs.replace(recent(7, f"{topic}.small"), value=os.urandom(5_000))
    ids = on_kafka.bury(
        large,
        recent(8, f"{topic}.small"),
        recent(9, f"{topic}.gone"),
        msgspec.structs.replace(recent(10, topic), partition=5),
    )
    ended = on_kafka.run("replay", *ids, "--to-topic")
    assert ended.code == ExitCode.FAILURE
    assert ended.out == "1 dead letter replayed\n"
    assert on_kafka.states() == ["open", "replayed", "open", "open"]
    assert "does not take it" in on_kafka.get(ids[0]).note
    assert "is not there" in on_kafka.get(ids[2]).note
    assert "has no partition 5" in on_kafka.get(ids[3]).note
    assert ended.err.count("is not replayed, and open") == 3
    assert ended.err.endswith("kafkasrcd: 3 dead letters of 4 not replayed\n")
    assert f"{topic}.gone" not in kafka.admin.list_topics(timeout=10).topics, "no topic is made by asking for it"


def test_killed_amid_a_replay_and_taken_up_again(kafka: KafkaCluster, topic: str, on_kafka: Desk) -> None:
    ids = on_kafka.bury(*(recent(offset, topic) for offset in range(400)))
    # A broker that holds still has the command wait amid a letter.
    command = on_kafka.start("replay", "--to-topic", "--yes")
    try:
        wait_until(lambda: "replayed" in on_kafka.states(), DEADLINE_SECONDS, "the first letter")
        kafka.freeze_broker(0)
        wait_until(lambda: "replaying" in on_kafka.states(), DEADLINE_SECONDS, "one in hand")
    finally:
        command.kill()
        command.communicate()
        kafka.thaw_broker(0)
    states = on_kafka.states()
    assert states.count("replaying") == 1
    assert "open" in states
    assert "! 1 dead letter left replaying" in on_kafka.run("list").out
    (left,) = [each for each in ids if on_kafka.get(each).state is LetterState.REPLAYING]
    refused = on_kafka.run("replay", left, "--to-topic")
    assert refused.code == ExitCode.FAILURE
    assert "--state replaying takes it" in refused.err
    again = on_kafka.run("replay", "--state", "replaying", "--to-topic", "--yes")
    assert (again.code, again.out) == (ExitCode.OK, "1 dead letter replayed\n")
    assert "twice" in again.err
    assert on_kafka.run("replay", "--to-topic", "--yes").code == ExitCode.OK
    assert on_kafka.states() == ["replayed"] * 400
    found = read(kafka, topic, 400)
    total = sum(kafka.end_offsets(topic).values())
    assert total in (400, 401), "only the one in hand may be there twice"
    if total == 400:
        assert sorted(value or b"" for _, _, _, value, _, _ in found) == sorted(b'{"n": %d}' % n for n in range(400))


def test_a_broker_that_is_away_meanwhile_ends_it_with_every_letter_open_or_replayed(
    kafka: KafkaCluster, topic: str, on_kafka: Desk
) -> None:
    on_kafka.bury(*(recent(offset, topic) for offset in range(400)))
    command = on_kafka.start("replay", "--to-topic", "--yes")
    try:
        wait_until(lambda: "replayed" in on_kafka.states(), DEADLINE_SECONDS, "the first letter")
        kafka.freeze_broker(0)
        out, err = command.communicate(timeout=60)
    finally:
        kafka.thaw_broker(0)
        command.kill()
        command.communicate()
    assert command.returncode == ExitCode.UNAVAILABLE, err
    assert set(on_kafka.states()) == {"open", "replayed"}
    assert out.split()[0] == str(on_kafka.states().count("replayed"))
    assert re.match(r"kafkasrcd: dead letter \d+ \(.*\) is not replayed, and open: no broker has confirmed it", err)
    assert err.count("\n") == 1
    assert len([each for each in on_kafka.store.find(LetterFilter()) if "may have taken it" in each.note]) == 1
    kafka.wait_ready()
    assert on_kafka.run("replay", "--to-topic", "--yes").code == ExitCode.OK


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_letter_in_hand(
    kafka: KafkaCluster, topic: str, on_kafka: Desk, number: signal.Signals
) -> None:
    on_kafka.bury(*(recent(offset, topic) for offset in range(400)))
    command = on_kafka.start("replay", "--to-topic", "--yes")
    wait_until(lambda: "replayed" in on_kafka.states(), DEADLINE_SECONDS, "the first letter")
    command.send_signal(number)
    out, err = command.communicate(timeout=DEADLINE_SECONDS)
    states = on_kafka.states()
    assert "replaying" not in states
    assert "open" in states
    assert command.returncode == ExitCode.FAILURE
    assert out == f"{states.count('replayed')} dead letter{'s' if states.count('replayed') > 1 else ''} replayed\n"
    assert re.fullmatch(r"kafkasrcd: \d+ dead letters? of 400 not replayed\n", err)
    assert sum(kafka.end_offsets(topic).values()) == states.count("replayed")


def test_letters_of_a_running_daemon(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    """Buried by the daemon, shown by its status, replayed beside it, and handled."""
    kafka.produce(topic, [Record(0, b"key", b'{"do": "raise"}'), Record(0, b"key", b'{"n": 1}')])
    settings = ("max_retries=0", "retry_backoff_ms=1")
    with DaemonProcess(tmp_path, kafka.bootstrap, topic, "tests.fault_handlers:obey", settings=settings) as daemon:
        status = daemon.wait_status(lambda status: status.dead_letters, "a dead letter in the status")
        (counted,) = status.dead_letters
        assert (counted.topic, counted.error, counted.count) == (topic, "ValueError", 1)
        assert status.problems == []
        where = ("-s", f"group_id={topic}", "-s", f"store.url=sqlite:///{tmp_path / 'offsets.db'}")
        base = ("-s", f"brokers={kafka.bootstrap}", "-s", f"topics={topic}", "-s", "handler.target=a:b")

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [str(KAFKASRCD), *arguments]
            return subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)

        shown = run("status", "-s", f"supervisor.control_socket={daemon.socket}")
        assert f"! 1 dead letter of {topic}: ValueError (kafkasrcd dead-letters list)" in shown.stdout
        assert "healthy" in shown.stdout
        line = json.loads(run("dead-letters", "list", "--json", *where).stdout)
        replayed = run("dead-letters", "replay", str(line["id"]), "--to-topic", *where, *base)
        assert (replayed.returncode, replayed.stdout) == (ExitCode.OK, "1 dead letter replayed\n"), replayed.stderr
        # Handled anew, and failed anew: a letter of its own.
        daemon.wait_caught_up({0: 3, 1: 0})
        letters = [json.loads(each) for each in run("dead-letters", "list", "--json", *where).stdout.splitlines()]
        assert [each["offset"] for each in letters] == [2]
        assert daemon.terminate() == 0
