"""A real PostgreSQL for tests: a server of its own in a temporary folder, which tests may stop, start and cut off."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import psycopg

from tests.kafka_broker import TEST_MARK_VARIABLE
from tests.waiting import wait_until

_USER = "postgres"
WITH_PASSWORD = "with_password"
"""The one user who is asked for a password, once it is created."""
START_SECONDS = 30.0

# As the brokers: gone when this process is, however that ends. A change of user takes PR_SET_PDEATHSIG back, so it
# comes first.
_DIE_WITH_PARENT = """
import ctypes, os, pwd, signal, sys
if os.geteuid() == 0:
    user = pwd.getpwnam(sys.argv[2])
    os.setgroups([])
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
ctypes.CDLL(None).prctl(1, signal.SIGQUIT)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[3], sys.argv[3:])
"""


def binaries() -> Path | None:
    """The folder of ``initdb`` and ``postgres``; the newest where there are several."""
    on_path = shutil.which("initdb")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None


def postgres_missing() -> str | None:
    """None where the tests on PostgreSQL can run, else one line that says what to install."""
    return None if binaries() else "no PostgreSQL found: install postgresql (its server) to run the tests that need it"


class PostgresServer:
    """Starts on entering, and is gone, with its files, on leaving. Data is synced to disk, as in production."""

    def __init__(self) -> None:
        found = binaries()
        if found is None:
            raise RuntimeError(postgres_missing())
        self._binaries = found
        self._folder = Path(tempfile.mkdtemp(prefix="kafkasrcd-postgres-"))
        self.port = _lasting_port()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "PostgresServer":
        data = self._folder / "data"
        if os.geteuid() == 0:
            shutil.chown(self._folder, _USER)  # the server refuses to run as root
        self._run("initdb", "-D", str(data), "-U", _USER, "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-N")
        with (data / "postgresql.conf").open("a") as settings:
            settings.write(
                f"listen_addresses = '127.0.0.1'\nport = {self.port}\nunix_socket_directories = '{self._folder}'\n"
                "shared_buffers = 32MB\nmax_connections = 60\nlog_min_messages = warning\n"
            )
        who = data / "pg_hba.conf"  # the first line that fits counts
        who.write_text(f"host all {WITH_PASSWORD} 127.0.0.1/32 scram-sha-256\n{who.read_text()}")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(immediate=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def url(self, database: str = _USER, user: str = _USER) -> str:
        """For ``store.url``; ``user`` may have a password behind a colon."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def create_database(self, name: str | None = None) -> str:
        """A new, empty database; its name."""
        name = name or f"test_{uuid.uuid4().hex[:12]}"
        self.execute(f'CREATE DATABASE "{name}"')
        return name

    def execute(self, sql: str, database: str = _USER) -> list[tuple[Any, ...]]:
        """Run one statement, committed by itself; its rows."""
        with psycopg.connect(self.url(database), autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []

    def start(self) -> None:
        """Start, and wait until it answers. A no-op where it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        command = [str(self._binaries / "postgres"), "-D", str(self._folder / "data")]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _DIE_WITH_PARENT, str(os.getpid()), _USER, *command],
                stdout=log,
                stderr=log,
                env={name: value for name, value in os.environ.items() if name != TEST_MARK_VARIABLE},
            )
        wait_until(
            lambda: self.execute("SELECT 1"),
            START_SECONDS,
            "PostgreSQL to answer",
            seen=lambda: (self._folder / "log").read_text()[-2000:],
            ignoring=(psycopg.Error,),
        )

    def stop(self, *, immediate: bool = False) -> None:
        """Stop: cut all connections and shut down cleanly (fast), or die as in a crash (``immediate``)."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT if immediate else signal.SIGINT)
            self._process.wait(START_SECONDS)

    def restart(self, *, immediate: bool = False) -> None:
        """Stop and start."""
        self.stop(immediate=immediate)
        self.start()

    def terminate_connections(self, database: str | None = None) -> int:
        """Cut all connections, or those to ``database``; how many."""
        only = "" if database is None else f"AND datname = '{database}'"
        return len(
            self.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                f"WHERE pid <> pg_backend_pid() AND backend_type = 'client backend' {only}"
            )
        )

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self._folder, **_as_postgres())
        assert done.returncode == 0, done.stderr


def _lasting_port() -> int:
    """One that is free, and stays so while the server is stopped: connections of others are given none below 32768."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


def _as_postgres() -> dict[str, Any]:
    return {"user": _USER, "group": _USER, "extra_groups": []} if os.geteuid() == 0 else {}
