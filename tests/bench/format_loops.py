"""The peers of the rows with formats: the tuned loop with what people deserialize by, confluent-kafka's own for those
with a schema."""

import json
from collections.abc import Callable
from contextlib import closing
from typing import Any

import msgspec
import orjson
from confluent_kafka import Consumer, KafkaException
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer as _AvroDeserializer
from confluent_kafka.schema_registry.json_schema import JSONDeserializer as _JSONDeserializer
from confluent_kafka.schema_registry.protobuf import ProtobufDeserializer as _ProtobufDeserializer
from confluent_kafka.serialization import MessageField, SerializationContext
from google.protobuf.json_format import MessageToDict

from tests.bench import loop_process
from tests.bench.loop_process import TUNED, Job, committed_batches, default_settings, measured
from tests.bench.order_formats import JSON_SCHEMA, Amounts, Order, User, protobuf_class
from tests.bench.result import BenchResult, Stopwatch, Workload
from tests.kafka_cluster import KafkaCluster

# The type checkers disagree on what their constructors take.
AvroDeserializer: Any = _AvroDeserializer
JSONDeserializer: Any = _JSONDeserializer
ProtobufDeserializer: Any = _ProtobufDeserializer

Deserialize = Callable[[bytes], object]


def json_dataclass_loop(job: Job) -> BenchResult:
    """orjson, and dataclasses made of what it gives."""
    loads = orjson.loads

    def deserialize(value: bytes) -> Order:
        document = loads(value)
        document["user"] = User(**document["user"])
        document["amounts"] = Amounts(**document["amounts"])
        return Order(**document)

    return _loop(job, deserialize)


def json_msgspec_loop(job: Job) -> BenchResult:
    """msgspec, which makes the dataclasses and checks their types: what kafkasrcd itself uses."""
    return _loop(job, msgspec.json.Decoder(Order).decode)


def avro_loop(job: Job) -> BenchResult:
    """As in its documentation, with one context for all records."""
    deserializer = AvroDeserializer(_client(job))
    context = _context(job)
    return _loop(job, lambda value: deserializer(value, context))


def json_schema_loop(job: Job) -> BenchResult:
    """As in its documentation, with one context for all records, and with orjson."""
    deserializer = JSONDeserializer(json.dumps(JSON_SCHEMA), json_decode=orjson.loads)
    context = _context(job)
    return _loop(job, lambda value: deserializer(value, context))


def protobuf_loop(job: Job) -> BenchResult:
    """As in its documentation, with one context for all records."""
    deserializer = ProtobufDeserializer(protobuf_class(), {"use.deprecated.format": False})
    context = _context(job)
    return _loop(job, lambda value: deserializer(value, context))


def protobuf_dict_loop(job: Job) -> BenchResult:
    """The same, and dicts of it."""
    deserializer = ProtobufDeserializer(protobuf_class(), {"use.deprecated.format": False})
    context = _context(job)
    return _loop(job, lambda value: MessageToDict(deserializer(value, context), preserving_proto_field_name=True))


def run_json_dataclass(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `json_dataclass_loop`."""
    return loop_process.run(json_dataclass_loop, "tuned loop, orjson and dataclasses", cluster, workload)


def run_json_msgspec(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `json_msgspec_loop`."""
    return loop_process.run(json_msgspec_loop, "tuned loop, msgspec's decoder of dataclasses", cluster, workload)


def run_avro(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `avro_loop`."""
    return loop_process.run(avro_loop, "tuned loop, AvroDeserializer", cluster, workload)


def run_json_schema(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `json_schema_loop`."""
    return loop_process.run(json_schema_loop, "tuned loop, JSONDeserializer", cluster, workload)


def run_protobuf(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `protobuf_loop`."""
    return loop_process.run(protobuf_loop, "tuned loop, ProtobufDeserializer", cluster, workload)


def run_protobuf_dict(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """The row of `protobuf_dict_loop`."""
    return loop_process.run(protobuf_dict_loop, "tuned loop, ProtobufDeserializer and dicts", cluster, workload)


def _loop(job: Job, deserialize: Deserialize) -> BenchResult:
    with closing(Consumer({**default_settings(job), **TUNED})) as consumer:
        count = 0
        stopwatch: Stopwatch | None = None
        for messages in committed_batches(consumer, job.workload.topic, job.workload.messages):
            stopwatch = stopwatch or Stopwatch()
            for message in messages:
                if message.error():
                    raise KafkaException(message.error())
                deserialize(message.value() or b"")
            count += len(messages)
        return measured(stopwatch).result(job.name, count)


def _client(job: Job) -> SchemaRegistryClient:
    return SchemaRegistryClient({"url": job.workload.registry_url})


def _context(job: Job) -> SerializationContext:
    return SerializationContext(job.workload.topic, MessageField.VALUE)


if __name__ == "__main__":
    loop_process.main(
        {
            loop.__name__: loop
            for loop in (
                json_dataclass_loop,
                json_msgspec_loop,
                avro_loop,
                json_schema_loop,
                protobuf_loop,
                protobuf_dict_loop,
            )
        }
    )
