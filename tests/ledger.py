"""The delivery ledger: what every handler process really did, written by the handlers themselves.

`append` is a handler. It writes one line a record with one system call, so that even SIGKILL loses nothing that was
handled. `Ledger` reads the lines of all processes and holds them against what a producer had acknowledged.
"""

import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, Producer
from confluent_kafka import Message as ProducedMessage

from kafkasrcd import Message

_file = -1


def append(message: Message[Any]) -> None:
    """Write the record down."""
    global _file
    if _file < 0:
        path = os.path.join(os.environ["LEDGER_FOLDER"], f"ledger-{os.getpid()}")
        _file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    os.write(_file, b"%d %d %d\n" % (message.partition, message.offset, time.monotonic_ns()))


class Coordinate(NamedTuple):
    """A record of the one topic that a ledger is about."""

    partition: int
    offset: int


class Ledger:
    """What has been handled so far, by all processes that wrote into `folder`."""

    def __init__(self, folder: Path) -> None:
        self.counts: Counter[Coordinate] = Counter()
        self.disorder: list[str] = []
        first_handled: dict[Coordinate, int] = {}
        for path in sorted(folder.glob("ledger-*")):
            last: dict[int, int] = {}
            for line in path.read_bytes().splitlines():
                partition, offset, at = map(int, line.split())
                coordinate = Coordinate(partition, offset)
                if offset <= last.get(partition, -1):
                    self.disorder.append(f"{path.name}: {coordinate} after {last[partition]}")
                last[partition] = offset
                self.counts[coordinate] += 1
                first_handled[coordinate] = min(at, first_handled.get(coordinate, at))
        # Over all processes: nothing was handled for the first time before all that comes before it.
        before: dict[int, tuple[int, int]] = {}
        for coordinate in sorted(first_handled):
            offset, at = before.get(coordinate.partition, (-1, 0))
            if first_handled[coordinate] < at:
                self.disorder.append(f"{coordinate} was handled before {offset}")
            before[coordinate.partition] = (coordinate.offset, first_handled[coordinate])

    @property
    def repeated(self) -> dict[Coordinate, int]:
        """The records that were handled more than once, and how often too often."""
        return {coordinate: count - 1 for coordinate, count in self.counts.items() if count > 1}

    def lost(self, produced: set[Coordinate]) -> set[Coordinate]:
        """What was produced and not handled."""
        return produced - self.counts.keys()


class SteadyProducer:
    """Produces on a thread from entering to leaving, over all partitions in turn; knows what was acknowledged."""

    def __init__(self, brokers: str, topic: str, partitions: int, rate_per_second: int = 2_000) -> None:
        self.acknowledged: set[Coordinate] = set()
        self.failures: list[KafkaError] = []
        self._topic = topic
        self._partitions = partitions
        self._rate = rate_per_second
        self._stop = threading.Event()
        self._producer = Producer(
            {"bootstrap.servers": brokers, "linger.ms": 5, "enable.idempotence": True, "log_level": 0}
        )
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "SteadyProducer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Produce no more; everything is acknowledged when this returns."""
        self._stop.set()
        self._thread.join()
        assert self._producer.flush(30) == 0
        assert not self.failures, self.failures[0]

    def _run(self) -> None:
        started = time.monotonic()
        number = 0
        while not self._stop.is_set():
            due = int((time.monotonic() - started) * self._rate)
            while number < due:
                self._producer.produce(
                    self._topic,
                    b'{"number":%d}' % number,
                    b"key-%d" % (number % 100),
                    partition=number % self._partitions,
                    on_delivery=self._delivered,
                )
                number += 1
            self._producer.poll(0)
            self._stop.wait(0.005)

    def _delivered(self, error: KafkaError | None, message: ProducedMessage) -> None:
        partition, offset = message.partition(), message.offset()
        if error is not None:
            self.failures.append(error)
        elif partition is not None and offset is not None:
            self.acknowledged.add(Coordinate(partition, offset))
