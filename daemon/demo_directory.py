"""The demo's folder: a configuration and a handler like anyone's, the offset store, logs, and what was handled."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from importlib import resources
from pathlib import Path
from typing import Final

from kafkasrcd.errors import KafkasrcdError

EMBEDDED_TOPIC: Final = "orders"
TOPIC: Final = "kafkasrcd-demo"
"""On a real cluster, where it must not be anyone's."""
GROUP: Final = "kafkasrcd-demo"

_MARK: Final = ".kafkasrcd-demo"
"""The file that says that a folder is a demo's, and is locked while one runs there."""
_EXTRA_CONFIG: Final = """
[extra_config]
# The embedded broker answers a fetch that found nothing this much later, whatever has come meanwhile. A real one
# answers as soon as something comes, so there the default of 500 delays nothing.
"fetch.wait.max.ms" = 20
"""
_LONGEST_SOCKET_PATH: Final = 107  # unix(7): sun_path holds 108 bytes, the last one 0

_README: Final = """\
This folder belongs to `kafkasrcd demo`; every run writes it anew. Copy from it what you want to keep.

handlers.py         the function that is called with every order
kafkasrcd.toml      the daemon's configuration
handled/PID.jsonl   what the handler process PID has handled, a line an order, the latest last;
                    PID.old.jsonl is what came before. At most 8 MB a process.
offsets.db          the offset store, in SQLite: how far each partition is processed
daemon.log          what the daemon says; producer.log and broker.log are of the others
control.sock        where it answers `kafkasrcd status` while it runs

While the demo runs:     kafkasrcd status -c kafkasrcd.toml
A project of your own:   kafkasrcd init, in a folder of your own
"""

_CONFIGURATION: Final = """\
# Written by `kafkasrcd demo`; `kafkasrcd init` writes one to start from, with every setting explained.
brokers = {brokers}
group_id = {group}
topics = [{topic}]
commit_interval_secs = 1.0

[handler]
target = "handlers:handle"
processes = {processes}

[store]
url = "sqlite:///offsets.db"

[supervisor]
control_socket = {socket}
log_format = "human"
session_timeout_ms = 10000  # after a demo that was killed, the next one waits so long for its partitions
"""


class DemoDirectory:
    """The paths in it."""

    def __init__(self, path: Path, socket_folder: Path) -> None:
        self.path = path
        self.configuration = path / "kafkasrcd.toml"
        self.handlers = path / "handlers.py"
        self.handled = path / "handled"
        self.control_socket = socket_folder / "control.sock"

    def log(self, name: str) -> Path:
        """Where a process's standard error goes."""
        return self.path / f"{name}.log"

    def write(self, brokers: str, topic: str, processes: int, *, embedded: bool) -> None:
        """The configuration, the handler, and what is what."""
        (self.path / "README.txt").write_text(_README, encoding="utf-8")
        text = _CONFIGURATION.format(
            brokers=json.dumps(brokers),  # a JSON text is a TOML text
            group=json.dumps(GROUP),
            topic=json.dumps(topic),
            processes=processes,
            socket=json.dumps(os.path.relpath(self.control_socket, self.path))
            if self.control_socket.parent == self.path
            else json.dumps(str(self.control_socket)),
        )
        self.configuration.write_text(text + (_EXTRA_CONFIG if embedded else ""), encoding="utf-8")
        handler = resources.files("kafkasrcd.daemon").joinpath("demo_handlers.py")
        self.handlers.write_text(handler.read_text(encoding="utf-8"), encoding="utf-8")


@contextlib.contextmanager
def open_directory(path: Path) -> Generator[DemoDirectory]:
    """Make or take the folder, for this demo alone, and clear away what an earlier one left in it.

    Raises KafkasrcdError where it holds anything else, or another demo runs there; OSError where the system refuses.
    """
    path.mkdir(parents=True, exist_ok=True)
    mark = path / _MARK
    if not mark.exists() and any(path.iterdir()):
        raise KafkasrcdError(f"{path} holds other files: name a new or empty folder with --directory")
    with mark.open("w", encoding="utf-8") as lock, contextlib.ExitStack() as stack:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KafkasrcdError(f"another demo runs in {path}: name another folder with --directory") from None
        lock.write("This folder belongs to `kafkasrcd demo`, which overwrites what is in it.\n")
        lock.flush()
        folder = path
        if len(os.fsencode(path.absolute() / "control.sock")) > _LONGEST_SOCKET_PATH:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kafkasrcd-demo-")))
        directory = DemoDirectory(path, folder)
        # The offsets of an earlier broker are no use to this one, and what was handled is counted from nothing.
        for old in path.glob("offsets.db*"):
            old.unlink()
        shutil.rmtree(directory.handled, ignore_errors=True)
        directory.handled.mkdir()
        yield directory
