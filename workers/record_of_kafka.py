"""One record as Kafka has it, for a dead letter whose record fits no ring."""

from typing import Final

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from kafkasrcd.errors import DeadLetterRefused
from kafkasrcd.settings import Settings
from kafkasrcd.storage.dead_letters import DeadLetter
from kafkasrcd.workers.deadline import Deadline
from kafkasrcd.workers.formats import Format
from kafkasrcd.workers.kafka_settings import QUIET, worker_config
from kafkasrcd.workers.record_batch import columns_of

_FETCH_SECONDS: Final = 20.0
"""For 100 MB, at 5 MB a second; then the letter is tried again."""
_GONE: Final = frozenset({KafkaError._PARTITION_EOF, KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE})
"""Ends of the partition, and no record before them."""


def with_record(letter: DeadLetter, settings: Settings, value_format: Format) -> DeadLetter:
    """``letter`` with key, value and headers; where Kafka has the record no longer, as it is, and its reason says so.

    Blocks for ``_FETCH_SECONDS`` at most. Raises DeadLetterRefused where no broker gives an answer.
    """
    where = f"{letter.topic}[{letter.partition}]@{letter.offset}"
    try:
        message = _fetch(letter, settings)
    except KafkaException as error:
        raise DeadLetterRefused(f"{where}: its bytes cannot be fetched: {error.args[0].str()}") from error
    if message is None:
        reason = f"{letter.reason}; without its bytes: Kafka has the record no longer"
        return msgspec.structs.replace(letter, reason=reason)
    columns = columns_of([message])
    value = columns.values[0]
    return msgspec.structs.replace(
        letter,
        key=columns.raw_key(0),
        value=value,
        headers=None if columns.headers is None else columns.headers[0],
        schema_id=value_format.schema_id(value),
    )


def _fetch(letter: DeadLetter, settings: Settings) -> Message | None:
    deadline = Deadline(_FETCH_SECONDS)
    said: KafkaError | None = None

    def on_error(error: KafkaError) -> None:
        nonlocal said
        said = error

    consumer = Consumer({**QUIET, **worker_config(settings), "error_cb": on_error})
    try:
        consumer.assign([TopicPartition(letter.topic, letter.partition, letter.offset)])
        while not deadline.passed:
            message = consumer.poll(min(deadline.remaining, 1.0))
            if message is None:
                continue
            error = message.error()
            if error is None:
                return message if message.offset() == letter.offset else None
            if error.code() in _GONE:
                return None
            said = error
    finally:
        consumer.close()
    raise KafkaException(said or KafkaError(KafkaError._TIMED_OUT))
