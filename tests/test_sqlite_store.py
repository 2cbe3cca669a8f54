"""What only the SQLite store can get wrong: other processes, sudden death, and the file itself."""

import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from kafkasrcd.errors import ConfigurationError, StoreUnavailable
from kafkasrcd.storage.offset_store import Advance, OffsetStore, TopicPartition
from kafkasrcd.storage.opening import open_store
from kafkasrcd.storage.schema import HEAD
from tests import store_processes
from tests.store_processes import BUSY_TIMEOUT_MS, CONTENDED, GROUP, PARTITIONS, TURNS

FIRST = PARTITIONS[0]
PROCESSES = 8
KILLS = 6
NOT_A_DATABASE = b"Just a text file.\n"

spawn = get_context("spawn")


def start(target: Callable[..., None], *arguments: str) -> tuple[BaseProcess, Connection]:
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=target, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def answer(process: BaseProcess, pipe: Connection) -> Any:
    """What the process sends before it ends well."""
    with closing(pipe):
        assert pipe.poll(60), "the process says nothing"
        said = pipe.recv()
    process.join(10)
    assert process.exitcode == 0
    return said


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "offsets.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def store(url: str) -> Iterator[OffsetStore]:
    with closing(open_store(url, GROUP, BUSY_TIMEOUT_MS)) as opened:
        yield opened


