"""Fill a topic with records like those people have: 250 bytes as JSON, a few keys much busier than the rest."""

import random
from bisect import bisect
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import orjson
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from tests.kafka_cluster import KafkaCluster

KEYS = 10_000
FLUSH_DEADLINE_SECONDS = 60
_FIRST_MS = 1_750_000_000_000
_STATUSES = ("created", "paid", "packed", "shipped", "returned")
_COUNTRIES = ("DE", "FR", "US", "JP", "BR")


ZIPF_KEYS = 1_000_000
ZIPF_EXPONENT = 0.5
"""The busiest key has 0.05 % of the records. Where they wait 10 ms each, one after the other, it alone allows 200,000
messages/s, which no row comes near. Of 10,000 keys it would be 20,000, and the rows would measure that."""

DrawUser = Callable[[random.Random], int]
Encode = Callable[[dict[str, Any]], bytes]


def skewed(chance: random.Random) -> int:
    """The busiest of 10,000 users has 4.6 % of the records, the busiest hundred have 21 %."""
    return int(KEYS * chance.random() ** 3)


def zipf() -> DrawUser:
    """The user of rank r has a share in proportion to r ** -ZIPF_EXPONENT."""
    sums = list(accumulate(rank**-ZIPF_EXPONENT for rank in range(1, ZIPF_KEYS + 1)))
    return lambda chance: bisect(sums, chance.random() * sums[-1])


def orders(count: int, seed: int = 1, draw_user: DrawUser = skewed) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """`count` pairs of key and order, the same for the same seed. The key is the user."""
    chance = random.Random(seed)
    for number in range(count):
        user_id = draw_user(chance)
        cents = chance.randrange(100, 1_000_000)
        yield (
            b"user-%d" % user_id,
            {
                "order_id": f"{number:010d}-{chance.getrandbits(32):08x}",
                "user": {"id": user_id, "country": _COUNTRIES[user_id % 5], "vip": user_id % 50 == 0},
                "status": _STATUSES[number % 5],
                "amounts": {"net": cents / 100, "tax": cents // 5 / 100, "currency": "EUR"},
                "items": [chance.randrange(100_000), chance.randrange(100_000)],
                "created_at_ms": _FIRST_MS + number,
                "note": None,
                "trace": f"{chance.getrandbits(64):016x}",
            },
        )


def fill_with_orders(
    cluster: KafkaCluster,
    topic: str,
    *,
    messages: int,
    partitions: int,
    draw_user: DrawUser = skewed,
    encode: Encode = orjson.dumps,
) -> None:
    """Create the topic and produce the orders into it, partitioned by key. Blocks: about 5 s a million.

    Raises KafkaException where a record was refused.
    """
    cluster.create_topic(topic, partitions)
    failures: list[KafkaError] = []

    def on_delivery(error: KafkaError | None, message: Message) -> None:
        if error is not None:
            failures.append(error)

    producer = Producer(
        {
            **cluster.client_settings(),
            "linger.ms": 20,
            "queue.buffering.max.messages": 500_000,
            # A callback for each of a million records would cost more than sending them.
            "delivery.report.only.error": True,
            "on_delivery": on_delivery,
        }
    )
    for number, (key, order) in enumerate(orders(messages, draw_user=draw_user)):
        value = encode(order)
        while True:
            try:
                producer.produce(topic, value, key)
            except BufferError:
                producer.poll(0.1)
            else:
                break
        if number % 1000 == 0:
            producer.poll(0)
    waiting = producer.flush(FLUSH_DEADLINE_SECONDS)
    if failures:
        raise KafkaException(failures[0])
    found = sum(cluster.end_offsets(topic).values())
    assert (waiting, found) == (0, messages), f"{found} of {messages} records are in {topic}, {waiting} still waiting"
