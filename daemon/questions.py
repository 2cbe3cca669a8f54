"""Questions about the group and its topics, asked beside the membership.

By a consumer that never joins: what the member asks waits behind its own request to join, as long as a rebalance takes,
and it asks on the one thread that answers the group. One thread here too, so that answers come in the order asked.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from confluent_kafka import Consumer

from kafkasrcd.settings import Settings
from kafkasrcd.workers.kafka_settings import QUIET, worker_config

T = TypeVar("T")


class Questions:
    """``call`` may be used from any thread."""

    def __init__(self, settings: Settings) -> None:
        self._consumer = Consumer({**QUIET, **worker_config(settings)})
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="questions")

    def call(self, function: Callable[[Consumer], T]) -> "Future[T]":
        """Run ``function``, which asks and commits nothing, behind those before it."""
        return self._thread.submit(function, self._consumer)

    def close(self) -> None:
        """Behind whatever is still being asked; returns at once."""
        self._thread.submit(self._consumer.close)
        self._thread.shutdown(wait=False)
