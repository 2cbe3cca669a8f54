"""Protobuf: the worker's half. A message is read by its descriptor and goes on as MessagePack, its fields named as in
the ``.proto``; for a handler that takes a generated class it goes on as it is, without the registry's header."""

import base64
import binascii
import importlib
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from datetime import UTC
from pathlib import Path, PurePosixPath
from typing import Any, Final

import msgspec
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.workers import extensions
from kafkasrcd.workers.formats import HEADER_BYTES, Format, Shape
from kafkasrcd.workers.registered import Registered, check_header
from kafkasrcd.workers.schema_cache import SchemaCache
from kafkasrcd.workers.schema_document import Reference, SchemaDocument

_COMPILER_SECONDS: Final = 60.0
_MOST_INDEXES: Final = 64
_FIRST: Final = (0,)
_WELL_KNOWN: Final = "google/protobuf/"
_WRAPPERS: Final = frozenset(
    f"google.protobuf.{kind}Value"
    for kind in ("Bool", "Bytes", "Double", "Float", "Int32", "Int64", "String", "UInt32", "UInt64")
)
_AS_JSON: Final = frozenset(
    f"google.protobuf.{kind}" for kind in ("Struct", "Value", "ListValue", "Any", "FieldMask", "Empty")
)


class NotCompiled(Exception):
    """A schema is none, or there is no compiler for it; the message says which."""


def preparer_of(form: Format, shape: Shape, base_directory: Path, schemas: SchemaCache | None) -> Any:
    """See ``preparing.Preparer``. Raises ConfigurationError where a schema's file cannot be used."""
    side = form.setting.rpartition("_")[0]
    if form.schema:
        read = _Reader(shape).read(_from_file(base_directory / form.schema, form.message, side))
        return _FromFile(_same if shape is Shape.MESSAGE else read)
    if schemas is None:
        raise ConfigurationError(f"{form.setting}: protobuf needs schema_registry.url, or {side}_schema")
    return _WithoutHeader() if shape is Shape.MESSAGE else _FromRegistry(schemas, shape)


def message_indexes(raw: bytes, start: int) -> tuple[tuple[int, ...], int]:
    """Which message of its schema a value is, as places within places, and where it begins. Raises ValueError."""
    if raw[start : start + 1] == b"\0":  # how most values say that it is the first
        return _FIRST, start + 1
    count, place = _varint(raw, start)
    if not 0 <= count <= _MOST_INDEXES:
        raise ValueError(f"a header with {count} message indexes")
    indexes: list[int] = []
    for _ in range(count):
        index, place = _varint(raw, place)
        indexes.append(index)
    return tuple(indexes) or _FIRST, place


def compiled(text: str, references: Iterable[Reference]) -> bytes:
    """A FileDescriptorSet of a schema and what it refers to, the schema last. Raises NotCompiled."""
    sources = [("", text), *((reference.name, reference.text) for reference in references)]
    descriptors = {name: _as_descriptor(source) for name, source in sources}
    if all(descriptor is not None for descriptor in descriptors.values()):
        files = descriptor_pb2.FileDescriptorSet()
        for name, descriptor in sorted(descriptors.items(), key=lambda item: not item[0]):
            if descriptor is not None:
                descriptor.name = name or descriptor.name
                files.file.append(descriptor)
        return files.SerializeToString()
    with tempfile.TemporaryDirectory(prefix="kafkasrcd-proto-") as folder:
        for name, source in sources:
            path = _inside(Path(folder), name or "kafkasrcd_schema.proto")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return _compile(Path(folder, "kafkasrcd_schema.proto"), Path(folder))


class _FromFile:
    def __init__(self, prepare: Callable[[bytes], bytes]) -> None:
        self.prepare = prepare

    def need(self, raw: bytes) -> None:
        """Nothing is needed."""


class _WithoutHeader:
    """For a generated class: it is the schema, and the registry need not be asked."""

    def need(self, raw: bytes) -> None:
        """Nothing is needed."""

    def prepare(self, raw: bytes) -> bytes:
        check_header(raw)
        return raw[message_indexes(raw, HEADER_BYTES)[1] :]


