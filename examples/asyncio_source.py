"""The same in an event loop. Ctrl-C ends it."""

import asyncio
import os
from dataclasses import dataclass

from kafkasrcd import AsyncKafkaSource, KafkaSourceConfig


@dataclass
class Order:
    order_id: str
    amount: float


async def main() -> None:
    config = KafkaSourceConfig(
        brokers=os.environ.get("BROKERS", "localhost:9092"), group_id="my-group", topics=["orders"]
    )
    async with AsyncKafkaSource(config, payload_type=Order) as source:
        async for message in source:
            print(message.partition, message.offset, message.payload.order_id, flush=True)


asyncio.run(main())
