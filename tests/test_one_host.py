"""``on_checkpoint`` on SQLite refuses a group that has members elsewhere."""

import pytest

from kafkasrcd.daemon import one_host
from kafkasrcd.daemon.group_members import Group, Member
from kafkasrcd.daemon.one_host import check_one_host, local_addresses, other_hosts
from kafkasrcd.errors import ConfigurationError
from kafkasrcd.settings import CommitStrategy, Settings
from tests.kafka_cluster import KafkaCluster

SQLITE = "sqlite:////tmp/x.db"


def test_what_is_elsewhere() -> None:
    local = {"10.0.0.5", "fe80::1", "worker-1"}
    members = ["/127.0.0.1", "/10.0.0.5", "/10.0.0.6", "worker-2", "worker-1", "/::1", "/10.0.0.6"]
    assert other_hosts(members, local) == ["10.0.0.6", "worker-2"]


def test_this_host_is_local() -> None:
    assert "127.0.0.1" in local_addresses()


@pytest.mark.parametrize(
    ("strategy", "url", "refused"),
    [
        (CommitStrategy.ON_CHECKPOINT, SQLITE, True),
        (CommitStrategy.ON_CHECKPOINT, "postgresql://db/orders", False),
        (CommitStrategy.PERIODIC, SQLITE, False),
    ],
)
def test_only_on_checkpoint_on_sqlite(
    monkeypatch: pytest.MonkeyPatch, strategy: CommitStrategy, url: str, refused: bool
) -> None:
    def elsewhere(_: Settings) -> Group:
        return Group(stable=True, members=(Member("billing-1", "/192.0.2.7", frozenset()),))

    monkeypatch.setattr(one_host, "describe_group", elsewhere)
    settings = Settings(commit_strategy=strategy, group_id="billing")
    if not refused:
        check_one_host(settings, url)
        return
    with pytest.raises(ConfigurationError, match=r"'billing' has members on other hosts \(192\.0\.2\.7\).*PostgreSQL"):
        check_one_host(settings, url)


def test_a_group_that_is_not_there_has_no_members(kafka: KafkaCluster, topic_name: str) -> None:
    settings = Settings(brokers=kafka.bootstrap, group_id=topic_name, commit_strategy=CommitStrategy.ON_CHECKPOINT)
    check_one_host(settings, SQLITE)
