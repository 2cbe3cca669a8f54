"""Processes that outlive the daemons that started them."""

import contextlib

import psutil

MARK_VARIABLE = "CHAOS_STORM_MARK"
"""In the environment that every process of a storm inherits."""


def left_behind(mark: str) -> list[psutil.Process]:
    """Every process of the storm with that mark."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        # Gone, a zombie, or another user's.
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(MARK_VARIABLE) == mark:
                found.append(process)
    return found
