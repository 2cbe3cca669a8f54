"""``kafkasrcd start``, ``status`` and ``stop``, run as people and systemd run them."""

import contextlib
import os
import pty
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import psutil
import pytest

from kafkasrcd.daemon import places
from kafkasrcd.daemon.control_client import ControlClient
from kafkasrcd.daemon.exit_codes import ExitCode
from kafkasrcd.daemon.status import HandlerStatus, PartitionStatus, Status, WorkerStatus
from kafkasrcd.errors import KafkasrcdError
from kafkasrcd.settings import Settings
from tests.kafka_cluster import KafkaCluster, Record
from tests.waiting import wait_until

KAFKASRCD = Path(sys.executable).with_name("kafkasrcd")
NO_BROKER = "127.0.0.1:1"
GROUP = "billing"
DEADLINE_SECONDS = 30.0
NOBODY = 65534


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Service:
    """A folder with a configuration and a handler, and the commands run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "run" / f"{GROUP}.sock"
        self.settings: dict[str, object] = {
            "brokers": NO_BROKER,
            "group_id": GROUP,
            "topics": ["orders"],
            "commit_interval_secs": 0.2,
            "handler.target": "handlers:handle",
            "handler.processes": 1,
            "store.url": "sqlite:///offsets.db",
            "supervisor.runtime_directory": "run",
        }
        self.handler = "def handle(message):\n    pass\n"
        self.environ: dict[str, str] = {}

    def run(self, *arguments: str) -> Ended:
        """A command, to its end."""
        ended = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    @contextlib.contextmanager
    def started(self, name: str = "log") -> Generator["Daemon"]:
        """``kafkasrcd start``, killed at the end if it still runs."""
        log = self.folder / name
        with log.open("wb") as file:
            process = subprocess.Popen(
                self.command("start"), cwd=self.folder, env=self.environment(), stdout=file, stderr=file
            )
        try:
            yield Daemon(self, process, log)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    @contextlib.contextmanager
    def running(self, state: str = "running") -> Generator["Daemon"]:
        """The same, waited for."""
        with self.started() as daemon:
            daemon.wait_status(lambda status: status.state == state, f"state {state}")
            yield daemon

    def command(self, *arguments: str) -> list[str | Path]:
        """The command line, with the files it needs written as they are set now."""
        lines = [f"{name} = {msgspec.json.encode(value).decode()}" for name, value in self.settings.items()]
        (self.folder / "kafkasrcd.toml").write_text("\n".join(lines))
        (self.folder / "handlers.py").write_text(self.handler)
        return [KAFKASRCD, *arguments]

    def environment(self) -> dict[str, str]:
        """This process's, without settings."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("KAFKASRCD_") or name.startswith("KAFKASRCD_TEST_")
        }
        return inherited | self.environ


class Daemon:
    """A ``kafkasrcd start`` and its log."""

    def __init__(self, service: Service, process: subprocess.Popen[bytes], log: Path) -> None:
        self.service = service
        self.process = process
        self.log = log

    def status(self) -> Status:
        client = ControlClient(self.service.socket)
        try:
            return client.status()
        finally:
            client.close()

    def wait_status(self, condition: Callable[[Status], object], describe: str) -> Status:
        last: list[Status] = []

        def fulfilled() -> object:
            assert self.process.poll() is None, f"it has ended: {self.log.read_text()}"
            last[:] = [self.status()]
            return condition(last[0])

        wait_until(
            fulfilled, DEADLINE_SECONDS, describe, seen=lambda: (last, self.log.read_text()), ignoring=(KafkasrcdError,)
        )
        return last[0]

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_SECONDS)

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        """The log's lines; one that is no event fails the test."""
        lines: list[dict[str, Any]] = []
        for line in self.log.read_bytes().splitlines():
            assert line.startswith(b"{"), f"no event: {line!r}"
            lines.append(msgspec.json.decode(line))
        return [line for line in lines if event in (None, line["event"])]

    def refusal(self) -> str:
        """What it ended with, which must be 78 and the only error there is."""
        assert self.process.wait(DEADLINE_SECONDS) == ExitCode.CONFIG, self.log.read_text()
        (line,) = [line for line in self.events() if line["level"] not in ("info", "debug")]
        assert (line["event"], line["exit_code"]) == ("ended", ExitCode.CONFIG)
        return str(line["message"])


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


