"""The demo's producer: orders at a steady rate, some users ordering far more than others.

Run as ``python -m kafkasrcd.daemon.demo_producer BROKERS TOPIC RATE``. Prints a ``ProducerReport`` a line, often, and
after SIGTERM once more when every order is acknowledged or has failed.
"""

import itertools
import random
import signal
import sys
import time
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
import orjson
from confluent_kafka import KafkaError, Message, Producer

_USERS: Final = 1_000
_SKEW: Final = 0.9
"""Zipf's exponent: the first user places a tenth of all orders, half of the users together less than that."""
_TICK_SECONDS: Final = 0.01
_REPORT_SECONDS: Final = 0.05
"""Short, so that what is shown as handled is not ahead of what is shown as produced."""
_MOST_BEHIND_SECONDS: Final = 0.5
"""After a stall, orders of so long are made up for at once; the rest were never placed."""
_FLUSH_SECONDS: Final = 10.0


class ProducerReport(msgspec.Struct, frozen=True):
    """Orders that the broker has acknowledged, and their worth. ``ends``: partition to the offset after its last."""

    produced: int = 0
    cents: int = 0
    failed: int = 0
    problem: str = ""
    ends: dict[int, int] = msgspec.field(default_factory=dict[int, int])


class OrderBook:
    """Makes up orders, reproducibly but for their times and identifiers."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)  # noqa: S311 - nobody is to be surprised
        self._users = [f"user-{number:04d}" for number in range(_USERS)]
        self._weights = list(itertools.accumulate(1 / rank**_SKEW for rank in range(1, _USERS + 1)))
        self._run = f"{int(time.time()):08x}"
        self._number = 0

    def next(self) -> tuple[bytes, bytes, int]:
        """Key, value and amount in cents of the next order."""
        chance = self._random
        (user,) = chance.choices(self._users, cum_weights=self._weights)
        items: list[dict[str, Any]] = [
            {
                "sku": f"SKU-{chance.randrange(100_000):05d}",
                "quantity": chance.randint(1, 3),
                "price_cents": chance.randrange(199, 9_999, 10),
            }
            for _ in range(chance.choice((1, 1, 2, 3)))
        ]
        amount_cents = sum(item["quantity"] * item["price_cents"] for item in items)
        self._number += 1
        order = {
            "order_id": f"{self._run}-{self._number:08d}",
            "user": user,
            "amount_cents": amount_cents,
            "currency": "EUR",
            "channel": chance.choice(("web", "app", "shop")),
            "placed_at": datetime.now(UTC),
            "items": items,
        }
        return user.encode(), orjson.dumps(order), amount_cents


class OrderProducer:
    """Produces until told to stop, and counts what was acknowledged."""

    def __init__(self, brokers: str, topic: str, rate: int) -> None:
        # Idempotent, so that a retry of librdkafka's is not a second order.
        self._client = Producer({"bootstrap.servers": brokers, "enable.idempotence": True, "linger.ms": 5})
        self._topic = topic
        self._rate = rate
        self._stopping = False
        self._produced = self._cents = self._failed = 0
        self._problem = ""
        self._ends: dict[int, int] = {}

    def stop(self, *_: object) -> None:
        """Also a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Blocks until ``stop``, and then until everything is acknowledged or has failed."""
        book = OrderBook()
        sent = 0
        began = reported = time.monotonic()
        while not self._stopping:
            now = time.monotonic()
            missing = int((now - began) * self._rate) - sent
            if missing > self._rate * _MOST_BEHIND_SECONDS:
                sent += missing - int(self._rate * _MOST_BEHIND_SECONDS)
                missing = int(self._rate * _MOST_BEHIND_SECONDS)
            for _ in range(missing):
                self._send(*book.next())
                sent += 1
            self._client.poll(_TICK_SECONDS)
            if now - reported >= _REPORT_SECONDS:
                reported = now
                self._report()
        unsent = self._client.flush(_FLUSH_SECONDS)
        if unsent:
            self._failed += unsent
            self._problem = self._problem or f"not acknowledged within {_FLUSH_SECONDS:g} s"
        self._report()

    def _send(self, key: bytes, value: bytes, amount_cents: int) -> None:
        def delivered(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                self._failed += 1
                self._problem = error.str()
                return
            partition, offset = message.partition(), message.offset()
            assert partition is not None
            assert offset is not None
            self._produced += 1
            self._cents += amount_cents
            self._ends[partition] = max(self._ends.get(partition, 0), offset + 1)

        while not self._stopping:
            try:
                self._client.produce(self._topic, key=key, value=value, on_delivery=delivered)
            except BufferError:  # the broker is slower than this: wait for it
                self._client.poll(0.1)
            else:
                return

    def _report(self) -> None:
        report = ProducerReport(self._produced, self._cents, self._failed, self._problem, self._ends)
        sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
        sys.stdout.buffer.flush()


def main() -> None:
    """Produce until SIGTERM."""
    brokers, topic, rate = sys.argv[1:]
    producer = OrderProducer(brokers, topic, int(rate))
    signal.signal(signal.SIGTERM, producer.stop)
    producer.run()


if __name__ == "__main__":
    main()
