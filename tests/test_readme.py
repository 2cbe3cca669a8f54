"""The README's own commands and snippets, run as a reader would."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from kafkasrcd.daemon.exit_codes import ExitCode
from kafkasrcd.settings import CommitStrategy
from kafkasrcd.workers.formats import Kind
from tests.kafka_cluster import KafkaCluster, Record
from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def _commands() -> list[str]:
    """Every command line that the README shows, without its remark."""
    lines = [line for block in _blocks("console") for line in block.splitlines()]
    return [line.removeprefix("$ ").partition("   ")[0].strip() for line in lines if line.startswith("$ ")]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the README's handler and configuration, in a place with a space in its name."""
    folder = tmp_path / "my project"
    folder.mkdir()
    handler, _ = _blocks("python")
    (configuration,) = _blocks("toml")
    (folder / "handlers.py").write_text(handler)
    (folder / "kafkasrcd.toml").write_text(configuration)
    return folder


def _environment(project: Path, brokers: str) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "KAFKASRCD_BROKERS": brokers,
        "XDG_STATE_HOME": str(project / "state"),
        "XDG_RUNTIME_DIR": str(project),
    }


@pytest.mark.kafka
def test_the_program_works_when_pasted(kafka: KafkaCluster, tmp_path: Path) -> None:
    kafka.create_topic("orders-of-a-program")
    kafka.produce("orders-of-a-program", [Record(0, None, b'{"order_id": "A-%d", "amount": 1}' % n) for n in range(3)])
    _, program = _blocks("python")
    program = program.replace("localhost:9092", kafka.bootstrap).replace('"orders"', '"orders-of-a-program"')
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-u", str(tmp_path / "program.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(3)] == [f"A-{n} {n}\n" for n in range(3)]
        wait_until(lambda: kafka.committed("billing", "orders-of-a-program") == {0: 3}, 30, "all to be committed")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert said.endswith("KeyboardInterrupt\n")


@pytest.mark.kafka
def test_the_handler_works_when_pasted(kafka: KafkaCluster, project: Path) -> None:
    kafka.create_topic("orders", partitions=3)
    orders = [{"order_id": f"A-{number}", "amount": number / 2} for number in range(30)]
    kafka.produce("orders", [Record(number % 3, None, orjson.dumps(order)) for number, order in enumerate(orders)])
    environment = _environment(project, kafka.bootstrap)

    def run(command: str) -> subprocess.CompletedProcess[str]:
        assert command in _commands(), f"the README does not say {command!r}"
        return subprocess.run(
            command.split(), cwd=project, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    check = run("kafkasrcd config check")
    assert check.returncode == ExitCode.OK, check.stdout + check.stderr
    output = project / "output"
    with (
        output.open("wb") as file,
        subprocess.Popen(
            ["kafkasrcd", "start"], cwd=project, env=environment, stdout=file, stderr=subprocess.PIPE
        ) as daemon,
    ):
        try:
            wait_until(
                lambda: output.read_bytes().count(b"\n") >= 30, 60, "30 lines of the handler's", seen=output.read_text
            )
            status = run("kafkasrcd status")
            assert status.returncode == ExitCode.OK, status.stderr
            assert "orders" in status.stdout
            assert "healthy" in status.stdout
            stop = run("kafkasrcd stop")
            assert stop.returncode == ExitCode.OK, stop.stderr
            assert daemon.wait(30) == ExitCode.OK
        finally:
            daemon.kill()
    assert sorted(re.findall(r"A-\d+", output.read_text())) == sorted(str(order["order_id"]) for order in orders)
    assert sum(kafka.committed("orders", "orders").values()) == 30
    assert run("kafkasrcd status").returncode == ExitCode.NOT_RUNNING


def test_every_command_it_shows_exists() -> None:
    commands = _commands()
    assert "make demo" in commands
    for command in commands:
        if command.startswith("kafkasrcd "):
            words = command.split()
            help_text = subprocess.run(
                [BIN / "kafkasrcd", *words[1:], "--help"], capture_output=True, text=True, timeout=60, check=False
            )
            assert help_text.returncode == 0, f"{command}: {help_text.stderr}"
        elif command.startswith("make "):
            target = command.split()[1]
            subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, timeout=60, check=True)


def test_the_exit_codes_are_those_of_the_program() -> None:
    rows = re.findall(r"^\| (\d+) \| ", README, re.MULTILINE)
    assert [int(code) for code in rows] == [code.value for code in ExitCode]


def test_every_setting_it_names_exists() -> None:
    from kafkasrcd.daemon.setting_fields import FIELDS

    last_parts = {name.rpartition(".")[2] for name in FIELDS}
    last_parts |= {name for field in FIELDS.values() for name in field.rows}
    named = set(re.findall(r"`(?!kafkasrcd_)([a-z]+(?:_[a-z]+)+)`", README))  # tables are called kafkasrcd_…
    values = {value.value for values in (CommitStrategy, Kind) for value in values}
    assert named <= last_parts | values, named - last_parts - values


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
