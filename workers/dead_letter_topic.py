"""Dead letters in a topic: the record as it was, with what was in the way of handling it in headers."""

from typing import Final

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from kafkasrcd.errors import DeadLetterRefused
from kafkasrcd.message import Headers, decode_headers
from kafkasrcd.settings import Settings
from kafkasrcd.storage.dead_letters import DeadLetter
from kafkasrcd.workers.kafka_settings import QUIET, producer_config

_DELIVERY_SECONDS: Final = 20.0
"""Until a letter that no broker has taken is given up, to be tried again."""
_HEADER: Final = "kafkasrcd."
_OVERHEAD_BYTES: Final = 4_096
"""More than a batch, a record and their headers need beside what they carry."""


class DeadLetterTopic:
    """Produces with acks=all and idempotence, one at a time. Made without connecting."""

    def __init__(self, settings: Settings) -> None:
        self._topic = settings.handler.dead_letter_topic
        self._group_id = settings.group_id
        config = producer_config(settings, _DELIVERY_SECONDS)
        self._most_bytes = int(config["message.max.bytes"])
        self._producer = Producer({**QUIET, **config})

    def produce(self, letter: DeadLetter) -> None:
        """Returns once the brokers have it. Raises DeadLetterRefused where they do not take it."""
        topic = topic_of(self._topic, letter.topic)
        headers = headers_of(letter, self._group_id)
        errors: list[KafkaError | None] = []

        def delivered(error: KafkaError | None, _: Message) -> None:
            errors.append(error)

        try:
            self._producer.produce(topic, letter.value, letter.key, headers=headers, on_delivery=delivered)
            self._producer.flush(_DELIVERY_SECONDS + 1)
        except KafkaException as refusal:
            errors.append(refusal.args[0])
        except BufferError as refusal:
            raise DeadLetterRefused(f"topic {topic!r} does not take it: {refusal}") from refusal
        error = errors[0] if errors else KafkaError(KafkaError._TIMED_OUT)
        if error is not None:
            # What is queued still would be delivered later, beside the one of the next attempt.
            self._producer.purge()
            said = f"topic {topic!r} does not take it: {error.str()}"
            if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
                said += f"; {self._cure(letter, headers)}"
            raise DeadLetterRefused(said)

    def _cure(self, letter: DeadLetter, headers: list[tuple[str, str | bytes | None]]) -> str:
        """What to do for a letter that is too large, as it is or with its headers."""
        texts = [letter.key, letter.value, *(text for pair in headers for text in pair)]
        size = sum(len(text.encode() if isinstance(text, str) else text or b"") for text in texts) + _OVERHEAD_BYTES
        cure = f"set max.message.bytes of that topic to {size} or more"
        if size > self._most_bytes:
            cure += ", extra_config.message.max.bytes too, and see that the brokers' socket.request.max.bytes is above"
        return f"{cure}; or take handler.dead_letter_topic away, for the store alone"


def topic_of(pattern: str, topic: str) -> str:
    """``{topic}.DLQ`` for a record of ``topic``."""
    return pattern.replace("{topic}", topic)


def headers_of(letter: DeadLetter, group_id: str) -> list[tuple[str, str | bytes | None]]:
    """The record's own headers, then ours, which begin with ``kafkasrcd.``; all ours are text."""
    own = Headers(()) if letter.headers is None else decode_headers(letter.headers)
    ours = {
        "group_id": group_id,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "timestamp_ms": letter.timestamp_ms,
        "value_format": letter.value_format,
        "schema_id": "" if letter.schema_id is None else letter.schema_id,
        "error": letter.error,
        "reason": letter.reason,
        "traceback": letter.traceback,
        "attempts": letter.attempts,
        "first_failed_ms": letter.first_failed_ms,
        "last_failed_ms": letter.last_failed_ms,
        "host": letter.host,
        "version": letter.version,
    }
    return [*own.items_all(), *((f"{_HEADER}{name}", str(value)) for name, value in ours.items())]
