"""The demo's child processes: each ends with the demo, however that ends."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Final

import psutil

from kafkasrcd.errors import KafkasrcdError

_GUARD: Final = """
import os, sys
from kafkasrcd.workers.fork_server import die_with_parent
die_with_parent(int(sys.argv[1]))
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes the child after asking the kernel for the parent's death; a preexec_fn would run Python between fork and
exec in a process that may have librdkafka's threads."""
_LAST_WORDS: Final = re.compile(r"^(?:kafkasrcd: |[\d:]+ error +)(?P<why>.*?)(?:  \(exit_code=\d+\))?$")
"""Why a command ends, as it says it itself: before it has a log, and in the log's form for people."""
_TREE_SECONDS: Final = 5.0
"""For what a killed daemon had started to be gone; the kernel takes some 30 ms."""


class Child:
    """A Python module run as a process. What it says on standard error is in ``log_path``."""

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], log_path: Path, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log_path = log_path
        # -P: what lies in the working directory is not ours to import.
        python = [sys.executable, "-P"]
        command = [*python, "-c", _GUARD, str(os.getpid()), *python, "-m", module, *arguments]
        with log_path.open("wb") as log:
            # Its own session: Ctrl-C is for the demo, which ends its children in order.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=dict(environment),
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self._output: IO[bytes] = self._process.stdout
        os.set_blocking(self._output.fileno(), False)
        self._unfinished = b""
        self._tree: list[psutil.Process] = []

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def new_lines(self) -> list[bytes]:
        """The whole lines that it has printed since the last call; does not block."""
        received = bytearray(self._unfinished)
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._output.fileno(), 65_536):
                received += part
        *lines, self._unfinished = bytes(received).split(b"\n")
        return lines

    def require_running(self) -> None:
        """Raises KafkasrcdError, with its exit code and its last words, where it has ended by itself."""
        if not self.is_running:
            raise self.failure()

    def require_success(self) -> None:
        """After ``terminate``: the same where it ended with anything but 0.

        Ended by the signal itself, it had not begun: what has begun answers SIGTERM by ending in order.
        """
        if self._process.poll() not in (0, -signal.SIGTERM):
            raise self.failure()

    def failure(self) -> KafkasrcdError:
        """An error that says how it ended, and why as far as its log knows."""
        code = self._process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines = self.log_path.read_text(errors="replace").strip().splitlines()
        said = _LAST_WORDS.match(lines[-1]) if lines else None
        why = said["why"] if said else ""
        return KafkasrcdError(f"{self.name} {how}{': ' if why else ''}{why}; its log is {self.log_path}")

    def remember_tree(self) -> None:
        """Note what it has started, to wait for that too once it has been killed."""
        with contextlib.suppress(psutil.Error):
            self._tree = psutil.Process(self._process.pid).children(recursive=True)

    def terminate(self) -> None:
        """SIGTERM, where it still runs."""
        if self.is_running:
            self._process.terminate()

    def close(self) -> None:
        """SIGKILL where it still runs; returns when it and what it had started are gone."""
        if self.is_running:
            self.remember_tree()
            self._process.kill()
        self._process.wait()
        psutil.wait_procs(self._tree, timeout=_TREE_SECONDS)
        self._output.close()
