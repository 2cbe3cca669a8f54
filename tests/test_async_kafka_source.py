"""AsyncKafkaSource on a real broker: as KafkaSource, with the loop's waiting, and cancellation everywhere."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from kafkasrcd import AsyncKafkaSource, CommitStrategy, ConfigurationError, KafkasrcdError, SqlStateBackend
from tests.kafka_cluster import KafkaCluster
from tests.source_rig import DEADLINE_SECONDS, PARTITIONS, Order, committed, config, produce


@pytest.fixture
def topic(kafka: KafkaCluster, topic_name: str) -> str:
    kafka.create_topic(topic_name, partitions=PARTITIONS)
    return topic_name


def run(work: Coroutine[Any, Any, None]) -> None:
    """Within a deadline."""
    asyncio.run(asyncio.wait_for(work, 2 * DEADLINE_SECONDS))


def test_it_iterates_commits_and_has_no_thread(kafka: KafkaCluster, topic: str) -> None:
    produce(kafka, topic, 300)

    async def work() -> None:
        seen: list[int] = []
        async with AsyncKafkaSource(config(kafka, topic), payload_type=Order) as source:
            async for message in source:
                seen.append(message.payload.n)
                if len(seen) == 300:
                    break
            before = threading.active_count()
            assert await source.poll(0.2) is None
            assert threading.active_count() == before
            await source.commit()
            assert committed(kafka, topic) == dict.fromkeys(range(PARTITIONS), 100)
            metrics = await source.metrics()
            assert metrics.messages_consumed == 300
            assert await source.get_lag() == dict.fromkeys(range(PARTITIONS), 0)
        assert sorted(seen) == list(range(300))

    run(work())


def test_nothing_is_lost_by_cancelling_polls(kafka: KafkaCluster, topic: str) -> None:
    async def work() -> None:
        seen: list[int] = []
        async with AsyncKafkaSource(config(kafka, topic), payload_type=Order) as source:
            await source.poll(0.1)
            for number in range(60):
                if number % 3 == 0:
                    produce(kafka, topic, 5, first=5 * (number // 3))
                poll = asyncio.ensure_future(source.poll(5))
                await asyncio.sleep(0.001 * (number % 7))
                poll.cancel()
                try:
                    message = await poll
                except asyncio.CancelledError:
                    continue
                if message is not None:
                    seen.append(message.payload.n)
            while len(seen) < 100:
                message = await source.poll()
                if message is not None:
                    seen.append(message.payload.n)
            assert await source.poll(0.2) is None
        assert sorted(seen) == list(range(100))

    run(work())


def test_start_pushes_into_a_queue_and_close_ends_it(kafka: KafkaCluster, topic: str) -> None:
    produce(kafka, topic, 100)

    async def work() -> None:
        source = AsyncKafkaSource(config(kafka, topic), payload_type=Order)
        channel: asyncio.Queue[Any] = asyncio.Queue(maxsize=10)
        pushing = asyncio.ensure_future(source.start(channel))
        seen = [(await channel.get()).payload.n for _ in range(100)]
        assert sorted(seen) == list(range(100))
        await source.close()
        await pushing
        assert sum(committed(kafka, topic).values()) == 100

    run(work())


def test_a_poll_that_waits_ends_with_close_and_another_beside_it_is_refused(kafka: KafkaCluster, topic: str) -> None:
    async def work() -> None:
        source = AsyncKafkaSource(config(kafka, topic, commit_strategy=CommitStrategy.MANUAL), payload_type=Order)
        await source.poll(0.1)
        waiting = asyncio.ensure_future(source.poll(60))
        await asyncio.sleep(0.05)
        with pytest.raises(KafkasrcdError, match="another"):
            await source.poll(0.1)
        await source.close()
        assert await waiting is None

    run(work())


def test_it_has_no_checkpoints_and_says_so(kafka: KafkaCluster, topic: str) -> None:
    backend = SqlStateBackend("sqlite:///offsets.db")
    with pytest.raises(ConfigurationError, match="on_checkpoint"):
        AsyncKafkaSource(config(kafka, topic, commit_strategy=CommitStrategy.ON_CHECKPOINT), Order, backend)


def test_batches_seek_and_pause(kafka: KafkaCluster, topic: str) -> None:
    produce(kafka, topic, 90)

    async def work() -> None:
        async with AsyncKafkaSource(config(kafka, topic), payload_type=Order) as source:
            seen: list[int] = []
            while len(seen) < 90:
                seen += [message.payload.n for message in await source.poll_batch(40)]
            await source.pause([(topic, 0), (topic, 1)])
            await source.seek(topic, 2, 10)
            again: list[int] = []
            while len(again) < 20:
                again += [message.offset for message in await source.poll_batch(40)]
            assert again == list(range(10, 30))
            await source.resume([(topic, 0), (topic, 1)])
            assert len(source.assignment()) == PARTITIONS

    run(work())
