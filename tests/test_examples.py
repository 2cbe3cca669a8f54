"""What stands in examples/, run as it is on a real broker: every record once, all committed, and an end by Ctrl-C."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kafka_cluster import KafkaCluster, Record
from tests.waiting import wait_until

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_each_order_once(kafka: KafkaCluster, tmp_path: Path, topic_name: str, path: Path) -> None:
    kafka.create_topic(topic_name, partitions=3)
    orders = [Record(n % 3, None, b'{"order_id": "A-%d", "amount": 1.5}' % n) for n in range(30)]
    kafka.produce(topic_name, orders)
    program = path.read_text().replace('["orders"]', f'["{topic_name}"]').replace('"my-group"', f'"{topic_name}"')
    (tmp_path / path.name).write_text(program)
    with subprocess.Popen(
        [sys.executable, "-u", path.name],
        cwd=tmp_path,
        env={**os.environ, "BROKERS": kafka.bootstrap},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        printed: list[str] = []
        while len(printed) < 30:
            line = process.stdout.readline()
            assert line, process.stderr.read() if process.stderr is not None else ""
            if "A-" in line:
                printed.append(line.split()[-1])
        wait_until(
            lambda: kafka.committed(topic_name, topic_name) == dict.fromkeys(range(3), 10), 30, "all to be committed"
        )
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert sorted(printed) == sorted(f"A-{n}" for n in range(30))
    assert "KeyboardInterrupt" in said


def test_there_is_one_of_each_kind() -> None:
    assert {path.stem for path in EXAMPLES} == {
        "asyncio_source",
        "checkpoint",
        "manual",
        "periodic",
        "queue_and_metrics",
    }
