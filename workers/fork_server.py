"""The fork server: a small process without threads that has imported everything, from which children are forked.

Its own rather than multiprocessing's: that one hands over what to run as a pickle, keeps a resource tracker, and its
children outlive a killed parent unless a private descriptor is closed. Here a request is a role and a socket.

Nothing survives the supervisor: the kernel kills the fork server when the supervisor's main thread ends, however it
ends, and every child when the fork server does.
"""

import ctypes
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from typing import Final, NoReturn

from kafkasrcd.workers.control import ControlChannel, Exited, Spawn, Spawned
from kafkasrcd.workers.event_log import EventLog

Role = Callable[[ControlChannel], int]
"""A child's main function; returns its exit code."""

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent (the thread that forked it) ends; prctl(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before the call above
        os._exit(1)


def set_process_name(name: str) -> None:
    """What ps and top show; the kernel keeps 15 bytes."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def main() -> None:
    """Serve requests from the socket whose descriptor is the first argument, of the parent in the second. Further
    arguments are modules that children will need, such as those of a format."""
    channel = ControlChannel(socket.socket(fileno=int(sys.argv[1])))
    server = os.getpid()
    die_with_parent(int(sys.argv[2]))
    set_process_name("kafkasrcd-fork")
    roles = _import_roles()
    for name in sys.argv[3:]:
        importlib.import_module(name)
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
    gc.collect()
    gc.freeze()
    children: dict[int, int] = {}  # pid to the supervisor's number
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd == wake_read:
                os.read(wake_read, 4096)
                _reap(channel, children)
                continue
            received = channel.receive()
            if received is None:
                os._exit(0)  # the supervisor is gone; so are the children, by their death signal
            request, descriptors = received
            if not isinstance(request, Spawn):
                raise TypeError(f"the fork server was asked to {request!r}")
            pid = os.fork()
            if pid == 0:
                selector.close()
                channel.close()
                os.close(wake_read)
                os.close(wake_write)
                _run_child(request, roles[request.role], descriptors[0], server)
            os.close(descriptors[0])
            children[pid] = request.child
            pidfd = os.pidfd_open(pid)
            channel.send(Spawned(request.child, pid), (pidfd,))
            os.close(pidfd)


def _reap(channel: ControlChannel, children: dict[int, int]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        channel.send(Exited(children.pop(pid), os.waitstatus_to_exitcode(status)))


def _import_roles() -> dict[str, Role]:
    """Everything a child needs, imported once for all of them; after the death signal is set, since it takes time."""
    from kafkasrcd.workers import handler, worker

    return {"worker": worker.main, "handler": handler.main}


def _run_child(request: Spawn, role: Role, descriptor: int, parent: int) -> NoReturn:
    """The forked child: its death signal first, then its role; never returns into the fork server's loop."""
    exit_code = 70  # EX_SOFTWARE
    try:
        die_with_parent(parent)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        set_process_name(request.title)
        channel = ControlChannel(socket.socket(fileno=descriptor))
        exit_code = role(channel)
    except SystemExit as ending:
        exit_code = ending.code if isinstance(ending.code, int) else 1
    except BrokenPipeError:
        exit_code = 0  # the supervisor is gone, and the death signal on its way
    except BaseException as error:  # noqa: BLE001 - the last place where it can be said
        EventLog(request.role).error("process_failed", f"{request.title} ends by {error!r}", cause=error)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                exit_code = exit_code or 1
        os._exit(exit_code)


if __name__ == "__main__":
    main()
