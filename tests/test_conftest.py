"""What conftest.py does to a test run, seen from outside: each case is a pytest of its own."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

USES_KAFKA = "def test_one(kafka): pass\ndef test_two(kafka_three): pass\ndef test_three(): pass\n"

LEAVES_A_CHILD = """
import subprocess, sys
def test_leaves_a_grandchild():
    grandchild = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    subprocess.run([sys.executable, "-c", grandchild], check=True)
def test_is_not_blamed_for_it(): pass
"""

WAITS_FOR_A_CHILD = """
import multiprocessing, subprocess, sys
def work(): pass
def test_waits():
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    # The forkserver stays for the life of this process.
    process = multiprocessing.get_context("forkserver").Process(target=work)
    process.start()
    process.join()
    process.close()
"""


def run_pytest(folder: Path, program: str, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """The exit code and the output of pytest on this program, with the project's conftest.py."""
    (folder / "test_inner.py").write_text(program)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = kafka\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "test_inner.py"]
    inherited = {name: value for name, value in os.environ.items() if name != "CI"}
    result = subprocess.run(
        command,
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(ROOT), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return result.returncode, result.stdout


@pytest.fixture
def without_java(tmp_path: Path) -> dict[str, str]:
    """An environment where neither Java nor Maven is to be found."""
    return {"PATH": str(tmp_path), "JAVA_HOME": "", "KAFKASRCD_TEST_CACHE": str(tmp_path / "cache")}


def test_without_java_kafka_tests_are_skipped_and_one_line_says_so(
    tmp_path: Path, without_java: dict[str, str]
) -> None:
    code, output = run_pytest(tmp_path, USES_KAFKA, without_java)
    assert code == 0, output
    assert "1 passed, 2 skipped" in output
    loud = [line for line in output.splitlines() if line.startswith("2 SKIPPED: ")]
    assert len(loud) == 1
    assert "apt install" in loud[0]


def test_without_java_kafka_tests_fail_in_ci(tmp_path: Path, without_java: dict[str, str]) -> None:
    code, output = run_pytest(tmp_path, USES_KAFKA, {**without_java, "CI": "true"})
    assert code == 1, output
    assert "1 passed, 2 errors" in output
    assert "apt install" in output


def test_a_process_left_behind_fails_the_test_that_started_it(tmp_path: Path) -> None:
    code, output = run_pytest(tmp_path, LEAVES_A_CHILD)
    assert code == 1, output
    assert "2 passed, 1 error" in output
    assert "ERROR test_inner.py::test_leaves_a_grandchild" in output
    assert "import time; time.sleep(600)" in output


def test_processes_that_ended_and_the_forkserver_are_no_offence(tmp_path: Path) -> None:
    code, output = run_pytest(tmp_path, WAITS_FOR_A_CHILD)
    assert code == 0, output
