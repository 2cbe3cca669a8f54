"""The producer of a storm: payments at a steady rate through everything, and what the brokers have acknowledged."""

import random
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from confluent_kafka import KafkaError, Producer
from confluent_kafka import Message as ProducedMessage

from tests.chaos.payment import Flaw, Payment
from tests.ledger import Coordinate

ACCOUNTS = 50
MOST_CENTS = 10_000
PER_10_000 = {Flaw.UNREADABLE: 50, Flaw.REFUSED: 50, Flaw.REFUSED_ONCE: 50, Flaw.REJECTED: 10, Flaw.DEADLY: 1}
"""How many of so many payments have each flaw."""
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
        self.made: list[Payment] = []
        """All of them, acknowledged or not."""
        self._topic = topic
        self._draw = random.Random(seed)
        self._per_second = per_second
        self._stop = threading.Event()
        self._producer = Producer(
            {
                **settings,
                "acks": "all",
                "enable.idempotence": True,
                # A leader that does not know this producer takes its second batch before its first, where that was
                # sent too early for a new topic, and then says of the first that it is there already, though it is not.
                "max.in.flight.requests.per.connection": 1,
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

    def stop(self) -> None:
        """Produce no more, and wait until everything is acknowledged."""
        self._stop.set()
        self._thread.join()
        waiting = self._producer.flush(FLUSH_SECONDS)
        if waiting:
            self.failures.append(f"{waiting} payments are not acknowledged within {FLUSH_SECONDS} s")

    def produce_lot(self, each: int) -> dict[int, list[Payment]]:
        """After `stop`: so many payments more with each flaw but the deadly one; by partition, as acknowledged."""
        first = len(self.made)
        for flaw in [flaw for flaw in Flaw if flaw is not Flaw.DEADLY] * each:
            self._send(flaw)
        self.stop()
        lot: dict[int, list[Payment]] = {}
        for where, sent in self.acknowledged.items():
            if sent.payment.number >= first:
                lot.setdefault(where.partition, []).append(sent.payment)
        return lot

    def _run(self) -> None:
        started = time.monotonic()
        while not self._stop.is_set():
            due = int((time.monotonic() - started) * self._per_second)
            while len(self.made) < due:
                self._send(self._flaw())
            self._producer.poll(0)
            self._stop.wait(0.005)

    def _send(self, flaw: Flaw) -> None:
        account = f"account-{self._draw.randrange(ACCOUNTS)}"
        payment = Payment(len(self.made), account, self._draw.randrange(1, MOST_CENTS), flaw)
        self.made.append(payment)

        def delivered(error: KafkaError | None, message: ProducedMessage) -> None:
            partition, offset = message.partition(), message.offset()
            if error is not None:
                self.failures.append(f"payment {payment.number}: {error}")
            elif partition is None or offset is None or offset < 0:
                self.unplaced[payment.number] = payment
            else:
                self.acknowledged[Coordinate(partition, offset)] = Acknowledged(payment, time.monotonic_ns())

        self._producer.produce(self._topic, payment.value, payment.key, on_delivery=delivered)

    def _flaw(self) -> Flaw:
        flaws = {**PER_10_000, Flaw.NONE: 10_000 - sum(PER_10_000.values())}
        return self._draw.choices(list(flaws), list(flaws.values()))[0]
