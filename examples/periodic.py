"""Print orders; offsets are committed every five seconds, and at the end. Ctrl-C ends it."""

import os
from dataclasses import dataclass

from kafkasrcd import KafkaSource, KafkaSourceConfig


@dataclass
class Order:
    order_id: str
    amount: float


config = KafkaSourceConfig(
    brokers=os.environ.get("BROKERS", "localhost:9092"),
    group_id="my-group",
    topics=["orders"],
    commit_interval_secs=5,
)
with KafkaSource(config, payload_type=Order) as source:
    for message in source:
        print(message.partition, message.offset, message.payload.order_id, flush=True)
