"""What the loops people write by hand share: how one is run in a process of its own, and how it reads its topic.

`python -m MODULE JOB` prints a BenchResult as JSON; each module of loops ends with a call of `main`.
"""

import sys
import time
import uuid
from collections.abc import Callable, Generator, Mapping

import msgspec
from confluent_kafka import Consumer, Message

from tests.bench.child import run_module
from tests.bench.result import BenchResult, Stopwatch, Workload
from tests.kafka_cluster import KafkaCluster

COMMIT_INTERVAL_SECONDS = 1.0

# A loop that gets nothing for this long says so instead of waiting for ever.
SILENCE_DEADLINE_SECONDS = 30

# The best found, at full speed on a backlog, medians of five runs: 1.0M messages/s, where 100 to 1,000 messages a batch
# and 4 to 64 MiB of queue differ by less than the noise, larger batches cost 10 % (caches), switching the garbage
# collector off gains at most 3 %, and fetch sizes change nothing.
TUNED_BATCH = 500
TUNED: dict[str, str | int | float | bool] = {
    # How long a partition whose queue was full waits before it fetches again. The default, 1000, is what holds the
    # default loop down.
    "fetch.queue.backoff.ms": 10,
    # A partition. As fast as the default of 64 MiB, at half the memory.
    "queued.max.messages.kbytes": 4096,
    # The loop commits what it has processed; storing an offset by hand for each message or batch costs 5-10 %.
    "enable.auto.commit": False,
}


class Job(msgspec.Struct, frozen=True):
    """What the process of one row is told."""

    loop: str
    name: str
    bootstrap: str
    workload: Workload
    database_url: str = ""
    """For SQLAlchemy; only of the loops that write to a database."""


Loop = Callable[[Job], BenchResult]


def run(loop: Loop, name: str, cluster: KafkaCluster, workload: Workload, database_url: str = "") -> BenchResult:
    """Run the loop in a process of its own. Raises CalledProcessError, TimeoutExpired."""
    job = Job(loop.__name__, name, cluster.bootstrap, workload, database_url)
    return msgspec.json.decode(run_module(loop.__module__, job), type=BenchResult)


def main(loops: Mapping[str, Loop]) -> None:
    """In that process: the loop that the command line names, and its result on standard output."""
    job = msgspec.json.decode(sys.argv[1], type=Job)
    print(msgspec.json.encode(loops[job.loop](job)).decode())


def new_group() -> str:
    """A group that has read nothing yet."""
    return f"bench-{uuid.uuid4().hex[:8]}"


def default_settings(job: Job) -> dict[str, str | int | float | bool]:
    """What everyone has to set."""
    return {"bootstrap.servers": job.bootstrap, "group.id": new_group(), "auto.offset.reset": "earliest"}


def batches(consumer: Consumer, topic: str, wanted: int) -> Generator[list[Message]]:
    """Batches of what is there, until `wanted` messages came. Raises TimeoutError where nothing comes."""
    consumer.subscribe([topic])
    count = 0
    last_heard = time.monotonic()
    while count < wanted:
        messages = consumer.consume(TUNED_BATCH, 0.1)
        if not messages:
            require_progress(last_heard, count)
            continue
        last_heard = time.monotonic()
        yield messages
        count += len(messages)


def committed_batches(consumer: Consumer, topic: str, wanted: int) -> Generator[list[Message]]:
    """As `batches`; each is committed some time after it was processed."""
    last_commit = time.monotonic()
    for messages in batches(consumer, topic, wanted):
        yield messages
        # librdkafka has stored the offset of the batch's end when it gave it out; by now that is true.
        now = time.monotonic()
        if now - last_commit > COMMIT_INTERVAL_SECONDS:
            consumer.commit(asynchronous=True)
            last_commit = now


def require_progress(last_heard: float, count: int) -> None:
    """Raise TimeoutError where nothing came since `last_heard` (monotonic) for too long."""
    if time.monotonic() - last_heard > SILENCE_DEADLINE_SECONDS:
        raise TimeoutError(f"nothing came for {SILENCE_DEADLINE_SECONDS} s, after {count} messages")


def measured(stopwatch: Stopwatch | None) -> Stopwatch:
    """The stopwatch that the first message has started."""
    if stopwatch is None:
        raise ValueError("nothing to measure: the row was asked for no messages")
    return stopwatch