class _FromRegistry:
    def __init__(self, schemas: SchemaCache, shape: Shape) -> None:
        self._shape = shape
        self._registered = Registered(schemas, "PROTOBUF", self._messages, _with_descriptors)
        self.need = self._registered.need

    def prepare(self, raw: bytes) -> bytes:
        messages = self._registered.of(raw)
        indexes, start = message_indexes(raw, HEADER_BYTES)
        return messages.read(indexes)(raw[start:])

    def _messages(self, document: SchemaDocument) -> "_Messages":
        return _Messages(document.compiled or compiled(document.text, document.references), self._shape)


def _with_descriptors(document: SchemaDocument) -> SchemaDocument:
    """With what protoc makes of it, so that one worker of a host runs it; as it is where that is nothing."""
    try:
        return msgspec.structs.replace(document, compiled=compiled(document.text, document.references))
    except Exception:  # noqa: BLE001 - whoever reads it meets it again, and says it
        return document


class _Messages:
    """The messages of one schema, by their places in it."""

    def __init__(self, files: bytes, shape: Shape) -> None:
        self._pool, self._file = _loaded(files)
        self._reader = _Reader(shape)
        self._known: dict[tuple[int, ...], Callable[[bytes], bytes]] = {}

    def read(self, indexes: tuple[int, ...]) -> Callable[[bytes], bytes]:
        if (known := self._known.get(indexes)) is not None:
            return known
        inside: Any = self._file.message_type
        names = [self._file.package] if self._file.package else []
        for index in indexes:
            if not 0 <= index < len(inside):
                raise ValueError(f"its header names message {list(indexes)} of its schema, which has no such one")
            names.append(inside[index].name)
            inside = inside[index].nested_type
        read = self._reader.read(self._pool.FindMessageTypeByName(".".join(names)))
        self._known[indexes] = read
        return read


class _Reader:
    """From messages of one pool to MessagePack: another version of a schema has other fields under the same name."""

    def __init__(self, shape: Shape) -> None:
        self._is_plain = shape is Shape.PLAIN
        self._known: dict[str, Callable[[Any], dict[str, Any]]] = {}
        self._has_durations = False
        """MessagePack knows all other objects that are made here."""

    def read(self, descriptor: Descriptor) -> Callable[[bytes], bytes]:
        message_class: Any = message_factory.GetMessageClass(descriptor)
        encode = extensions.encode
        value_of = self._message_value(descriptor)
        has_objects = self._is_plain and self._has_durations

        def read(raw: bytes) -> bytes:
            value = value_of(message_class.FromString(raw))
            return encode(extensions.with_extensions(value) if has_objects else value)

        return read

    def _message_value(self, descriptor: Descriptor) -> Callable[[Any], Any]:
        match descriptor.full_name:
            case "google.protobuf.Timestamp":
                return lambda message: message.ToDatetime(tzinfo=UTC)
            case "google.protobuf.Duration":
                self._has_durations = True
                return lambda message: message.ToTimedelta()
            case name if name in _WRAPPERS:
                return lambda message: message.value
            case name if name in _AS_JSON:
                return json_format.MessageToDict
            case name:
                return self._known.get(name) or self._as_dict(descriptor)

    def _as_dict(self, descriptor: Descriptor) -> Callable[[Any], dict[str, Any]]:
        """All fields that have a value: without presence (proto3's scalars) its default is one."""
        fields: list[tuple[str, bool, Callable[[Any], Any]]] = []

        def read(message: Any) -> dict[str, Any]:
            value: dict[str, Any] = {}
            for name, has_presence, value_of in fields:
                if not has_presence or message.HasField(name):
                    item = getattr(message, name)
                    value[name] = item if value_of is _same else value_of(item)
            return value

        self._known[descriptor.full_name] = read  # first: a message may hold others of its kind
        fields += [(field.name, field.has_presence, self._field_value(field)) for field in descriptor.fields]
        return read

    def _field_value(self, field: FieldDescriptor) -> Callable[[Any], Any]:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            item = self._single_value(field.message_type.fields_by_name["value"])
            return lambda items: {key: item(items[key]) for key in items}
        single = self._single_value(field)
        if field.is_repeated:
            if single is _same:
                return list
            return lambda items: [single(each) for each in items]
        return single

    def _single_value(self, field: FieldDescriptor) -> Callable[[Any], Any]:
        if field.message_type is not None:
            return self._message_value(field.message_type)
        if field.enum_type is not None:
            names = {number: value.name for number, value in field.enum_type.values_by_number.items()}
            return lambda number: names.get(number, number)
        return _same