@pytest.fixture
def topic(kafka: KafkaCluster, service: Service, topic_name: str) -> str:
    """A topic of two partitions, which the service consumes under a group of the same name."""
    kafka.create_topic(topic_name, partitions=2)
    service.settings |= {"brokers": kafka.bootstrap, "topics": [topic_name], "group_id": topic_name}
    service.settings |= {"supervisor.control_socket": str(service.socket)}
    return topic_name


class _Group(Protocol):
    group_id: str


class _Groups(Protocol):
    valid: list[_Group]


class _GroupAdmin(Protocol):
    """AdminClient as far as it is used here; its own annotation leaves out what the future holds."""

    def list_consumer_groups(self, *, request_timeout: float) -> Future[_Groups]: ...


def groups(admin: _GroupAdmin) -> set[str]:
    """Every group that the broker knows, empty ones as well."""
    return {group.group_id for group in admin.list_consumer_groups(request_timeout=20).result(20).valid}


# ── Nothing runs ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", [("status",), ("status", "--json"), ("stop",), ("stop", "--timeout", "1")])
@pytest.mark.parametrize("left_by_a_killed_daemon", [False, True])
def test_not_running_is_one_line_and_exit_3(
    service: Service, command: tuple[str, ...], left_by_a_killed_daemon: bool
) -> None:
    if left_by_a_killed_daemon:
        service.socket.parent.mkdir()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(service.socket))
    assert service.run(*command) == Ended(
        ExitCode.NOT_RUNNING, "", f"kafkasrcd: not running: no daemon listens at {service.socket}\n"
    )


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "soon"])
def test_a_timeout_of_no_length_is_a_wrong_command_line(service: Service, timeout: str) -> None:
    assert service.run("stop", "--timeout", timeout).code == ExitCode.USAGE


def test_status_and_stop_need_no_credentials_of_the_daemon(service: Service) -> None:
    service.settings['extra_config."sasl.password"'] = "${env:NOT_SET_HERE}"
    assert service.run("status").code == ExitCode.NOT_RUNNING
    assert service.run("stop").code == ExitCode.NOT_RUNNING


# ── Status ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_a_broker_the_status_says_so_in_one_line(service: Service) -> None:
    with service.running("joining") as daemon:
        daemon.wait_status(lambda status: status.problems, "the problem")
        ended = service.run("status")
        assert (ended.code, ended.err) == (0, "")
        first, second, *_ = ended.out.splitlines()
        assert first.startswith(f"{GROUP} joining, 1 problem: 0 partitions, ")
        assert re.fullmatch(
            rf"! no broker answers at {NO_BROKER} since \d\d:\d\d:\d\d \(.*\): start it, or check brokers and network",
            second,
        )
        assert len(daemon.events("broker_unreachable")) == 1
        assert daemon.terminate() == 0
        assert [line["event"] for line in daemon.events() if line["level"] == "info"] == [
            "starting",
            "stopping",
            "stopped",
        ]


FAILING_HANDLER = """
def handle(message):
    if message.payload == 7:
        raise ValueError("seven")
"""


