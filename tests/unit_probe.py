"""What kafkasrcd needs from the kernel, each tried once; run inside the unit's sandbox by ``test_systemd_unit``."""

import ctypes
import faulthandler
import mmap
import multiprocessing
import os
import resource
import select
import signal
import socket
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import psutil

from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.storage.opening import open_store

PR_SET_PDEATHSIG = 1


def child_main() -> None:
    """Waits to be killed."""
    assert ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    signal.pause()


def rings() -> None:
    memory, bell = os.memfd_create("ring"), os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    os.ftruncate(memory, mmap.PAGESIZE)
    mmap.mmap(memory, mmap.PAGESIZE).close()
    os.eventfd_write(bell, 1)
    ours, theirs = socket.socketpair()
    socket.send_fds(ours, [b"ring"], [memory, bell])
    _, received, _, _ = socket.recv_fds(theirs, 16, 2)
    assert os.eventfd_read(received[1]) == 1
    for descriptor in (memory, bell, *received):
        os.close(descriptor)
    ours.close()
    theirs.close()


def processes() -> None:
    for child in (
        multiprocessing.get_context("forkserver").Process(target=child_main, daemon=True),
        multiprocessing.get_context("spawn").Process(target=child_main, daemon=True),
    ):
        child.start()
        assert child.pid is not None
        pidfd = os.pidfd_open(child.pid)
        seen = psutil.Process(child.pid)
        assert seen.memory_info().rss > 0
        assert seen.cpu_times().user >= 0
        assert seen.num_fds() > 0
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], 10)[0]
        child.join(10)
        assert child.exitcode == -signal.SIGKILL
        os.close(pidfd)


def limits() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert os.cpu_count()
    assert os.sched_getaffinity(0)
    assert Path("/proc/self/limits").read_text()
    assert Path("/proc/self/cgroup").exists()


def store() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(open_store(f"sqlite:///{folder}/state/x.db", "g", 1000)) as opened,
    ):
        assert opened.claim([TopicPartition("t", 0)], "me")


def control_socket() -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/control")
        os.chmod(f"{folder}/control", 0o660)
        listener.listen()
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(f"{folder}/control")
            accepted, _ = listener.accept()
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            accepted.close()


def stacks() -> None:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        faulthandler.register(signal.SIGUSR2, file)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert file.tell() > 0


def is_confined() -> None:
    """The sandbox is one: what the unit takes away is refused with an error."""
    try:
        os.sched_setaffinity(0, os.sched_getaffinity(0))
    except PermissionError:
        return
    raise AssertionError("sched_setaffinity is allowed")


if __name__ == "__main__":
    for probe in (is_confined, rings, processes, limits, store, control_socket, stacks):
        probe()
        print(probe.__name__, "works", flush=True)
    sys.exit(0)
