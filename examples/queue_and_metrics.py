"""A thread puts messages into a bounded queue; this one handles them, and says once a second how it goes. Ctrl-C ends
it."""

import os
import queue
import threading
import time
from dataclasses import dataclass

from kafkasrcd import KafkaSource, KafkaSourceConfig, Message


@dataclass
class Order:
    order_id: str
    amount: float


config = KafkaSourceConfig(brokers=os.environ.get("BROKERS", "localhost:9092"), group_id="my-group", topics=["orders"])
source = KafkaSource(config, payload_type=Order)
channel: queue.Queue[Message[Order]] = queue.Queue(maxsize=1000)
thread = threading.Thread(target=source.start, args=(channel,))
thread.start()
due = time.monotonic()
try:
    while True:
        message = channel.get()
        print(message.partition, message.offset, message.payload.order_id, flush=True)
        if time.monotonic() >= due:
            due = time.monotonic() + 1
            metrics = source.metrics()
            print(f"{metrics.messages_consumed} consumed, lag {metrics.lag_per_partition}", flush=True)
finally:
    source.close()
    thread.join()