def test_status_as_json_has_everything_and_it_is_true(kafka: KafkaCluster, topic: str, service: Service) -> None:
    service.handler = FAILING_HANDLER
    service.settings |= {"max_retries": 0, "handler.on_failure": "skip", "handler.processes": 2}
    began_ms = time.time() * 1000
    kafka.produce(topic, [Record(index % 2, b"key", b"%d" % index) for index in range(1_000)])
    with service.running() as daemon:
        daemon.wait_status(
            lambda status: [partition.committed for partition in status.partitions] == [500, 500], "all committed"
        )
        # Rates are sampled once a second, and the CPU's share is that since the question before.
        daemon.wait_status(lambda status: all(each.rate > 0 for each in status.partitions), "a rate")
        ended = service.run("status", "--json")
        assert (ended.code, ended.err, ended.out.count("\n")) == (0, "", 1)
        status = msgspec.json.decode(ended.out, type=Status)
        plain = msgspec.json.decode(ended.out)
        for part, shape in (
            (plain, Status),
            (plain["partitions"][0], PartitionStatus),
            (plain["partitions"][0]["worker"], WorkerStatus),
            (plain["handlers"][0], HandlerStatus),
        ):
            assert list(part) == [field.name for field in msgspec.structs.fields(shape)]

        now_ms = time.time() * 1000
        assert (status.group_id, status.state, status.pid, status.problems) == (
            topic,
            "running",
            daemon.process.pid,
            [],
        )
        assert began_ms <= status.started_ms <= status.now_ms <= now_ms
        assert status.rebalances == 1
        assert status.total_commits >= 1
        descendants = {child.pid: child for child in psutil.Process(daemon.process.pid).children(recursive=True)}
        for number, partition in enumerate(status.partitions):
            assert (partition.topic, partition.partition, partition.state) == (topic, number, "running")
            assert partition.problem == ""
            assert (partition.position, partition.processed, partition.committed) == (500, 500, 500)
            assert (partition.high_watermark, partition.lag) == (500, 0)
            assert partition.messages == 500
            assert partition.failures == number  # 7 is in partition 1
            assert partition.bytes == sum(3 + len(str(index)) for index in range(number, 1_000, 2))
            assert 0 < partition.rate < 5_000
            assert partition.bytes_rate > 0
            assert began_ms <= partition.since_ms <= now_ms
            assert partition.last_commit_ms is not None
            assert began_ms <= partition.last_commit_ms <= now_ms
            assert partition.worker.pid is not None
            seen = descendants[partition.worker.pid]
            assert seen.name() == f"ksrc-{number}-{topic}"[:15]
            assert partition.worker.rss_bytes == pytest.approx(seen.memory_info().rss, rel=0.5)
            assert 0 <= partition.worker.cpu_percent < 200
            assert partition.worker.restarts == 0
        assert sorted(partition.handlers for partition in status.partitions) == [[0], [1]]
        for slot, handler in enumerate(status.handlers):
            assert (handler.slot, handler.state, handler.partitions, handler.restarts) == (slot, "ready", 1, 0)
            assert handler.pid is not None
            assert handler.rss_bytes == pytest.approx(descendants[handler.pid].memory_info().rss, rel=0.5)

        killed = status.partitions[0].worker.pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        after = daemon.wait_status(
            lambda status: status.partitions[0].worker.restarts == 1 and status.partitions[0].state == "running",
            "a restarted worker",
        )
        assert after.partitions[0].worker.pid not in (None, killed)
        assert after.partitions[0].messages == 500
        assert after.partitions[1].worker.restarts == 0
        assert after.rebalances == 1
        assert daemon.terminate() == 0


