"""Each target of the fuzzer, briefly and always the same way; `make fuzz` goes on for longer."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon_process import ROOT
from tests.fuzz.targets import TARGETS

RUNS = 3_000


@pytest.mark.skipif(platform.machine() != "x86_64", reason="atheris is for x86-64 only")
@pytest.mark.parametrize("target", TARGETS)
def test_a_target_takes_any_bytes(target: str, tmp_path: Path) -> None:
    arguments = [target, f"-runs={RUNS}", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.process", *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert f"Done {RUNS} runs" in done.stderr
