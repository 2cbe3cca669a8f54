"""`kafkasrcd demo`, as a newcomer runs it: everything produced is handled, committed, counted, and then gone."""

import re
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.kafka_cluster import KafkaCluster
from tests.waiting import wait_until

KAFKASRCD = Path(sys.executable).parent / "kafkasrcd"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a space in its name."""
    path = tmp_path / "my demo"
    path.mkdir()
    return path


@contextmanager
def _demo(folder: Path, *arguments: str) -> Generator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [KAFKASRCD, "demo", *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as demo:
        try:
            yield demo
        finally:
            demo.kill()


def _wait_handling(folder: Path) -> None:
    wait_until(
        lambda: any(path.stat().st_size for path in (folder / "demo-output" / "handled").glob("*.jsonl")),
        60,
        "an order handled",
    )


def _figures(output: str) -> tuple[int, int]:
    """How many orders were produced, and handled, by the summary."""
    produced, handled = (
        int(found[1].replace(",", ""))
        if (found := re.search(rf"^{word} +([\d,]+) orders", output, re.MULTILINE))
        else -1
        for word in ("produced", "handled")
    )
    return produced, handled


def test_it_handles_what_it_produces_and_ends_by_itself(folder: Path) -> None:
    with _demo(folder, "--seconds", "2") as demo:
        output, _ = demo.communicate(timeout=100)
    assert demo.returncode == 0, output
    produced, handled = _figures(output)
    assert produced == handled > 1000, output
    assert "Every order was handled once, and that is committed." in output
    lines = [line for path in (folder / "demo-output" / "handled").iterdir() for line in path.read_text().splitlines()]
    assert len(lines) == handled
    assert "error" not in (folder / "demo-output" / "daemon.log").read_text()


def test_ctrl_c_ends_it_cleanly_with_a_summary(folder: Path) -> None:
    with _demo(folder) as demo:
        _wait_handling(folder)
        demo.send_signal(signal.SIGINT)
        output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 0, output
    produced, handled = _figures(output)
    assert produced == handled > 0, output
    assert "Traceback" not in output


def test_a_killed_demo_takes_everything_along(folder: Path) -> None:
    with _demo(folder) as demo:
        _wait_handling(folder)
        children = psutil.Process(demo.pid).children(recursive=True)
        assert len(children) >= 1 + 1 + 1 + 1 + 4 + 1  # broker, producer, supervisor, fork server, workers, handler
        demo.kill()
        _, alive = psutil.wait_procs(children, timeout=4)
        assert not alive


def test_a_part_that_dies_ends_it_with_one_clear_line(folder: Path) -> None:
    with _demo(folder) as demo:
        _wait_handling(folder)
        (broker,) = [
            child for child in psutil.Process(demo.pid).children() if "kafkasrcd.daemon.demo_broker" in child.cmdline()
        ]
        broker.kill()
        output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert "kafkasrcd: the embedded broker was killed by SIGKILL" in output
    assert "Traceback" not in output


def test_a_daemon_that_cannot_start_is_heard(folder: Path) -> None:
    with _demo(folder, "--seconds", "1") as first:
        first.communicate(timeout=100)
    (folder / "demo-output" / "control.sock").write_text("no socket")
    with _demo(folder) as demo:
        output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 1
    (line,) = [line for line in output.splitlines() if line.startswith("kafkasrcd: ")]
    assert "the daemon ended with exit code 78: " in line
    assert "control.sock is no socket" in line


def test_a_daemon_that_dies_ends_it_with_one_clear_line(folder: Path) -> None:
    with _demo(folder) as demo:
        _wait_handling(folder)
        (daemon,) = [child for child in psutil.Process(demo.pid).children() if "start" in child.cmdline()]
        daemon.kill()
        output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert "kafkasrcd: the daemon was killed by SIGKILL" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("file", ["kafkasrcd.toml", "daemon.log", "control.sock"])
def test_it_can_be_ended_while_it_starts(folder: Path, file: str) -> None:
    with _demo(folder) as demo:
        wait_until((folder / "demo-output" / file).exists, 60, file, interval_seconds=0.001)
        demo.send_signal(signal.SIGTERM)
        output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 0, output
    assert _figures(output) == (0, 0)
    assert "It was ended before the first order." in output


def test_a_deep_folder_keeps_its_socket_elsewhere(folder: Path) -> None:
    deep = Path("x" * 100, "y")
    with _demo(folder, "--seconds", "1", "--directory", str(deep)) as demo:
        output, _ = demo.communicate(timeout=100)
    assert demo.returncode == 0, output
    assert "README.txt" in [path.name for path in (folder / deep).iterdir()]


def test_killed_processes_of_the_daemon_are_survived(folder: Path) -> None:
    with _demo(folder) as demo:
        _wait_handling(folder)
        (daemon,) = [child for child in psutil.Process(demo.pid).children() if "start" in child.cmdline()]
        for process in daemon.children(recursive=True)[1:]:  # the first is the fork server
            process.kill()
        with pytest.raises(subprocess.TimeoutExpired):
            demo.communicate(timeout=3)
        demo.send_signal(signal.SIGINT)
        output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 0, output
    produced, handled = _figures(output)
    assert produced <= handled <= produced + 4, output  # a record for each partition may come again


def test_a_folder_with_other_files_is_left_alone(folder: Path) -> None:
    (folder / "demo-output").mkdir()
    (folder / "demo-output" / "mine").write_text("precious")
    with _demo(folder, "--seconds", "1") as demo:
        output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert "holds other files" in output
    assert [path.name for path in (folder / "demo-output").iterdir()] == ["mine"]


def test_it_runs_against_a_real_cluster(kafka: KafkaCluster, folder: Path) -> None:
    with _demo(folder, "--brokers", kafka.bootstrap, "--seconds", "2") as demo:
        output, _ = demo.communicate(timeout=100)
    assert demo.returncode == 0, output
    produced, handled = _figures(output)
    assert produced == handled > 1000, output
    assert kafka.committed("kafkasrcd-demo", "kafkasrcd-demo") == kafka.end_offsets("kafkasrcd-demo")


def test_a_cluster_that_is_not_there_is_said_in_one_line(folder: Path) -> None:
    with _demo(folder, "--brokers", "127.0.0.1:1", "--seconds", "1") as demo:
        output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 69
    assert "kafkasrcd: no broker answers at 127.0.0.1:1" in output
