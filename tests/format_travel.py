"""Records through both halves of a format and the frame between them, as between two processes."""

from array import array
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from kafkasrcd.settings import FormatSettings, SchemaRegistrySettings, Settings
from kafkasrcd.workers.formats import Formats
from kafkasrcd.workers.frame import Columns, RecordError, decode_frame, encode_frame
from kafkasrcd.workers.payload import decoder_of, shape_of
from kafkasrcd.workers.preparing import preparation_of
from kafkasrcd.workers.reasons import reason_of
from kafkasrcd.workers.record_batch import columns_of
from tests.test_record_batch import Headers, kafka_message

TOPIC = "orders"
NOTHING: Mapping[str, str] = MappingProxyType({})


class Bad(NamedTuple):
    """A record that cannot be deserialized, with the reason."""

    reason: str


class Travel:
    """Of one topic. ``row`` and ``more``: its settings in ``[formats.orders]``."""

    def __init__(
        self,
        payload_type: Any = Any,
        *,
        folder: Path = Path(),
        registry: str | SchemaRegistrySettings = "",
        schema_directory: Path | None = None,
        row: Mapping[str, str] = NOTHING,
        **more: str,
    ) -> None:
        if isinstance(registry, str):
            registry = SchemaRegistrySettings(url=registry, timeout_ms=2_000)
        settings = Settings(topics=[TOPIC], formats={TOPIC: FormatSettings(**row, **more)}, schema_registry=registry)
        formats = Formats(settings)
        self._decode = decoder_of(formats.value(TOPIC), payload_type)
        self.preparation = preparation_of(
            settings,
            TOPIC,
            shape_of(payload_type),
            folder,
            "" if schema_directory is None else str(schema_directory),
            memoryview(array("q", [0] * 512)),
        )

    def columns(self, *raws: bytes | None, headers: Headers | None = None) -> Columns:
        """What the handler process finds in the frame."""
        columns = columns_of([kafka_message(offset, raw, headers=headers) for offset, raw in enumerate(raws)])
        if self.preparation is not None:
            messages = [kafka_message(offset, raw, headers=headers) for offset, raw in enumerate(raws)]
            assert self.preparation.ready(messages) == len(raws)
            columns = self.preparation.prepare(columns)
        return decode_frame(b"".join(encode_frame(columns).parts))

    def __call__(self, *raws: bytes | None, headers: Headers | None = None) -> list[Any]:
        """The payload of each, or Bad; all have ``headers``."""
        columns = self.columns(*raws, headers=headers)
        assert list(columns.raws or columns.values) == list(raws), "what Kafka has is kept"
        errors: dict[int, RecordError] = {error.index: error for error in columns.errors}
        return [
            Bad(errors[index].reason) if index in errors else self._payload(value)
            for index, value in enumerate(columns.values)
        ]

    def _payload(self, value: bytes | None) -> Any:
        try:
            return None if value is None else self._decode(value)
        except Exception as error:
            return Bad(reason_of(error))