def test_status_for_people_has_a_line_a_partition_and_one_for_what_is_wrong(
    kafka: KafkaCluster, topic: str, service: Service
) -> None:
    service.handler = FAILING_HANDLER
    service.settings |= {"max_retries": 0, "handler.on_failure": "stop"}
    kafka.produce(topic, [Record(index % 2, None, b"%d" % index) for index in range(20)])
    with service.running() as daemon:
        daemon.wait_status(
            lambda status: (
                [(each.state, each.lag, each.committed) for each in status.partitions]
                == [("running", 0, 10), ("failed", 7, 3)]
            ),
            "one failed partition, whose lag is what is behind the failed record",
        )
        ended = service.run("status")
        assert (ended.code, ended.err) == (0, "")
        lines = ended.out.splitlines()
        assert lines[0].startswith(f"{topic} running, 1 problem: 2 partitions, ")
        (wrong,) = [line for line in lines if line.startswith("!")]
        assert re.match(rf"! {topic}\[1\] failed since \d\d:\d\d:\d\d \(\d+ s\): offset 3: .*seven", wrong)
        assert "restart" in wrong
        for number, state in enumerate(("running", "failed")):
            (row,) = [line for line in lines if re.match(rf"{topic}\[{number}\] +{state} ", line)]
            assert row.split()[3:6] == [["10", "10", "0"], ["3", "3", "7"]][number]
        assert daemon.terminate() == 0


# ── Stop ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

SLOW_HANDLER = """
import os, time

def handle(message):
    with open("handled", "a") as file:
        file.write(f"{message.offset}\\n")
    time.sleep(0.3)
"""


def test_stop_drains_and_returns_when_the_process_is_gone(kafka: KafkaCluster, topic: str, service: Service) -> None:
    service.handler = SLOW_HANDLER
    kafka.produce(topic, [Record(0, None, b"1")] * 100)
    handled = service.folder / "handled"
    with service.running() as daemon:
        wait_until(lambda: handled.exists() and len(handled.read_text().split()) > 1, DEADLINE_SECONDS, "two records")
        assert service.run("stop") == Ended(0, "", "")
        # A zombie at most: poll reaps it without waiting.
        assert daemon.process.poll() == 0
        assert not service.socket.exists()
        (stopped,) = daemon.events("stopped")
        assert stopped["message"] == "everything processed is recorded"
    done = len(handled.read_text().split())
    assert 2 <= done < 100
    assert kafka.committed(topic, topic)[0] == done
    # In order, and nothing twice, also with a second run.
    with service.running():
        wait_until(lambda: len(handled.read_text().split()) > done + 1, DEADLINE_SECONDS, "two more")
        assert service.run("stop").code == 0
    offsets = list(map(int, handled.read_text().split()))
    assert offsets == list(range(len(offsets)))


def test_stop_says_when_the_drain_takes_too_long_and_a_second_one_ends_it(
    kafka: KafkaCluster, topic: str, service: Service
) -> None:
    service.handler = SLOW_HANDLER.replace("0.3", "60")
    kafka.produce(topic, [Record(0, None, b"1")] * 2)
    with service.running() as daemon:
        wait_until((service.folder / "handled").exists, DEADLINE_SECONDS, "a record in the handler's hands")
        ended = service.run("stop", "--timeout", "0.5")
        assert (ended.code, ended.out) == (ExitCode.FAILURE, "")
        assert ended.err == "kafkasrcd: still draining after 0.5 s; `kafkasrcd stop` again ends the drain now\n"
        assert daemon.status().state == "stopping"
        assert service.run("stop") == Ended(0, "", "")
        assert daemon.process.poll() == 0
    assert kafka.committed(topic, topic).get(0, 0) == 0


# ── Starting twice, and what lies at the socket's path ───────────────────────────────────────────────────────────────


def test_a_second_daemon_is_refused_and_the_first_stays_reachable(service: Service) -> None:
    with service.running("joining") as first:
        with service.started("second") as second:
            assert second.refusal() == (
                f"another kafkasrcd listens at {service.socket}: stop it, or set supervisor.control_socket"
            )
        assert first.status().pid == first.process.pid
        assert service.run("stop").code == 0