class TestTheFile:
    def test_is_for_its_owner_only(self, store: OffsetStore, path: Path) -> None:
        store.claim([FIRST], "host-a")
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
        assert modes == dict.fromkeys(["offsets.db", "offsets.db-wal", "offsets.db-shm"], 0o600)

    def test_keeps_the_mode_that_it_was_given(self, url: str, path: Path) -> None:
        open_store(url, GROUP, BUSY_TIMEOUT_MS).close()
        path.chmod(0o640)
        open_store(url, GROUP, BUSY_TIMEOUT_MS).close()
        assert stat.S_IMODE(path.stat().st_mode) == 0o640

    def test_is_one_file_once_closed(self, url: str, path: Path) -> None:
        store = open_store(url, GROUP, BUSY_TIMEOUT_MS)
        store.claim([FIRST], "host-a")
        store.close()
        assert [file.name for file in path.parent.iterdir()] == ["offsets.db"]

    def test_a_relative_path_stays_where_it_was(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with closing(open_store("sqlite:///offsets.db", GROUP, BUSY_TIMEOUT_MS)) as store:
            monkeypatch.chdir("/")
            store.claim([FIRST], "host-a")
        assert (tmp_path / "offsets.db").exists()

    def test_holds_several_groups_apart(self, store: OffsetStore, url: str) -> None:
        with closing(open_store(url, "audit", BUSY_TIMEOUT_MS)) as other:
            mine = store.claim([FIRST], "host-a")[FIRST].assignment_epoch
            assert store.advance([Advance(FIRST, mine, 120)]) == {}
            assert other.offsets() == []
            assert other.claim([FIRST], "host-b")[FIRST].next_offset is None
            assert store.advance([Advance(FIRST, mine, 121)]) == {}
            assert store.restart({FIRST: (mine, 5)}) == {}
            assert [row.next_offset for row in other.offsets()] == [None]

    def test_an_empty_file_becomes_a_store(self, url: str, path: Path) -> None:
        path.parent.mkdir()
        path.touch()
        with closing(open_store(url, GROUP, BUSY_TIMEOUT_MS)) as store:
            assert store.claim([FIRST], "host-a")[FIRST].assignment_epoch == 1


class TestRefusedAtStart:
    @pytest.mark.parametrize("contents", [NOT_A_DATABASE, NOT_A_DATABASE * 1000], ids=["small", "large"])
    def test_a_file_that_is_no_database(self, url: str, path: Path, contents: bytes) -> None:
        path.parent.mkdir()
        path.write_bytes(contents)
        with pytest.raises(ConfigurationError, match=r"offsets\.db is not a SQLite database; .* store\.url"):
            open_store(url, GROUP, BUSY_TIMEOUT_MS)
        assert path.read_bytes() == contents

    def test_a_database_of_something_else(self, url: str, path: Path) -> None:
        path.parent.mkdir()
        with closing(sqlite3.connect(path)) as foreign:
            foreign.execute("CREATE TABLE offsets (id INTEGER)")
        before = path.read_bytes()
        with pytest.raises(ConfigurationError, match=r"offsets\.db holds other tables \(offsets\).* store\.url"):
            open_store(url, GROUP, BUSY_TIMEOUT_MS)
        assert path.read_bytes() == before

    def test_a_database_of_a_newer_kafkasrcd(self, url: str, path: Path) -> None:
        open_store(url, GROUP, BUSY_TIMEOUT_MS).close()
        with closing(sqlite3.connect(path)) as newer, newer:
            newer.execute("UPDATE kafkasrcd_version SET version_num = ?", (f"{int(HEAD) + 1:04}",))
        with pytest.raises(ConfigurationError, match=rf"offsets\.db.*schema {int(HEAD) + 1:04}, .*: upgrade"):
            open_store(url, GROUP, BUSY_TIMEOUT_MS)

    def test_a_folder(self, url: str, path: Path) -> None:
        path.mkdir(parents=True)
        with pytest.raises(ConfigurationError, match=r"offsets\.db cannot be opened"):
            open_store(url, GROUP, BUSY_TIMEOUT_MS)

    def test_a_file_where_the_folder_should_be(self, url: str, path: Path) -> None:
        path.parent.touch()
        with pytest.raises(ConfigurationError, match=r"offsets\.db cannot be used .*; the daemon's user"):
            open_store(url, GROUP, BUSY_TIMEOUT_MS)

    def test_a_damaged_database(self, url: str, path: Path) -> None:
        with closing(open_store(url, GROUP, BUSY_TIMEOUT_MS)) as store:
            store.claim(PARTITIONS, "host-a")
        with path.open("r+b") as file:
            file.seek(100)
            file.write(b"\xff" * 3_000)
        with pytest.raises(ConfigurationError, match=r"offsets\.db is damaged; restore it"):
            open_store(url, GROUP, BUSY_TIMEOUT_MS)

    @pytest.mark.parametrize("folder_mode", [0o555, 0o777], ids=["folder read-only", "folder writable"])
    def test_a_file_that_may_only_be_read(self, folder_mode: int) -> None:
        # Not in tmp_path, whose parents another user may not enter.
        folder = Path(tempfile.mkdtemp())
        try:
            open_store(f"sqlite:///{folder}/offsets.db", GROUP, BUSY_TIMEOUT_MS).close()
            (folder / "offsets.db").chmod(0o444)
            process, pipe = start(store_processes.open_read_only, str(folder), oct(folder_mode))
            kind, said = answer(process, pipe)
        finally:
            folder.chmod(0o700)
            shutil.rmtree(folder)
        assert kind == "ConfigurationError"
        assert f"{folder}/offsets.db" in said
        assert "the daemon's user must be able to write it and its folder" in said


class TestUnavailable:
    def test_while_another_process_holds_the_lock(self, url: str, path: Path) -> None:
        with closing(open_store(url, GROUP, 50)) as store:
            mine = store.claim([FIRST], "host-a")[FIRST].assignment_epoch
            with closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                with pytest.raises(StoreUnavailable, match=r"offsets\.db was locked .* 50 ms .*store\.busy_timeout_ms"):
                    store.advance([Advance(FIRST, mine, 1)])
                with pytest.raises(StoreUnavailable):
                    store.claim([FIRST], "host-a")
                assert [row.next_offset for row in store.offsets()] == [None]  # Reading waits for nobody.
            assert store.advance([Advance(FIRST, mine, 1)]) == {}

    def test_opening_waits_for_one_who_is_creating_the_file(self, url: str, path: Path) -> None:
        # SQLite itself does not wait here: it answers "locked" at once when the write-ahead log is to be turned on.
        path.parent.mkdir()
        with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
            other.execute("BEGIN IMMEDIATE")
            released = threading.Timer(0.2, other.rollback)
            released.start()
            with closing(open_store(url, GROUP, BUSY_TIMEOUT_MS)) as store:
                assert store.claim([FIRST], "host-a")[FIRST].assignment_epoch == 1
            released.join()
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(StoreUnavailable, match=r"offsets\.db was locked .* 50 ms"):
                open_store(url, GROUP, 50)

    def test_while_the_file_is_gone(self, store: OffsetStore, path: Path) -> None:
        mine = store.claim([FIRST], "host-a")[FIRST].assignment_epoch
        elsewhere = path.parent.rename(path.parent.with_name("elsewhere"))
        with pytest.raises(StoreUnavailable, match=r"offsets\.db was moved, deleted or replaced"):
            store.advance([Advance(FIRST, mine, 1)])
        path.parent.mkdir()
        path.touch()
        with pytest.raises(StoreUnavailable, match=r"offsets\.db was moved, deleted or replaced"):
            store.claim([FIRST], "host-a")
        shutil.rmtree(path.parent)
        elsewhere.rename(path.parent)
        assert store.advance([Advance(FIRST, mine, 1)]) == {}

    def test_at_the_file_size_limit_and_resumes(self, url: str) -> None:
        said = answer(*start(store_processes.meet_the_file_size_limit, url))
        assert "offsets.db had an input/output error" in said
        assert "ulimit -f" in said

    def test_with_the_disk_full_and_resumes(self, tmp_path: Path) -> None:
        own_mounts = ["unshare", "--user", "--map-root-user", "--mount"]
        if subprocess.run([*own_mounts, "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode:
            pytest.skip("this kernel lets nobody mount in a user namespace; the file size limit is tested all the same")
        done = subprocess.run(
            [*own_mounts, sys.executable, "-m", "tests.store_processes", str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        assert done.returncode == 0, done.stderr
        assert "offsets.db has no room to grow; free space" in done.stdout

    def test_where_no_file_can_be_created_for_want_of_space(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_space(*_arguments: object) -> int:
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr("kafkasrcd.storage.sqlite.os.open", no_space)
        with pytest.raises(StoreUnavailable, match=r"offsets\.db cannot be used \(No space left"):
            open_store(f"sqlite:///{tmp_path}/offsets.db", GROUP, BUSY_TIMEOUT_MS)


class TestProcesses:
    def test_claim_and_advance_at_once_from_before_the_file_exists(self, url: str) -> None:
        started = [start(store_processes.claim_and_advance, url, f"host-{number}") for number in range(PROCESSES)]
        for _, pipe in started:
            pipe.send("go")
        answers: list[tuple[store_processes.Epochs, dict[TopicPartition, int]]]
        answers = [answer(process, pipe) for process, pipe in started]
        with closing(open_store(url, GROUP, BUSY_TIMEOUT_MS)) as store:
            rows = {row.topic_partition: row for row in store.offsets()}
        for each in CONTENDED:
            given = [epochs[each] for epochs, _ in answers]
            assert all(epochs == sorted(epochs) for epochs in given)
            assert sorted(chain.from_iterable(given)) == list(range(1, PROCESSES * TURNS + 1))
            # Every accepted advance moved by one from what its claim read: one lost or doubled would show here.
            assert rows[each].next_offset == sum(accepted[each] for _, accepted in answers)

    def test_sigkill_amid_writes_leaves_all_or_nothing(self, url: str, path: Path) -> None:
        chance = random.Random(8)
        for number in range(1, KILLS + 1):
            victim, pipe = start(store_processes.advance_until_killed, url)
            assert pipe.poll(60)
            assert pipe.recv() == number, "an epoch was given out twice, or lost"
            acknowledged = pipe.recv()
            time.sleep(chance.uniform(0, 0.1))
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)
            victim.join(10)
            try:
                while True:
                    acknowledged = pipe.recv()
            except EOFError:
                pipe.close()
            with closing(open_store(url, GROUP, BUSY_TIMEOUT_MS)) as store:
                (next_offset,) = {row.next_offset for row in store.offsets()}
            assert next_offset in (acknowledged, acknowledged + 1)
            with closing(sqlite3.connect(path)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]

    def test_two_hundred_partitions_are_one_small_write(self, store: OffsetStore) -> None:
        """1 ms where it was measured; statement by statement through SQLAlchemy it is 30 and more."""
        many = [TopicPartition("clicks", partition) for partition in range(200)]
        claims = store.claim(many, "host-a")
        times: list[float] = []
        for next_offset in range(20):
            started = time.perf_counter()
            assert store.advance(Advance(each, claims[each].assignment_epoch, next_offset) for each in many) == {}
            times.append(time.perf_counter() - started)
        assert median(times) < 0.02
