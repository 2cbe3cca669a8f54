"""Exactly once into a database: what the block does, and how far it has got, are committed together. Ctrl-C ends it.

DATABASE_URL is postgresql://user@host/database, or sqlite:///path.
"""

import os
from dataclasses import dataclass

from sqlalchemy import text

from kafkasrcd import CommitStrategy, KafkaSource, KafkaSourceConfig, SqlStateBackend


@dataclass
class Order:
    order_id: str
    amount: float


config = KafkaSourceConfig(
    brokers=os.environ.get("BROKERS", "localhost:9092"),
    group_id="my-group",
    topics=["orders"],
    commit_strategy=CommitStrategy.ON_CHECKPOINT,
)
backend = SqlStateBackend(os.environ.get("DATABASE_URL", "sqlite:///orders.db"))
with KafkaSource(config, payload_type=Order, state_backend=backend) as source:
    with source.checkpoint() as tx:
        tx.execute(text("CREATE TABLE IF NOT EXISTS orders (order_id TEXT, amount FLOAT)"))
    while True:
        with source.checkpoint() as tx:
            for message in source.poll_batch(timeout=1):
                row = {"order_id": message.payload.order_id, "amount": message.payload.amount}
                tx.execute(text("INSERT INTO orders VALUES (:order_id, :amount)"), row)
                print(message.partition, message.offset, message.payload.order_id, flush=True)