def test_of_several_started_at_once_one_runs(service: Service) -> None:
    with contextlib.ExitStack() as stack:
        daemons = [stack.enter_context(service.started(f"log{number}")) for number in range(4)]
        wait_until(lambda: sum(daemon.process.poll() is None for daemon in daemons) == 1, DEADLINE_SECONDS, "one left")
        (left,) = [daemon for daemon in daemons if daemon.process.poll() is None]
        assert left.wait_status(lambda status: status.state == "joining", "its status").pid == left.process.pid
        for daemon in daemons:
            if daemon is not left:
                assert daemon.refusal().startswith("another kafkasrcd listens at ")
        assert left.terminate() == 0


def test_the_socket_of_a_killed_daemon_is_replaced(service: Service) -> None:
    with service.running("joining") as killed:
        killed.process.kill()
        killed.process.wait()
    assert service.socket.is_socket()
    with service.running("joining") as daemon:
        assert daemon.status().pid == daemon.process.pid
        assert daemon.terminate() == 0
    assert not service.socket.exists()


def test_a_file_that_is_no_socket_is_left_alone(service: Service) -> None:
    precious = service.folder / "precious"
    precious.write_text("years of work")
    service.settings["supervisor.control_socket"] = "precious"
    with service.started() as daemon:
        assert daemon.refusal() == (
            f"{precious} is no socket and is left alone: set supervisor.control_socket to another path"
        )
    assert precious.read_text() == "years of work"


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("runtime_directory", "kafkasrcd.toml", "File exists"),
        ("runtime_directory", "kafkasrcd.toml/run", "Not a directory"),
        ("runtime_directory", "/proc/nowhere", "No such file or directory"),
        ("control_socket", "x" * 100 + "/" + "y" * 20, "AF_UNIX path too long"),
        ("control_socket", ".", "Is a directory"),
    ],
)
def test_a_place_that_cannot_be_used_is_named(service: Service, setting: str, value: str, reason: str) -> None:
    service.settings[f"supervisor.{setting}"] = value
    with service.started() as daemon:
        said = daemon.refusal()
    assert f"({reason})" in said or "is no socket" in said
    assert str(service.folder / value).rstrip("/.") in said
    assert "set supervisor.control_socket" in said
    # Whoever asks hears that nothing runs.
    assert service.run("status").code == ExitCode.NOT_RUNNING


def test_the_daemon_does_not_use_a_folder_in_which_another_user_could_replace_its_socket(service: Service) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    service.socket.parent.mkdir()
    os.chown(service.socket.parent, NOBODY, NOBODY)
    with service.started() as daemon:
        assert "belongs to another user" in daemon.refusal()


def test_where_the_service_may_not_be_looked_for_it_is_not_said_to_be_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(_path: Path) -> bool:
        raise PermissionError

    monkeypatch.setattr(places, "_SERVICE_DIRECTORY", tmp_path)
    environ = {"XDG_RUNTIME_DIR": "/run/user/7"}
    assert places.control_path(Settings(), tmp_path, environ) == Path("/run/user/7/kafkasrcd/kafkasrcd.sock")
    monkeypatch.setattr(Path, "exists", refuse)
    assert places.control_path(Settings(), tmp_path, environ) == tmp_path / "kafkasrcd.sock"


# ── A handler that cannot be used ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (None, "there is no module 'handlers' in handler.path or installed"),
        ("import nowhere_to_be_found", "its module imports 'nowhere_to_be_found', not installed"),
        ("def handel(message): ...", "module 'handlers' has no 'handle'; it has handel"),
        ("handle = 3", "is a int, not a function"),
        ("def handle(): ...", "a handler takes one argument"),
        ("def handle(message, other): ...", "a handler takes one argument"),
        ("def handle(message: int): ...", "takes int; a handler takes one argument"),
        ("def handle(message: 'Nowhere'): ...", "its annotation cannot be resolved"),
        ("def handle(message)", "SyntaxError"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("import os; os._exit(9)", "a handler process ended with exit code 9 while importing its target"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with SIGSEGV while importing"),
    ],
)
def test_a_handler_that_cannot_be_used_ends_the_start_before_the_group_is_joined(
    kafka: KafkaCluster, topic: str, service: Service, handler: str | None, said: str
) -> None:
    service.handler = handler or ""
    service.settings["handler.processes"] = 3
    if handler is None:
        service.settings["handler.target"] = "handlers_of_another_name:handle"
        said = said.replace("handlers", "handlers_of_another_name")
    with service.started() as daemon:
        assert said in daemon.refusal()
    assert topic not in groups(kafka.admin)


