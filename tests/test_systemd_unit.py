"""The systemd unit: accepted by systemd, tight, and wide enough for what kafkasrcd does."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kafkasrcd.settings import SupervisorSettings
from tests.unit_sandbox import UNIT, calls_in_unit, unit_lines

MAX_EXPOSURE = 2.5
SECONDS_AFTER_DRAIN = 10.0
"""For the final commit, which a broker that is away holds up for about 8 seconds."""
REPOSITORY = UNIT.parent.parent


@pytest.fixture(autouse=True, scope="module")
def systemd_analyze() -> None:
    if shutil.which("systemd-analyze") is None:
        missing = "systemd-analyze is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)


def only(key: str) -> str:
    (value,) = unit_lines(key)
    return value


def test_systemd_accepts_it_without_a_word(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    text, replaced = re.subn(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text())
    assert replaced == 1
    copy.write_text(text)
    said = subprocess.run(["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True)
    # Of other units on the machine it may complain.
    assert [line for line in (said.stdout + said.stderr).splitlines() if UNIT.name in line] == []
    assert said.returncode == 0, said.stderr


def test_is_hardened() -> None:
    said = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNIT)], capture_output=True, text=True
    )
    exposure = re.search(r"Overall exposure level for kafkasrcd\.service: ([\d.]+)", said.stdout)
    assert exposure is not None, said.stdout + said.stderr
    assert float(exposure[1]) <= MAX_EXPOSURE


def test_starts_the_command_with_the_configuration() -> None:
    assert only("ExecStart") == "/opt/kafkasrcd/bin/kafkasrcd start --config /etc/kafkasrcd/kafkasrcd.toml"


def test_leaves_the_default_drain_and_a_final_commit_their_time() -> None:
    assert float(only("TimeoutStopSec")) >= SupervisorSettings().drain_timeout_seconds + SECONDS_AFTER_DRAIN


def test_the_supervisor_alone_is_asked_to_stop_and_speaks_for_the_service() -> None:
    assert [only(key) for key in ("Type", "KillMode", "NotifyAccess")] == ["notify", "mixed", "main"]


def test_a_configuration_error_is_not_tried_again() -> None:
    assert only("Restart") == "on-failure"
    assert only("RestartPreventExitStatus") == str(os.EX_CONFIG)


def test_state_is_private() -> None:
    assert [only(key) for key in ("StateDirectoryMode", "RuntimeDirectoryMode", "UMask")] == ["0700", "0750", "0077"]


def test_takes_away_what_needs_privileges() -> None:
    assert calls_in_unit().isdisjoint({"mount", "ptrace", "bpf", "setuid", "chown", "sched_setaffinity", "reboot"})


@pytest.mark.parametrize("proc", ["proc of the host", "proc of the unit"])
def test_kafkasrcd_works_inside(proc: str) -> None:
    """Under the unit's filter of system calls, and with its view of /proc where this kernel lets us mount one."""
    command = [sys.executable, "-m", "tests.unit_sandbox", sys.executable, "-m", "tests.unit_probe"]
    if proc == "proc of the unit":
        assert (only("ProcSubset"), only("ProtectProc")) == ("pid", "invisible")
        own = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount"]
        mount = "mount -t proc -o subset=pid,hidepid=invisible proc /proc"
        if subprocess.run([*own, "sh", "-c", mount], capture_output=True).returncode:
            pytest.skip("this kernel lets nobody mount a /proc in a user namespace")
        command = [*own, "sh", "-c", f'{mount} && exec "$@"', "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "stacks works"