def _same(value: Any) -> Any:
    return value


def _loaded(files: bytes) -> tuple[Any, descriptor_pb2.FileDescriptorProto]:
    """A pool with everything in a FileDescriptorSet, and the last file in it."""
    pool: Any = descriptor_pool.DescriptorPool()
    given = descriptor_pb2.FileDescriptorSet.FromString(files)
    names = {file.name for file in given.file}
    added: set[str] = set()

    def add(file: descriptor_pb2.FileDescriptorProto) -> None:
        if file.name in added:
            return
        added.add(file.name)
        for dependency in file.dependency:
            if dependency not in names and dependency.startswith(_WELL_KNOWN):
                add(_well_known(dependency))
        pool.Add(file)

    for file in given.file:
        add(file)
    return pool, given.file[-1]


def _well_known(name: str) -> descriptor_pb2.FileDescriptorProto:
    module: Any = importlib.import_module(name.removesuffix(".proto").replace("/", ".") + "_pb2")
    return descriptor_pb2.FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)


def _as_descriptor(source: str) -> descriptor_pb2.FileDescriptorProto | None:
    """A registry may have a schema as a descriptor, in base64, and not as text."""
    try:
        return descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(source, validate=True))
    except (binascii.Error, ValueError):
        return None
    except Exception:  # noqa: BLE001 - protobuf's DecodeError is of no public class
        return None


def _from_file(path: Path, message: str, side: str) -> Descriptor:
    """The message of a ``.proto``, or of a compiled descriptor set. Raises ConfigurationError."""
    try:
        content = path.read_bytes()
        pool, file = _loaded(_compile(path, path.parent) if path.suffix == ".proto" else content)
        names = [_full_name(file, each.name) for each in file.message_type]
        if not message and len(names) != 1:
            raise ConfigurationError(
                f"{side}_message: missing; {path} has {', '.join(names) or 'no message'}: say which values are"
            )
        try:
            found: Descriptor = pool.FindMessageTypeByName(message or names[0])
        except KeyError:
            raise ConfigurationError(
                f"{side}_message: {path} has no message {message!r}; it has {', '.join(names) or 'none'}"
            ) from None
    except ConfigurationError:
        raise
    except Exception as error:  # noqa: BLE001 - the library's, the file system's
        raise ConfigurationError(
            f"{side}_schema: {path} holds no Protobuf schema that can be used: {type(error).__name__}: {error}"
        ) from None
    return found


def _full_name(file: descriptor_pb2.FileDescriptorProto, name: str) -> str:
    return f"{file.package}.{name}" if file.package else name


def _compile(path: Path, folder: Path) -> bytes:
    """By protoc, in a process of its own: it is C++, and what it is given comes from elsewhere."""
    with tempfile.TemporaryDirectory(prefix="kafkasrcd-proto-") as output_folder:
        output = Path(output_folder, "descriptors")
        command = [sys.executable, "-P", "-m", "grpc_tools.protoc", f"-I{folder}", f"--descriptor_set_out={output}"]
        done = subprocess.run(
            [*command, f"-I{_compiler_protos()}", "--include_imports", str(path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMPILER_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip().replace(f"{folder}/", "")
            if "No module named" in said:
                said = "there is no compiler for it: pip install 'kafkasrcd[protobuf]'"
            raise NotCompiled(said[-2000:])
        return output.read_bytes()


def _compiler_protos() -> Path:
    """The well-known types' folder of the compiler."""
    spec = importlib.util.find_spec("grpc_tools")
    if spec is None or spec.origin is None:
        raise NotCompiled("there is no compiler for it: pip install 'kafkasrcd[protobuf]'")
    return Path(spec.origin).parent / "_proto"


def _inside(folder: Path, name: str) -> Path:
    """A path below ``folder``: what a reference is called comes from elsewhere."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\0" in name:
        raise NotCompiled(f"a reference called {name!r}")
    return folder.joinpath(*parts)


def _varint(raw: bytes, place: int) -> tuple[int, int]:
    """A zigzag-encoded number, and where the next byte is."""
    value = shift = 0
    while True:
        if place >= len(raw) or shift > 35:
            raise ValueError("a header whose message indexes have no end")
        byte = raw[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value >> 1) ^ -(value & 1), place
        shift += 7
