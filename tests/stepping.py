"""Stop code in the middle, at every one of its steps: be killed there, or let another side act there.

A step is one bytecode instruction of the modules under test (or one line, where instructions would be too many).
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any, NoReturn

import pytest


def _require_opcodes(*, lines: bool) -> None:
    """Python 3.13 leaves out opcodes of the first calls of a function, so that there steps would be missing."""
    if not lines and sys.version_info >= (3, 13):
        pytest.skip("Python 3.13 does not trace every opcode; 3.11 and 3.12 do")


@contextmanager
def acting_at(
    step: int, modules: Collection[ModuleType], act: Callable[[], object], *, lines: bool = False
) -> Generator[list[bool]]:
    """Within the block, call ``act`` once: before the step of that number of ``modules``, counted from 0.

    Yields a list that is no longer empty once ``act`` was called. What ``act`` itself runs is not counted.
    """
    _require_opcodes(lines=lines)
    files = {module.__file__ for module in modules}
    counted = "line" if lines else "opcode"
    acted: list[bool] = []
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = not lines
        frame.f_trace_lines = lines
        if event == counted:
            if seen == step:
                acted.append(True)
                act()
            seen += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield acted
    finally:
        sys.settrace(before)


def forked(run: Callable[[], object]) -> int:
    """The process id of a child of this process that calls ``run``; it exits with 0 where that returns, else with 1."""
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    exit_code = 1
    try:
        run()
        exit_code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(exit_code)


def exit_code_of(child: int) -> int:
    """Wait for it to end; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> NoReturn:
    """SIGKILL, which nothing can clean up after."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def killed_at(step: int, modules: Collection[ModuleType], run: Callable[[], object], *, lines: bool = False) -> bool:
    """Call ``run`` in a child process that is killed before that step; False where it has fewer and ended by itself."""

    _require_opcodes(lines=lines)

    def until_killed() -> None:
        with acting_at(step, modules, die, lines=lines):
            run()

    exit_code = exit_code_of(forked(until_killed))
    assert exit_code in (0, -signal.SIGKILL), f"at step {step} the child ended with {exit_code}"
    return exit_code != 0
