"""A claim that comes late, from a member that was frozen in it: the store has it as the partition's, the group does
not. The partition's owner claims it anew, and nobody's work stands still or is lost."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from kafkasrcd.settings import Ordering
from kafkasrcd.storage.offset_store import TopicPartition
from kafkasrcd.storage.opening import open_store
from kafkasrcd.workers.spread import layout_of
from tests.daemon_process import QUICK_SESSION, DaemonProcess
from tests.kafka_cluster import KafkaCluster
from tests.ledger import Ledger, SteadyProducer
from tests.test_strategies import Effects

PARTITIONS = 2
STOP_SECONDS = 10
"""Half of ``drain_timeout_seconds``: an end that takes as long waits for something that does not come."""


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
@pytest.mark.parametrize("strategy", ["periodic", "on_checkpoint"])
def test_the_groups_owner_claims_anew(
    kafka: KafkaCluster, topic_name: str, tmp_path: Path, strategy: str, protocol: str
) -> None:
    kafka.create_topic(topic_name, partitions=PARTITIONS)
    found = Effects(f"sqlite:///{tmp_path / 'effects.db'}")
    periodic = strategy == "periodic"
    target = "tests.ledger:append" if periodic else "tests.strategy_handlers:effect"
    url = f"sqlite:///{tmp_path / 'offsets.db'}" if periodic else found.url
    settings = [f"commit_strategy={strategy}", f"store.url={url}", f"supervisor.group_protocol={protocol}"]
    if protocol == "classic":
        settings += QUICK_SESSION
    with ExitStack() as stack:
        stack.callback(found.close)
        producer = stack.enter_context(SteadyProducer(kafka.bootstrap, topic_name, PARTITIONS, rate_per_second=300))
        daemon = stack.enter_context(DaemonProcess(tmp_path, kafka.bootstrap, topic_name, target, settings=settings))
        daemon.wait_running(PARTITIONS)
        daemon.wait_status(lambda status: sum(each.messages for each in status.partitions) > 300, "records")
        store = open_store(url, topic_name, 5_000, shared_with_effects=not periodic)
        stack.callback(store.close)
        late = store.claim([TopicPartition(topic_name, 0)], "frozen:1", layout_of(Ordering.PARTITION, 2))
        epoch = next(iter(late.values())).assignment_epoch
        daemon.wait_status(
            lambda status: any(each.assignment_epoch > epoch and each.state == "running" for each in status.partitions),
            "the partition claimed anew",
        )
        assert daemon.events("claimed_anew")[0]["partition"] == 0
        producer.stop()
        ends = kafka.end_offsets(topic_name)
        daemon.wait_caught_up(ends)
        assert daemon.terminate(STOP_SECONDS) == 0
        assert kafka.committed(topic_name, topic_name) == ends
        if periodic:
            assert Ledger(tmp_path).counts.keys() == producer.acknowledged
        else:
            assert found.counts().keys() == producer.acknowledged
            assert set(found.counts().values()) == {1}
