"""Schemas named by GUID in a record's headers, as confluent-kafka's header serializers write them.

The registry of these tests knows no GUIDs, so a proxy before it does: which id each stands for.
"""

import importlib
import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import schema_registry as of_confluent
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroSerializer as _AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONSerializer as _JSONSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufSerializer as _ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

from kafkasrcd.message import encode_headers
from kafkasrcd.settings import SchemaRegistrySettings
from kafkasrcd.workers.formats import Format, Kind
from kafkasrcd.workers.schema_document import RegistryAway
from tests.format_travel import Bad, Travel
from tests.registry_proxy import RegistryProxy
from tests.registry_server import RegistryServer
from tests.test_record_batch import Headers

# The type checkers disagree on what their constructors take.
AvroSerializer: Any = _AvroSerializer
JSONSerializer: Any = _JSONSerializer
ProtobufSerializer: Any = _ProtobufSerializer
header_schema_id_serializer: Any = vars(of_confluent)["header_schema_id_serializer"]

CITY = {"type": "record", "name": "City", "fields": [{"name": "zip", "type": "int"}]}
JSON_CITY = {"title": "City", "type": "object", "properties": {"zip": {"type": "integer"}}, "required": ["zip"]}


@pytest.fixture
def registry(schema_registry: RegistryServer) -> Iterator[RegistryProxy]:
    with RegistryProxy(schema_registry.url) as proxy:
        yield proxy


class Writer:
    """Serializes values as producers do that put the GUID of a schema into a header."""

    def __init__(self, registry: RegistryProxy, client: SchemaRegistryClient) -> None:
        self._registry = registry
        self._client = client
        self._topic = f"t{uuid.uuid4().hex[:12]}"

    def __call__(self, make: Callable[[Any, Any], Any], value: Any) -> tuple[bytes, Headers]:
        headers: Headers = [("trace", b"1")]
        serializer = make(self._client, {"schema.id.serializer": self._with_guid, "use.deprecated.format": False})
        raw: bytes | None = serializer(value, SerializationContext(self._topic, MessageField.VALUE, headers))
        assert raw is not None
        return raw, headers

    def _with_guid(self, payload: bytes, context: Any, schema_id: Any) -> bytes:
        """As a registry that knows GUIDs would have told the serializer."""
        schema_id.guid = uuid.uuid4()
        self._registry.guids[str(schema_id.guid)] = schema_id.id
        written: bytes = header_schema_id_serializer(payload, context, schema_id)
        return written


@pytest.fixture
def write(registry: RegistryProxy, schema_registry: RegistryServer) -> Iterator[Writer]:
    with SchemaRegistryClient({"url": schema_registry.url}) as client:
        yield Writer(registry, client)


def avro(client: Any, settings: dict[str, Any]) -> Any:
    return AvroSerializer(client, json.dumps(CITY), conf={"schema.id.serializer": settings["schema.id.serializer"]})


def json_schema(client: Any, settings: dict[str, Any]) -> Any:
    own = {"schema.id.serializer": settings["schema.id.serializer"]}
    return JSONSerializer(json.dumps(JSON_CITY), client, conf=own)


@pytest.mark.parametrize(("form", "make"), [("avro", avro), ("json_schema", json_schema)])
def test_a_value_whose_schema_a_header_names(
    registry: RegistryProxy, write: Writer, tmp_path: Path, form: str, make: Callable[[Any, Any], Any]
) -> None:
    raw, headers = write(make, {"zip": 7})
    travel = Travel(value_format=form, registry=registry.url, schema_directory=tmp_path)
    assert travel(raw, None, raw, headers=headers) == [{"zip": 7}, None, {"zip": 7}]
    (guid,) = registry.guids
    assert registry.asked == [f"/schemas/guids/{guid}"], "once"
    assert Travel(value_format=form, registry=registry.url, schema_directory=tmp_path)(raw, headers=headers) == [
        {"zip": 7}
    ]
    assert len(registry.asked) == 1, "and it is kept"


def test_a_message_within_a_message_whose_schema_a_header_names(
    registry: RegistryProxy, write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"city{uuid.uuid4().hex[:8]}"
    text = 'syntax = "proto3"; message First { int32 a = 1; } message Land { message City { int32 zip = 1; } }'
    (tmp_path / f"{name}.proto").write_text(text)
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{tmp_path}", f"--python_out={tmp_path}", f"{name}.proto"]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=60)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    city = importlib.import_module(f"{name}_pb2").Land.City

    def make(client: Any, settings: Any) -> Any:
        return ProtobufSerializer(city, client, settings)

    raw, headers = write(make, city(zip=7))
    assert Travel(value_format="protobuf", registry=registry.url)(raw, headers=headers) == [{"zip": 7}]
    (typed,) = Travel(city, value_format="protobuf", registry=registry.url)(raw, headers=headers)
    assert typed == city(zip=7)


def test_what_a_header_can_be_wrong_in(registry: RegistryProxy, write: Writer) -> None:
    raw, headers = write(avro, {"zip": 7})
    travel = Travel(value_format="avro", registry=registry.url)
    unknown = uuid.uuid4()
    (bad,) = travel(raw, headers=[("__value_schema_id", b"\1" + unknown.bytes)])
    assert bad == Bad(f"the registry at {registry.url} has no schema {unknown}")
    (bad,) = travel(raw, headers=[("__value_schema_id", b"\1abc")])
    assert bad == Bad("ValueError: its header __value_schema_id or __key_schema_id names no schema: 01 61 62 63")
    for other in (("__value_schema_id", None), ("__key_schema_id", headers[1][1])):
        (bad,) = travel(raw, headers=[other])
        assert "no schema registry's header" in bad.reason
    (bad,) = travel(b"\1" + unknown.bytes + raw)
    assert "no schema registry's header (it begins with 01 " in bad.reason, "a GUID is in a header or nowhere"
    assert travel(raw, headers=[*headers, ("__value_schema_id", b"")]) == [{"zip": 7}], "the first counts"


def test_a_registry_that_knows_no_guids_is_waited_for(
    registry: RegistryProxy, schema_registry: RegistryServer, write: Writer
) -> None:
    raw, headers = write(avro, {"zip": 7})
    with pytest.raises(RegistryAway, match=r"answers 404 .*; or it knows no GUIDs"):
        Travel(value_format="avro", registry=SchemaRegistrySettings(url=schema_registry.url))(raw, headers=headers)


def test_a_dead_letter_takes_no_id_from_a_value_whose_schema_a_header_names() -> None:
    form = Format(kind=Kind.AVRO)
    value = b"\0\0\0\0\7 and so on"
    assert form.schema_id(value, encode_headers([("trace", b"1")])) == 7
    assert form.schema_id(value, encode_headers([("__value_schema_id", b"\1" + bytes(16))])) is None
