"""Rows and producers as processes of their own: `python -m MODULE JOB`, told by JSON and answering in JSON."""

import subprocess
import sys
from pathlib import Path

import msgspec

ROOT = Path(__file__).parent.parent.parent
ROW_DEADLINE_SECONDS = 900


def command(module: str, job: msgspec.Struct) -> list[str]:
    """The command line that runs the module with the job as its one argument."""
    return [sys.executable, "-m", module, msgspec.json.encode(job).decode()]


def run_module(module: str, job: msgspec.Struct) -> bytes:
    """Run the module to its end and return what it printed; its errors go to the terminal.

    Raises CalledProcessError, TimeoutExpired.
    """
    result = subprocess.run(
        command(module, job), cwd=ROOT, stdout=subprocess.PIPE, timeout=ROW_DEADLINE_SECONDS, check=True
    )
    return result.stdout
