"""Send records at a steady rate, each with the moment it was sent: the other end of the latency rows.

`with running(cluster, topic, workload):` runs it in a process of its own. The clock is CLOCK_MONOTONIC, which all
processes of a machine share, so a reader subtracts `sent_ns` from its own `time.monotonic_ns()`.
"""

import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

import msgspec
from confluent_kafka import Producer

from tests.bench.child import ROOT, command
from tests.bench.result import Workload
from tests.kafka_cluster import KafkaCluster

# As large as the throughput rows' records.
_PADDING = "x" * 200


class PacedRecord(msgspec.Struct, frozen=True):
    """The value of a record. `number` counts from 0; those before the end of the warm-up are not for measuring."""

    number: int
    sent_ns: int
    padding: str = _PADDING


class Job(msgspec.Struct, frozen=True):
    """What the producing process is told."""

    bootstrap: str
    topic: str
    partitions: int
    rate_per_second: int
    count: int


_decoder = msgspec.json.Decoder(PacedRecord)
decode = _decoder.decode


@contextmanager
def running(cluster: KafkaCluster, topic: str, workload: Workload) -> Generator[None]:
    """Produce warm-up and measured records from now on; on leaving, end the process if it still runs."""
    seconds = workload.warm_up_seconds + workload.latency_seconds
    job = Job(
        cluster.bootstrap, topic, workload.partitions, workload.rate_per_second, seconds * workload.rate_per_second
    )
    with subprocess.Popen(command(__name__, job), cwd=ROOT) as process:
        try:
            yield
        finally:
            process.terminate()


def produce(job: Job) -> None:
    """Send the records in turn over the partitions, each as near to its moment as the machine allows."""
    # The default lingers 5 ms, which would be most of what is measured.
    producer = Producer({"bootstrap.servers": job.bootstrap, "linger.ms": 0})
    encode = msgspec.json.Encoder().encode
    started = time.monotonic()
    for number in range(job.count):
        # Late by a scheduler's delay, it catches up; the time in the record is that of sending, not that planned.
        early = started + number / job.rate_per_second - time.monotonic()
        if early > 0:
            time.sleep(early)
        producer.produce(job.topic, encode(PacedRecord(number, time.monotonic_ns())), partition=number % job.partitions)
        producer.poll(0)
    producer.flush(30)


if __name__ == "__main__":
    produce(msgspec.json.decode(sys.argv[1], type=Job))
