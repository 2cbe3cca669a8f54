"""Producing a dead letter's record as it was."""

import re
import time
from typing import Final

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from kafkasrcd.errors import BrokerUnavailable, DeadLetterRefused
from kafkasrcd.message import decode_headers
from kafkasrcd.settings import Settings
from kafkasrcd.storage.dead_letters import DeadLetter
from kafkasrcd.workers.kafka_settings import QUIET, producer_config

_ANSWER_SECONDS: Final = 10.0
"""For a broker to say what topics there are."""
_DELIVERY_SECONDS: Final = 20.0
"""Until a record that no broker has taken is given up."""
_POLL_SECONDS: Final = 0.1
"""A signal is heard between two calls of librdkafka."""
_NO_BROKER: Final = (KafkaError._MSG_TIMED_OUT, KafkaError._TIMED_OUT, KafkaError._TRANSPORT)


class LetterProducer:
    """Produces with acks=all and idempotence, one record at a time."""

    def __init__(self, settings: Settings) -> None:
        """Asks which topics there are. Raises BrokerUnavailable where no broker answers within 10 s."""
        self._brokers = settings.brokers
        self._errors: list[KafkaError] = []
        config = producer_config(settings, _DELIVERY_SECONDS)
        self._producer = Producer({**QUIET, **config, "error_cb": self._errors.append})
        # All of them: asked for one, a broker may create it, and a name mistyped would be a topic.
        try:
            topics = self._producer.list_topics(timeout=_ANSWER_SECONDS).topics
        except KafkaException as error:
            self._producer.poll(0)  # has the error callback called, with what went wrong in each connection
            raise BrokerUnavailable(
                f"no broker answers at {self._brokers}{self._why()}: check brokers, network and extra_config"
            ) from error
        self._partitions = {name: len(topic.partitions) for name, topic in topics.items() if topic.error is None}

    def produce(self, letter: DeadLetter, topic: str) -> str:
        """Returns where it is now, as ``orders[3]@7``, once the brokers have it; blocks up to 20 s.

        In its own topic it goes to its own partition, whose order by key may come from anywhere; in another one to the
        partition of its key. Raises DeadLetterRefused where the brokers will not take it, BrokerUnavailable where they
        do not say: they may have taken it all the same.
        """
        partitions = self._partitions.get(topic)
        if partitions is None:
            raise DeadLetterRefused(
                f"topic {topic!r} is not there, or not for this user to see: create it, or grant it"
            )
        partition = letter.partition if topic == letter.topic else -1
        if partition >= partitions:
            raise DeadLetterRefused(f"topic {topic!r} has no partition {partition} any more: name another topic")
        headers: list[tuple[str, str | bytes | None]] = []
        headers += [] if letter.headers is None else decode_headers(letter.headers).items_all()
        told: list[tuple[KafkaError | None, Message]] = []

        def delivered(error: KafkaError | None, message: Message) -> None:
            told.append((error, message))

        try:
            self._producer.produce(
                topic,
                letter.value,
                letter.key,
                partition,
                on_delivery=delivered,
                timestamp=max(0, letter.timestamp_ms),  # 0 is now: it had none
                headers=headers,
            )
        except (KafkaException, BufferError) as refusal:
            raise DeadLetterRefused(f"topic {topic!r} does not take it: {refusal}") from refusal
        deadline = time.monotonic() + _DELIVERY_SECONDS + 1
        while not told and time.monotonic() < deadline:
            self._producer.poll(_POLL_SECONDS)
        if not told:
            self._producer.purge()
        error, message = told[0] if told else (KafkaError(KafkaError._TIMED_OUT), None)
        if error is None and message is not None:
            return f"{topic}[{message.partition()}]@{message.offset()}"
        assert error is not None
        if error.code() in _NO_BROKER or error.fatal():
            raise BrokerUnavailable(
                f"no broker has confirmed it within {_DELIVERY_SECONDS:g} s{self._why()} ({error.str()}); one may have "
                "taken it all the same"
            )
        raise DeadLetterRefused(f"topic {topic!r} does not take it: {error.str()}")

    def _why(self) -> str:
        """What was wrong last; that all brokers are down only follows from that."""
        reasons = [error for error in self._errors if error.code() != KafkaError._ALL_BROKERS_DOWN]
        return f" ({re.sub(r' [(]after .*ms in state .*$', '', reasons[-1].str())})" if reasons else ""
