"""The orders of the topics as classes and in each format with a schema, registered with a real registry."""

import io
import json
from dataclasses import dataclass
from typing import Any

import fastavro
import orjson
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from kafkasrcd.workers.protobuf_format import compiled
from tests.bench.topic import Encode
from tests.registry_server import RegistryServer


@dataclass(slots=True)
class User:
    id: int
    country: str
    vip: bool


@dataclass(slots=True)
class Amounts:
    net: float
    tax: float
    currency: str


@dataclass(slots=True)
class Order:
    order_id: str
    user: User
    status: str
    amounts: Amounts
    items: list[int]
    created_at_ms: int
    note: str | None
    trace: str


AVRO_SCHEMA: dict[str, Any] = {
    "type": "record",
    "name": "Order",
    "fields": [
        {"name": "order_id", "type": "string"},
        {
            "name": "user",
            "type": {
                "type": "record",
                "name": "User",
                "fields": [
                    {"name": "id", "type": "long"},
                    {"name": "country", "type": "string"},
                    {"name": "vip", "type": "boolean"},
                ],
            },
        },
        {"name": "status", "type": "string"},
        {
            "name": "amounts",
            "type": {
                "type": "record",
                "name": "Amounts",
                "fields": [
                    {"name": "net", "type": "double"},
                    {"name": "tax", "type": "double"},
                    {"name": "currency", "type": "string"},
                ],
            },
        },
        {"name": "items", "type": {"type": "array", "items": "long"}},
        {"name": "created_at_ms", "type": "long"},
        {"name": "note", "type": ["null", "string"]},
        {"name": "trace", "type": "string"},
    ],
}

PROTO = """
syntax = "proto3";
package bench;
message Order {
  string order_id = 1;
  User user = 2;
  string status = 3;
  Amounts amounts = 4;
  repeated int64 items = 5;
  int64 created_at_ms = 6;
  optional string note = 7;
  string trace = 8;
}
message User { int64 id = 1; string country = 2; bool vip = 3; }
message Amounts { double net = 1; double tax = 2; string currency = 3; }
"""
_FIRST_MESSAGE = b"\0"
"""As the registry's serializers say it after the id."""

JSON_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "order_id": {"type": "string"},
        "user": {
            "type": "object",
            "properties": {"id": {"type": "integer"}, "country": {"type": "string"}, "vip": {"type": "boolean"}},
            "required": ["id", "country", "vip"],
        },
        "status": {"enum": ["created", "paid", "packed", "shipped", "returned"]},
        "amounts": {
            "type": "object",
            "properties": {"net": {"type": "number"}, "tax": {"type": "number"}, "currency": {"type": "string"}},
            "required": ["net", "tax", "currency"],
        },
        "items": {"type": "array", "items": {"type": "integer"}},
        "created_at_ms": {"type": "integer"},
        "note": {"type": ["null", "string"]},
        "trace": {"type": "string"},
    },
    "required": ["order_id", "user", "status", "amounts", "items", "created_at_ms", "trace"],
}


def protobuf_class() -> Any:
    """The class that protoc would generate of `PROTO`'s order. Runs protoc."""
    pool: Any = descriptor_pool.DescriptorPool()
    pool.Add(descriptor_pb2.FileDescriptorSet.FromString(compiled(PROTO, ())).file[-1])
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("bench.Order"))


def avro_encode(registry: RegistryServer) -> Encode:
    """As the registry's serializer writes it, without what that costs."""
    header = _header(registry.register("bench-avro-value", json.dumps(AVRO_SCHEMA)))
    schema = fastavro.parse_schema(AVRO_SCHEMA)
    library: Any = fastavro

    def encode(order: dict[str, Any]) -> bytes:
        stream = io.BytesIO()
        stream.write(header)
        library.schemaless_writer(stream, schema, order)
        return stream.getvalue()

    return encode


def protobuf_encode(registry: RegistryServer) -> Encode:
    """As the registry's serializer writes it, without what that costs."""
    header = _header(registry.register("bench-protobuf-value", PROTO, "PROTOBUF")) + _FIRST_MESSAGE
    order_class = protobuf_class()
    return lambda order: header + order_class(**order).SerializeToString()


def json_schema_encode(registry: RegistryServer) -> Encode:
    """As the registry's serializer writes it, without what that costs."""
    header = _header(registry.register("bench-json-schema-value", json.dumps(JSON_SCHEMA), "JSON"))
    return lambda order: header + orjson.dumps(order)


def _header(schema_id: int) -> bytes:
    return b"\0" + schema_id.to_bytes(4)
