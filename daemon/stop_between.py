"""Ctrl-C and SIGTERM between two steps of a command, and not amid one."""

import contextlib
import signal
from collections.abc import Callable, Generator
from types import FrameType


@contextlib.contextmanager
def stop_between_steps() -> Generator[Callable[[], bool]]:
    """What it gives says whether to stop. A second signal raises KeyboardInterrupt where the command stands."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
