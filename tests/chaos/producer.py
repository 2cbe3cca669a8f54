"""The producer of a storm: payments at a steady rate through everything, and what the brokers have acknowledged."""

import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from confluent_kafka import KafkaError, Producer
from confluent_kafka import Message as ProducedMessage

from tests.chaos.payment import Payment
from tests.ledger import Coordinate

ACCOUNTS = 50
MOST_CENTS = 10_000
FLUSH_SECONDS = 120
"""Every broker is up by then; what is still queued has been waiting for one of them."""


class Acknowledged(NamedTuple):
    """A payment that the brokers have, and when (CLOCK_MONOTONIC) the producer heard of it."""

    payment: Payment
    at_ns: int


class PaymentProducer:
    """Produces on a thread from entering to `stop`. Which payments it makes depends on the seed alone."""

    def __init__(
        self, settings: Mapping[str, str | int | float | bool], topic: str, seed: int, per_second: int
    ) -> None:
        self.acknowledged: dict[Coordinate, Acknowledged] = {}
        self.unplaced: dict[int, Payment] = {}
        """By number, those that the brokers have and do not say where: a leader that is asked again for what the one
        before it had taken answers that it is there already, without an offset."""
        self.failures: list[str] = []
        self.totals: Counter[str] = Counter()
        """What each account was paid, acknowledged or not."""
        self._topic = topic
        self._draw = random.Random(seed)
        self._number = 0
        self._per_second = per_second
        self._stop = threading.Event()
        self._producer = Producer(
            {
                **settings,
                "acks": "all",
                "enable.idempotence": True,
                "linger.ms": 5,
                # None is given up: that would leave open whether it is in the topic.
                "message.timeout.ms": 900_000,
                # Partitions are added.
                "topic.metadata.refresh.interval.ms": 2_000,
            }
        )
        self._thread = threading.Thread(target=self._run, name="payments", daemon=True)

    def __enter__(self) -> "PaymentProducer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def produced(self) -> int:
        """How many payments were made so far, acknowledged or not."""
        return self._number

    def stop(self) -> None:
        """Produce no more, and wait until everything is acknowledged."""
        self._stop.set()
        self._thread.join()
        waiting = self._producer.flush(FLUSH_SECONDS)
        if waiting:
            self.failures.append(f"{waiting} payments are not acknowledged within {FLUSH_SECONDS} s")

    def _run(self) -> None:
        started = time.monotonic()
        while not self._stop.is_set():
            due = int((time.monotonic() - started) * self._per_second)
            while self._number < due:
                self._send()
            self._producer.poll(0)
            self._stop.wait(0.005)

    def _send(self) -> None:
        account = f"account-{self._draw.randrange(ACCOUNTS)}"
        payment = Payment(self._number, account, self._draw.randrange(1, MOST_CENTS))
        self._number += 1
        self.totals[account] += payment.amount

        def delivered(error: KafkaError | None, message: ProducedMessage) -> None:
            partition, offset = message.partition(), message.offset()
            if error is not None:
                self.failures.append(f"payment {payment.number}: {error}")
            elif partition is None or offset is None or offset < 0:
                self.unplaced[payment.number] = payment
            else:
                self.acknowledged[Coordinate(partition, offset)] = Acknowledged(payment, time.monotonic_ns())

        self._producer.produce(self._topic, msgspec.json.encode(payment), account.encode(), on_delivery=delivered)