def test_a_group_that_is_joined_is_seen_by_the_check_above(kafka: KafkaCluster, topic: str, service: Service) -> None:
    with service.running() as daemon:
        assert topic in groups(kafka.admin)
        assert daemon.terminate() == 0


# ── Who may ask, and what ────────────────────────────────────────────────────────────────────────────────────────────


def ask(path: Path, request: bytes) -> Iterator[bytes]:
    """The answers to a request, until the daemon hangs up."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as lines, contextlib.suppress(ConnectionResetError):
            yield from lines


@pytest.fixture(scope="module")
def joining() -> Iterator[Daemon]:
    """A daemon that waits for a broker, in a folder that every user may enter."""
    with tempfile.TemporaryDirectory(prefix="kafkasrcd-test-") as folder:
        os.chmod(folder, 0o755)
        service = Service(Path(folder))
        with service.running("joining") as daemon:
            yield daemon
            assert daemon.status().pid == daemon.process.pid
            assert daemon.terminate() == 0
            assert [line for line in daemon.events() if "Traceback" in str(line)] == []


def test_the_socket_is_for_user_and_group(joining: Daemon) -> None:
    path = joining.service.socket
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750


AS_NOBODY = """
import contextlib, os, socket, sys
os.setgroups([int(group) for group in sys.argv[2].split()])
os.setgid(65534)
os.setuid(65534)
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(b'{"command": "status"}\\n')
    print(connection.makefile().readline())
