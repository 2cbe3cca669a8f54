"""What the rows mean beside each other: kafkasrcd's figure, the peer's of the same run, and the goal."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from tests.bench.result import BenchResult


class Ratio(NamedTuple):
    """`figure` of the row `row` divided by that of the row `peer`; `goal` is a least or, with `at_most`, a most.

    Without a goal it is shown.
    """

    text: str
    row: str
    peer: str
    figure: Callable[[BenchResult], float]
    goal: float | None = None
    at_most: bool = False


def _throughput(result: BenchResult) -> float:
    return result.messages_per_second


def _cpu(result: BenchResult) -> float:
    return result.cpu_us_per_message


def _p99(result: BenchResult) -> float:
    return result.latency_p99_ms or 0.0


RATIOS = (
    Ratio("no-op messages/s, of the tuned loop's", "no-op", "raw-tuned", _throughput, 0.6),
    Ratio("no-op messages/s, of the default loop's", "no-op", "raw-default", _throughput, 3.0),
    Ratio("no-op CPU a message, of the tuned loop's", "no-op", "raw-tuned", _cpu, 2.2, at_most=True),
    Ratio("auto messages/s, of the tuned loop's", "auto", "raw-tuned", _throughput),
    Ratio("manual messages/s, a commit each, of the tuned loop's", "manual", "raw-tuned", _throughput),
    Ratio("messages/s by key, of the tuned loop's", "key", "raw-tuned", _throughput),
    Ratio(
        "typed JSON messages/s, of the loop's with orjson and dataclasses",
        "json-typed",
        "raw-json-dataclass",
        _throughput,
        1.0,
    ),
    Ratio("typed JSON messages/s, of the loop's with msgspec", "json-typed", "raw-json-msgspec", _throughput),
    Ratio("Avro messages/s, of AvroDeserializer's", "avro", "raw-avro", _throughput, 1.0),
    Ratio("Protobuf messages/s, of ProtobufDeserializer's", "protobuf", "raw-protobuf", _throughput, 1.0),
    Ratio(
        "Protobuf messages/s as dicts, of its",
        "protobuf-dict",
        "raw-protobuf-dict",
        _throughput,
        1.0,
    ),
    Ratio("JSON Schema messages/s, of JSONDeserializer's", "json-schema", "raw-json-schema", _throughput, 1.0),
    Ratio("messages/s with work, of the loop's with the same work", "work", "raw-spin", _throughput, 1.8),
    Ratio("messages/s with work by key over one partition, of the loop's", "work-1", "raw-spin-1", _throughput, 1.5),
    Ratio("messages/s waiting, 8 partitions, of one at a time", "waiting-8", "raw-waiting", _throughput, 50),
    Ratio("messages/s waiting, 8 partitions, of 1,000 tasks'", "waiting-8", "raw-tasks-8", _throughput, 0.8),
    Ratio("messages/s waiting, 1 partition, of one at a time", "waiting-1", "raw-waiting", _throughput),
    Ratio("messages/s waiting, 1 partition, of 1,000 tasks'", "waiting-1", "raw-tasks-1", _throughput, 0.8),
    Ratio("messages/s waiting in threads, of one at a time", "threads-8", "raw-waiting", _throughput),
    Ratio(
        "on_checkpoint messages/s in SQLite, of the loop's", "effects-sqlite", "raw-effects-sqlite", _throughput, 1.5
    ),
    Ratio(
        "on_checkpoint messages/s in PostgreSQL, of the loop's",
        "effects-postgres",
        "raw-effects-postgres",
        _throughput,
        1.5,
    ),
    Ratio("KafkaSource.poll() messages/s, of the default loop's", "source-poll", "raw-default", _throughput, 1.0),
    Ratio("KafkaSource.poll_batch() messages/s, of the tuned loop's", "source-batch", "raw-tuned", _throughput, 0.8),
    Ratio("the same with 5 µs of work each, of the loop's with it", "source-light", "raw-light", _throughput, 0.95),
    Ratio("KafkaSource Avro messages/s, of AvroDeserializer's", "source-avro", "raw-avro", _throughput, 2.0),
    Ratio("async for messages/s, of aiokafka's", "source-async-for", "raw-async-for", _throughput, 1.0),
    Ratio("latency p99, of the poll() loop's", "latency", "raw-latency", _p99, 2.0, at_most=True),
)


def lines(results: Mapping[str, BenchResult]) -> list[str]:
    """A line for each ratio whose two rows were measured."""
    found: list[str] = []
    for ratio in RATIOS:
        if ratio.row in results and ratio.peer in results:
            value = ratio.figure(results[ratio.row]) / ratio.figure(results[ratio.peer])
            if ratio.goal is None:
                found.append(f"{value:6.2f}  {ratio.text}")
                continue
            reached = value <= ratio.goal if ratio.at_most else value >= ratio.goal
            bound = "at most" if ratio.at_most else "at least"
            mark = "reached" if reached else "missed"
            found.append(f"{value:6.2f}  {ratio.text} (goal: {bound} {ratio.goal:g}, {mark})")
    return found
