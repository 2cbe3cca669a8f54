"""Commit by hand, after each batch that is done. Ctrl-C ends it."""

import os
from dataclasses import dataclass

from kafkasrcd import CommitStrategy, KafkaSource, KafkaSourceConfig


@dataclass
class Order:
    order_id: str
    amount: float


config = KafkaSourceConfig(
    brokers=os.environ.get("BROKERS", "localhost:9092"),
    group_id="my-group",
    commit_strategy=CommitStrategy.MANUAL,
)
with KafkaSource(config, payload_type=Order) as source:
    source.subscribe(["orders"])
    while True:
        messages = source.poll_batch(max_messages=100, timeout=1)
        for message in messages:
            print(message.partition, message.offset, message.payload.order_id, flush=True)
        if messages:
            source.commit()