"""


def as_nobody(path: Path, groups: str = "") -> Ended:
    if os.geteuid() != 0:
        pytest.skip("only root can become nobody")
    ended = subprocess.run([sys.executable, "-c", AS_NOBODY, path, groups], capture_output=True, text=True, timeout=30)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def test_other_users_cannot_connect(joining: Daemon) -> None:
    assert "PermissionError" in as_nobody(joining.service.socket).err


def test_members_of_the_group_may_ask(joining: Daemon) -> None:
    assert as_nobody(joining.service.socket, str(os.getegid())).out.startswith('{"version":1,')


def test_a_peer_that_got_in_is_still_refused(joining: Daemon) -> None:
    path = joining.service.socket
    with opened_to_all(path):
        assert as_nobody(path).out == '{"error":"only root, the daemon\'s user and its group may ask"}\n\n'


@contextlib.contextmanager
def opened_to_all(path: Path) -> Generator[None]:
    os.chmod(path.parent, 0o755)
    os.chmod(path, 0o666)
    try:
        yield
    finally:
        os.chmod(path.parent, 0o750)
        os.chmod(path, 0o660)


@pytest.mark.parametrize(
    ("garbage", "said"),
    [
        (b"\n", "not a request"),
        (b"status\n", "not a request"),
        (b"\x00\xff\xfe\n", "not a request"),
        (b'"\xff"\n', "not a request"),
        (b"GET / HTTP/1.1\n", "not a request"),
        (b"[" * 50_000 + b"\n", "not a request"),
        (b"{}\n", "missing required field `command`"),
        (b'{"command": 1}\n', "Expected `str`, got `int`"),
        (b'{"command": "status", "force": true}\n', "unknown field `force`"),
        (b'{"command": "explode"}\n', "unknown command 'explode'; known are status, stop"),
        (b'{"command": "status"', "not a request"),
        (b"x" * 1_000_000, "a line of more than 65536 bytes is no request"),
        (b"x" * 100_000 + b"\n", "a line of more than 65536 bytes is no request"),
    ],
)
def test_garbage_is_answered_with_an_error(joining: Daemon, garbage: bytes, said: str) -> None:
    (answer,) = ask(joining.service.socket, garbage)
    error = msgspec.json.decode(answer, type=dict[str, str])
    assert list(error) == ["error"]
    assert said in error["error"]
    assert joining.status().state == "joining"


def test_a_connection_goes_on_after_an_error(joining: Daemon) -> None:
    first, second, third = ask(joining.service.socket, b'nonsense\n{"command": "status"}\n{"command": "status"}\n')
    assert first.startswith(b'{"error"')
    assert msgspec.json.decode(second, type=Status).pid == msgspec.json.decode(third, type=Status).pid


def test_a_connection_that_reads_nothing_holds_up_nobody(joining: Daemon) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(joining.service.socket))
        silent.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while True:
                silent.sendall(b'{"command": "status"}\n' * 100)
        assert joining.status().state == "joining"


def test_many_connections_at_once(joining: Daemon) -> None:
    path = str(joining.service.socket)
    before = descriptors(joining)
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(150)]
        for connection in connections:
            connection.settimeout(10)
            connection.connect(path)
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(b'{"command": "status"}\n')
            time.sleep(0.001)  # the kernel queues 100 that are not accepted yet
        answers = [connection.recv(65536) for connection in connections]
        assert [answer.startswith(b'{"version":1') for answer in answers] == [True] * 100 + [False] * 50
        assert {bytes(answer) for answer in answers[100:]} == {b'{"error":"100 others are connected already"}\n'}
        ended = joining.service.run("status")
        assert (ended.code, ended.err) == (ExitCode.FAILURE, "kafkasrcd: 100 others are connected already\n")
    # Those that have hung up make room.
    wait_until(lambda: joining.service.run("status").code == 0, 10, "room for another")
    wait_until(lambda: descriptors(joining) <= before, 10, "descriptors given back")


def descriptors(daemon: Daemon) -> int:
    return psutil.Process(daemon.process.pid).num_fds()


def test_connections_that_stay_open_do_not_hold_up_the_end(service: Service) -> None:
    with service.running("joining") as daemon, socket.socket(socket.AF_UNIX) as idle:
        idle.connect(str(service.socket))
        idle.sendall(b'{"command": "status"}\n{"comm')
        assert idle.recv(10)
        assert daemon.terminate() == 0
        assert {line["event"] for line in daemon.events()} <= {
            "starting",
            "group_error",
            "broker_unreachable",
            "stopping",
            "stopped",
        }


# ── The log ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_line_of_the_log_is_an_event(kafka: KafkaCluster, topic: str, service: Service) -> None:
    service.handler = FAILING_HANDLER
    service.settings |= {"max_retries": 1, "retry_backoff_ms": 1, "handler.on_failure": "skip"}
    service.settings["supervisor.log_level"] = "debug"
    kafka.produce(topic, [Record(0, None, value) for value in (b"1", b"7", b"not json")])
    with service.running() as daemon:
        status = daemon.wait_status(
            lambda status: sum(each.committed or 0 for each in status.partitions) == 3, "all committed"
        )
        for pid in (status.partitions[0].worker.pid, status.handlers[0].pid):
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        daemon.wait_status(
            lambda status: status.partitions[0].worker.restarts + status.handlers[0].restarts == 2, "both restarted"
        )
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: daemon.events("reload_declined"), 10, "an answer to SIGHUP")
        assert daemon.terminate() == 0
        lines = daemon.events()
    for line in lines:
        assert list(line)[:4] == ["time", "level", "event", "message"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["level"] in ("debug", "info", "warning", "error")
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", line["event"])
        assert line["message"]
    names = [line["event"] for line in lines]
    assert {"starting", "assigned", "partition_state", "ready", "worker_died", "handler_died", "stopped"} <= set(names)
    assert names[-1] == "stopped"
    assert "defect" not in names


def test_secrets_are_in_no_log_and_no_status(kafka: KafkaCluster, service: Service) -> None:
    secrets = {"SASL": "sasl-hunter2", "KEY": "key-hunter2"}
    service.environ |= secrets
    service.settings |= {
        "brokers": kafka.bootstrap,
        "supervisor.log_level": "debug",
        'extra_config."security.protocol"': "sasl_plaintext",
        'extra_config."sasl.mechanism"': "PLAIN",
        'extra_config."sasl.username"': "billing",
        'extra_config."sasl.password"': "${env:SASL}",
        'extra_config."ssl.key.password"': "${env:KEY}",
    }
    with service.running("joining") as daemon:
        daemon.wait_status(lambda status: status.problems, "a broker that refuses us")
        said = [service.run("status"), service.run("status", "--json"), service.run("config", "show")]
        supervisor = psutil.Process(daemon.process.pid)
        arguments = [process.cmdline() for process in (supervisor, *supervisor.children(recursive=True))]
        assert daemon.terminate() == 0
    everything = f"{said} {arguments} {daemon.log.read_text()}"
    assert "billing" in everything
    assert "hunter2" not in everything


def test_a_store_password_is_not_repeated(service: Service) -> None:
    service.settings["store.url"] = "mysql://billing:hunter2@db/offsets"
    ended = service.run("start")
    assert ended.code == ExitCode.CONFIG
    assert "store.url: expected sqlite:///path, postgresql://user@host/database or memory://" in ended.err
    assert "hunter2" not in ended.err + ended.out


# ── In a terminal ────────────────────────────────────────────────────────────────────────────────────────────────────

IN_A_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """The command in a terminal of its own, and what it has shown."""

    def __init__(self, service: Service) -> None:
        self._ours, theirs = pty.openpty()
        # Nothing echoed; and a Ctrl-C does not throw away what is written and not shown yet.
        attributes = termios.tcgetattr(theirs)
        attributes[3] = attributes[3] & ~termios.ECHO | termios.NOFLSH
        termios.tcsetattr(theirs, termios.TCSANOW, attributes)
        command = [sys.executable, "-c", IN_A_TERMINAL, *service.command("start")]
        self.process = subprocess.Popen(
            command, cwd=service.folder, env=service.environment(), stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        self._shown = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def shown(self) -> str:
        return self._shown.decode().replace("\r\n", "\n")

    def press_ctrl_c(self) -> None:
        """The kernel's terminal sends SIGINT to every process in the foreground."""
        os.write(self._ours, b"\x03")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(10)
        os.close(self._ours)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has it open any more
            while True:
                self._shown += os.read(self._ours, 65536)


@pytest.mark.parametrize("presses", [1, 2, 20])
def test_ctrl_c_ends_it_cleanly(kafka: KafkaCluster, topic: str, service: Service, presses: int) -> None:
    service.handler = SLOW_HANDLER
    kafka.produce(topic, [Record(index % 2, None, b"1") for index in range(100)])
    handled = service.folder / "handled"
    terminal = Terminal(service)
    try:
        wait_until(lambda: "running, 2 partitions assigned" in terminal.shown, DEADLINE_SECONDS, "it to run")
        wait_until(lambda: handled.exists() and len(handled.read_text().split()) > 1, DEADLINE_SECONDS, "two records")
        for _ in range(presses):
            terminal.press_ctrl_c()
            time.sleep(0.02)
        assert terminal.process.wait(DEADLINE_SECONDS) == 0
    finally:
        terminal.close()
    assert "Traceback" not in terminal.shown
    assert "KeyboardInterrupt" not in terminal.shown
    *lines, last = terminal.shown.splitlines()
    assert last.endswith("everything processed is recorded")
    for line in lines:
        assert re.match(r"\d\d:\d\d:\d\d (info |warning|error) ", line), line
