"""What systemd hears from a real daemon, from its start to its end, on a socket as systemd holds it."""

import contextlib
import os
import re
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from kafkasrcd.daemon.exit_codes import ExitCode
from tests.daemon_process import DEADLINE_SECONDS, QUICK_SESSION, DaemonProcess
from tests.kafka_cluster import KafkaCluster, Record
from tests.unit_sandbox import unit_lines
from tests.waiting import wait_until

NO_BROKER = "127.0.0.1:1"
CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: unix(7), SCM_CREDENTIALS
WATCHDOG_SECONDS = 1.5

SLOW_TO_IMPORT = "import time\ntime.sleep(1.5)\ndef handle(message): pass\n"
FAILS_AT_THREE = "def handle(message):\n    if message.payload == 3: raise ValueError('three')\n"
SHOWS_ENVIRONMENT = "import os\nprint('sees', *sorted(os.environ), flush=True)\ndef handle(message): pass\n"


class Heard(NamedTuple):
    at: float
    pid: int
    fields: dict[str, str]


class Systemd:
    """The receiving end of NOTIFY_SOCKET; the kernel tells it who speaks, as it tells systemd for NotifyAccess=."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard: list[Heard] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(path))
        self._closing = os.eventfd(0)
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()

    def values(self, field: str) -> list[str]:
        """What was said of ``field`` so far, in order."""
        return [heard.fields[field] for heard in list(self.heard) if field in heard.fields]

    def times(self, field: str) -> list[float]:
        """When something was said of it, by ``time.monotonic``."""
        return [heard.at for heard in list(self.heard) if field in heard.fields]

    def wait(self, field: str, pattern: str = ".*", deadline_seconds: float = DEADLINE_SECONDS) -> str:
        """Until a value of ``field`` matches ``pattern`` as a whole; that value."""
        return wait_until(
            lambda: next((value for value in self.values(field) if re.fullmatch(pattern, value)), ""),
            deadline_seconds,
            f"{field}={pattern}",
            seen=lambda: [heard.fields for heard in self.heard],
        )

    def close(self) -> None:
        os.eventfd_write(self._closing, 1)
        self._thread.join()
        self._socket.close()
        os.close(self._closing)

    def _receive(self) -> None:
        poller = select.poll()  # select() would take no descriptor above 1023
        poller.register(self._socket, select.POLLIN)
        poller.register(self._closing, select.POLLIN)
        while self._closing not in [descriptor for descriptor, _ in poller.poll()]:
            message, ancillary, _, _ = self._socket.recvmsg(8192, socket.CMSG_SPACE(CREDENTIALS.size))
            (pid,) = [CREDENTIALS.unpack(data)[0] for _, kind, data in ancillary if kind == socket.SCM_CREDENTIALS]
            lines = [line.partition("=") for line in message.decode().split("\n")]
            self.heard.append(Heard(time.monotonic(), pid, {name: value for name, _, value in lines}))


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    receiver = Systemd(tmp_path / "notify")
    yield receiver
    receiver.close()


@pytest.fixture
def topic(kafka: KafkaCluster, topic_name: str) -> str:
    kafka.create_topic(topic_name, partitions=2)
    return topic_name


def daemon_of(
    systemd: Systemd, brokers: str, topic: str, *, handler: str = "def handle(message): pass\n", watchdog: str = ""
) -> DaemonProcess:
    """A daemon under that systemd, with a handler of this source."""
    folder = systemd.path.parent
    (folder / "notified_handler.py").write_text(handler)
    environment = {"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": watchdog}
    settings = (*QUICK_SESSION, "handler.processes=1", "max_retries=0", "handler.on_failure=stop")
    return DaemonProcess(folder, brokers, topic, "notified_handler:handle", settings=settings, environment=environment)


def test_ready_comes_when_the_group_is_joined_and_every_worker_runs(
    kafka: KafkaCluster, topic: str, systemd: Systemd
) -> None:
    with daemon_of(systemd, kafka.bootstrap, topic, handler=SLOW_TO_IMPORT) as daemon:
        daemon.wait_status(lambda status: status.state == "starting", "it to be importing")
        assert systemd.values("READY") == []
        systemd.wait("READY")
        status = daemon.status()
        assert status.state == "running"
        assert [partition.state for partition in status.partitions] == ["running", "running"]
        assert all(partition.worker.pid for partition in status.partitions)
        systemd.wait("STATUS", "running: 2 partitions, 0 messages/s, lag 0")
        assert daemon.terminate() == ExitCode.OK
    assert systemd.values("READY") == ["1"]
    assert systemd.values("STATUS")[0] == "waiting for a broker"
    assert systemd.times("STATUS")[0] < systemd.times("READY")[0]
    assert systemd.values("WATCHDOG") == []


def test_a_member_without_a_partition_is_ready(kafka: KafkaCluster, topic_name: str, systemd: Systemd) -> None:
    kafka.create_topic(topic_name, partitions=1)
    first = DaemonProcess(
        systemd.path.parent, kafka.bootstrap, topic_name, "tests.ledger:append", name="first", settings=QUICK_SESSION
    )
    with first, daemon_of(systemd, kafka.bootstrap, topic_name) as second:
        systemd.wait("READY")
        systemd.wait("STATUS", "running: [01] partitions, .*")
        wait_until(
            lambda: sorted(len(daemon.status().partitions) for daemon in (first, second)) == [0, 1],
            DEADLINE_SECONDS,
            "one to have the partition",
        )
        assert second.terminate() == ExitCode.OK
        assert first.terminate() == ExitCode.OK


def test_a_broker_that_is_away_at_the_start_is_waited_for(kafka: KafkaCluster, topic: str, systemd: Systemd) -> None:
    """systemd is told to wait on, well before its patience ends, for as long as the broker is away."""
    kafka.stop_broker(0)
    try:
        with daemon_of(systemd, kafka.bootstrap, topic) as daemon:
            systemd.wait("STATUS", "waiting for a broker")
            wait_until(lambda: len(systemd.values("EXTEND_TIMEOUT_USEC")) >= 4, DEADLINE_SECONDS, "systemd told again")
            assert systemd.values("READY") == []
            assert daemon.status().state == "joining"
            kafka.start_broker(0)
            systemd.wait("READY")
            ready = systemd.times("READY")[0]
            extended = [at for at in systemd.times("EXTEND_TIMEOUT_USEC") if at < ready]
            assert daemon.terminate() == ExitCode.OK
    finally:
        if not kafka.brokers[0].is_running:
            kafka.start_broker(0)
    seconds = {int(value) / 1e6 for value in systemd.values("EXTEND_TIMEOUT_USEC")[: len(extended)]}
    assert seconds == {60.0}
    for before, after in zip(extended, [*extended[1:], ready], strict=True):
        assert after - before < 30
    # systemd lets an extension only lengthen TimeoutStartSec=: the first must come before that ends.
    (patience,) = unit_lines("TimeoutStartSec")
    assert float(patience) >= 60


def test_a_start_without_a_broker_can_be_stopped(systemd: Systemd, topic_name: str) -> None:
    with daemon_of(systemd, NO_BROKER, topic_name) as daemon:
        systemd.wait("STATUS", "waiting for a broker")
        assert daemon.terminate() == ExitCode.OK
    assert systemd.values("STOPPING") == ["1"]
    assert systemd.values("READY") == []


def test_a_handler_that_cannot_be_used_is_never_ready(systemd: Systemd, topic_name: str) -> None:
    with daemon_of(systemd, NO_BROKER, topic_name, handler="raise ValueError('no')") as daemon:
        assert daemon.process.wait(DEADLINE_SECONDS) == ExitCode.CONFIG
    assert systemd.values("READY") == []


def test_the_status_follows_what_happens(kafka: KafkaCluster, topic: str, systemd: Systemd) -> None:
    with daemon_of(systemd, kafka.bootstrap, topic, handler=FAILS_AT_THREE) as daemon:
        systemd.wait("READY")
        kafka.produce(topic, [Record(0, None, b"%d" % number) for number in range(5)])
        systemd.wait("STATUS", r"running: 2 partitions, \d+ messages/s, lag 2, 1 with a problem")
        said = systemd.values("STATUS")
        assert daemon.terminate() == ExitCode.OK
    assert all(after != before for before, after in pairwise(said)), "it says the same again"
    assert systemd.values("STATUS")[-1] == "draining 2 partitions"


def test_the_watchdog_is_fed_while_the_loop_turns_and_only_then(
    kafka: KafkaCluster, topic: str, systemd: Systemd
) -> None:
    usec = str(int(WATCHDOG_SECONDS * 1_000_000))
    with daemon_of(systemd, kafka.bootstrap, topic, watchdog=usec) as daemon:
        systemd.wait("READY")
        fed = len(systemd.times("WATCHDOG"))
        wait_until(lambda: len(systemd.times("WATCHDOG")) >= fed + 4, DEADLINE_SECONDS, "four more")
        times = systemd.times("WATCHDOG")
        gaps = [after - before for before, after in pairwise(times)]
        assert max(gaps) < WATCHDOG_SECONDS, gaps
        assert sum(gaps) / len(gaps) > WATCHDOG_SECONDS / 4, "it is fed more often than it needs"
        # The children go on while the supervisor's loop stands: nobody feeds in its place.
        daemon.process.send_signal(signal.SIGSTOP)
        fed = len(systemd.times("WATCHDOG"))
        time.sleep(2 * WATCHDOG_SECONDS)
        assert len(systemd.times("WATCHDOG")) <= fed + 1
        daemon.process.send_signal(signal.SIGCONT)
        wait_until(lambda: len(systemd.times("WATCHDOG")) >= fed + 3, DEADLINE_SECONDS, "it to be fed again")
        assert daemon.terminate() == ExitCode.OK


def test_stopping_is_said_first_and_asks_for_the_time_it_takes(
    kafka: KafkaCluster, topic: str, systemd: Systemd
) -> None:
    with daemon_of(systemd, kafka.bootstrap, topic) as daemon:
        systemd.wait("READY")
        asked = time.monotonic()
        assert daemon.terminate() == ExitCode.OK
        ended = time.monotonic()
    (stopping,) = [heard for heard in systemd.heard if "STOPPING" in heard.fields]
    assert asked <= stopping.at <= ended
    assert stopping.fields["STOPPING"] == "1"
    # The default drain_timeout_seconds is 20.
    assert 20 <= int(stopping.fields["EXTEND_TIMEOUT_USEC"]) / 1e6 <= 40
    after = [heard.fields for heard in systemd.heard if heard.at > stopping.at]
    assert after == [{"STATUS": "draining 2 partitions"}]


def test_only_the_supervisor_speaks_and_nobody_else_could(kafka: KafkaCluster, topic: str, systemd: Systemd) -> None:
    with daemon_of(systemd, kafka.bootstrap, topic, handler=SHOWS_ENVIRONMENT, watchdog="60000000") as daemon:
        systemd.wait("READY")
        for child in daemon.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & child.environ().keys()
        (seen,) = [line.split() for line in daemon.log_text().splitlines() if line.startswith("sees ")]
        assert "LEDGER_FOLDER" in seen
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & set(seen)
        assert daemon.terminate() == ExitCode.OK
        assert {heard.pid for heard in systemd.heard} == {daemon.process.pid}
