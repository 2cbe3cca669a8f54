"""``Notifier`` against real sockets, as systemd would hold them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kafkasrcd.daemon.notify import MAX_STATUS_BYTES, Notifier

NOTIFY_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Systemd:
    """The receiving end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + name[1:] if name.startswith("@") else name)
        self._socket.setblocking(False)

    def heard(self) -> list[str]:
        messages: list[str] = []
        while True:
            try:
                messages.append(self._socket.recv(8192).decode())
            except BlockingIOError:
                return messages

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    name = f"{tmp_path}/notify" if request.param == "path" else f"@kafkasrcd-test-{os.getpid()}"
    receiver = Systemd(name)
    yield receiver
    receiver.close()


@pytest.fixture
def notifier(systemd: Systemd) -> Iterator[Notifier]:
    speaker = Notifier({"NOTIFY_SOCKET": systemd.name})
    yield speaker
    speaker.close()


def test_every_message(systemd: Systemd, notifier: Notifier) -> None:
    assert notifier.ready()
    assert notifier.status("12 partitions, lag 0")
    assert notifier.watchdog()
    assert notifier.stopping()
    assert notifier.stopping(within_seconds=25.5)
    assert systemd.heard() == [
        "READY=1",
        "STATUS=12 partitions, lag 0",
        "WATCHDOG=1",
        "STOPPING=1",
        "STOPPING=1\nEXTEND_TIMEOUT_USEC=25500000",
    ]


def test_reloading_carries_the_clock_that_systemd_compares(systemd: Systemd, notifier: Notifier) -> None:
    before = time.monotonic_ns() // 1000
    assert notifier.reloading()
    (message,) = systemd.heard()
    first, second = message.split("\n")
    assert first == "RELOADING=1"
    assert second.startswith("MONOTONIC_USEC=")
    assert before <= int(second.partition("=")[2]) <= time.monotonic_ns() // 1000


def test_a_status_is_one_line_and_cannot_smuggle_another_message(systemd: Systemd, notifier: Notifier) -> None:
    notifier.status("draining\nREADY=1\r\n\N{LINE SEPARATOR}soon \udc80")
    assert systemd.heard() == ["STATUS=draining READY=1 soon ?"]


def test_a_status_is_cut_between_characters(systemd: Systemd, notifier: Notifier) -> None:
    notifier.status("x" + "\N{EURO SIGN}" * 5_000)
    (message,) = systemd.heard()
    assert message.startswith("STATUS=x\N{EURO SIGN}")
    assert MAX_STATUS_BYTES - 3 < len(message.removeprefix("STATUS=").encode()) <= MAX_STATUS_BYTES


def test_the_same_status_is_sent_once(systemd: Systemd, notifier: Notifier) -> None:
    for text in ("a", "a", "b", "a"):
        assert notifier.status(text)
    assert systemd.heard() == ["STATUS=a", "STATUS=b", "STATUS=a"]


def test_never_blocks_and_says_what_was_not_taken(systemd: Systemd, notifier: Notifier) -> None:
    taken = 0
    while notifier.status(f"line {taken}"):
        taken += 1
        assert taken < 100_000, "the queue is never full"
    assert not notifier.ready()
    assert not notifier.status("last words")
    assert len(systemd.heard()) == taken
    assert notifier.status("last words")
    assert systemd.heard() == ["STATUS=last words"]


def test_survives_a_systemd_that_is_gone(systemd: Systemd, notifier: Notifier) -> None:
    systemd.close()
    assert not notifier.ready()


def test_is_silent_after_close(systemd: Systemd, notifier: Notifier) -> None:
    notifier.close()
    notifier.close()
    assert not notifier.ready()
    assert systemd.heard() == []


@pytest.mark.parametrize("name", ["", "vsock:2:1234", "relative", "/" + "x" * 200, "/nowhere/notify", "/null\0byte"])
def test_does_nothing_where_there_is_no_such_socket(name: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": name})
    assert not any((notifier.ready(), notifier.status("x"), notifier.watchdog(), notifier.stopping()))
    assert not notifier.reloading()
    notifier.close()


def test_does_nothing_outside_systemd() -> None:
    notifier = Notifier({})
    assert not notifier.ready()
    assert notifier.watchdog_interval_seconds is None


def test_takes_the_variables_from_the_environment_and_leaves_the_rest() -> None:
    environ = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "PATH": "/bin"}
    Notifier(environ).close()
    assert environ == {"PATH": "/bin"}


def descriptors_and_variables_of_a_child() -> tuple[set[str], set[str]]:
    child = """if True:
        import os
        names = sorted(os.listdir("/proc/self/fd"))
        print(*(os.readlink(f"/proc/self/fd/{name}") for name in names if os.path.exists(f"/proc/self/fd/{name}")))
        print(*os.environ)
    """
    said = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True, close_fds=False)
    descriptors, variables = said.stdout.splitlines()
    return {each for each in descriptors.split() if each.startswith("socket:")}, set(variables.split())


def test_children_inherit_neither_the_variables_nor_the_socket(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors_and_variables_of_a_child()
    for name, value in zip(NOTIFY_VARIABLES, (systemd.name, "30000000", str(os.getpid())), strict=True):
        monkeypatch.setenv(name, value)
    notifier = Notifier()
    try:
        assert notifier.ready()
        assert descriptors_and_variables_of_a_child() == before
    finally:
        notifier.close()


OURS = "our own"


@pytest.mark.parametrize(
    ("usec", "pid", "expected"),
    [
        ("60000000", OURS, 30.0),
        ("60000000", "", 30.0),
        ("500000", OURS, 0.25),
        ("60000000", "1", None),
        ("60000000", "me", None),
        ("soon", OURS, None),
        ("0", OURS, None),
        ("-5", OURS, None),
        ("", OURS, None),
    ],
)
def test_the_watchdog_is_fed_twice_within_its_limit(usec: str, pid: str, expected: float | None) -> None:
    notifier = Notifier({"WATCHDOG_USEC": usec, "WATCHDOG_PID": str(os.getpid()) if pid == OURS else pid})
    assert notifier.watchdog_interval_seconds == expected
