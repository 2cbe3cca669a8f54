"""The librdkafka configuration of the member and of the workers, accepted by librdkafka itself."""

import pytest
from confluent_kafka import Consumer

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.settings import AssignmentStrategy, GroupProtocol, Settings, SupervisorSettings
from kafkasrcd.workers.kafka_settings import (
    PROTECTED,
    KafkaConfig,
    heartbeat_interval_ms,
    max_poll_interval_ms,
    member_config,
    protected_reason,
    redacted,
    session_timeout_ms,
    worker_config,
)
from kafkasrcd.workers.redaction import HIDDEN, hide_url_passwords, is_secret


def settings(supervisor: SupervisorSettings | None = None, **extra_config: str) -> Settings:
    """Settings with ``extra_config``, written with ``_`` for each dot."""
    extra = {name.replace("_", "."): value for name, value in extra_config.items()}
    return Settings(
        brokers="b1:9092,b2:9092",
        group_id="billing",
        topics=["orders"],
        extra_config=extra,
        supervisor=supervisor or SupervisorSettings(),
    )


def accepted(config: KafkaConfig) -> bool:
    """librdkafka takes it; without brokers, so that nothing is connected to."""
    Consumer({name: value for name, value in config.items() if name != "bootstrap.servers"}).close()
    return True


def test_member_is_classic_and_cooperative_by_default() -> None:
    assert member_config(settings()) == {
        "bootstrap.servers": "b1:9092,b2:9092",
        "client.id": "kafkasrcd-billing",
        "group.id": "billing",
        "group.protocol": "classic",
        "partition.assignment.strategy": "cooperative-sticky",
        "session.timeout.ms": 45_000,
        "heartbeat.interval.ms": 3_000,
        "max.poll.interval.ms": 60_000,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "enable.partition.eof": False,
        "auto.offset.reset": "latest",
        "log.connection.close": False,
    }
    assert accepted(member_config(settings()))


def test_member_by_range() -> None:
    config = member_config(settings(SupervisorSettings(partition_assignment_strategy=AssignmentStrategy.RANGE)))
    assert config["partition.assignment.strategy"] == "range"
    assert accepted(config)


def test_member_by_kip_848_has_none_of_the_settings_that_the_broker_decides() -> None:
    config = member_config(settings(SupervisorSettings(group_protocol=GroupProtocol.CONSUMER)))
    assert config["group.protocol"] == "consumer"
    assert not config.keys() & {"session.timeout.ms", "heartbeat.interval.ms", "partition.assignment.strategy"}
    assert accepted(config)


@pytest.mark.parametrize("protocol", list(GroupProtocol))
def test_static_membership_is_the_member_s_alone(protocol: GroupProtocol) -> None:
    static = settings(SupervisorSettings(group_protocol=protocol, group_instance_id="host-1"))
    assert member_config(static)["group.instance.id"] == "host-1"
    assert "group.instance.id" not in worker_config(static)
    assert "group.instance.id" not in member_config(settings())
    assert accepted(member_config(static))


def test_worker_joins_nothing_commits_nothing_and_reads_fast_in_little_memory() -> None:
    expected: KafkaConfig = {
        "bootstrap.servers": "b1:9092,b2:9092",
        "client.id": "kafkasrcd-billing",
        "group.id": "billing",
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "enable.partition.eof": True,
        "auto.offset.reset": "error",
        "queued.max.messages.kbytes": 2_048,
        "fetch.queue.backoff.ms": 10,
        "receive.message.max.bytes": 2_147_483_647,
        "log.connection.close": False,
    }
    for protocol in GroupProtocol:
        config = worker_config(settings(SupervisorSettings(group_protocol=protocol, session_timeout_ms=6_000)))
        assert config == expected
        assert accepted(config)


def test_a_user_s_tuning_wins() -> None:
    tuned = settings(queued_max_messages_kbytes="65536", fetch_queue_backoff_ms="0", client_id="mine")
    for config in (worker_config(tuned), member_config(tuned)):
        assert config["queued.max.messages.kbytes"] == "65536"
        assert config["fetch.queue.backoff.ms"] == "0"
        assert config["client.id"] == "mine"


def test_what_only_a_member_can_use_stays_with_it() -> None:
    tuned = settings(group_remote_assignor="range", max_poll_interval_ms="90000")
    assert member_config(tuned)["group.remote.assignor"] == "range"
    assert member_config(tuned)["max.poll.interval.ms"] == "90000"
    assert not worker_config(tuned).keys() & {"group.remote.assignor", "max.poll.interval.ms"}


@pytest.mark.parametrize("name", [*PROTECTED, "error_cb", "test.mock.num.brokers"])
def test_nothing_the_design_depends_on_can_be_overridden(name: str) -> None:
    risky = Settings(topics=["orders"], extra_config={name: "1"})
    for build in (member_config, worker_config):
        with pytest.raises(ConfigurationError) as refusal:
            build(risky)
        assert str(refusal.value) == f"extra_config.{name}: cannot be set: {protected_reason(name)}"


@pytest.mark.parametrize("name", ["fetch.min.bytes", "security.protocol", "isolation.level", "client.rack", "debug"])
def test_what_is_not_protected(name: str) -> None:
    assert protected_reason(name) is None


def test_everything_that_is_set_here_is_protected_or_tuning() -> None:
    tuning = {
        "client.id",
        "log.connection.close",
        "max.poll.interval.ms",
        "queued.max.messages.kbytes",
        "fetch.queue.backoff.ms",
        "receive.message.max.bytes",
    }
    for config in (member_config(settings(SupervisorSettings(group_instance_id="a"))), worker_config(settings())):
        assert {name for name in config if protected_reason(name) is None} <= tuning


def test_a_short_session_has_a_shorter_heartbeat() -> None:
    assert heartbeat_interval_ms(settings(SupervisorSettings(session_timeout_ms=6_000))) == 2_000
    assert heartbeat_interval_ms(settings(SupervisorSettings(session_timeout_ms=60_000))) == 3_000
    assert heartbeat_interval_ms(settings(SupervisorSettings(heartbeat_interval_ms=500))) == 500


def test_with_kip_848_the_session_timeout_is_taken_to_be_the_broker_s_default() -> None:
    assert session_timeout_ms(settings(SupervisorSettings(group_protocol=GroupProtocol.CONSUMER))) == 45_000


@pytest.mark.parametrize(
    ("drain_seconds", "session_ms", "expected_ms"),
    [(20.0, None, 60_000), (0.5, None, 45_000), (600.0, None, 640_000), (1.0, 400_000, 400_000)],
)
def test_a_revocation_always_fits_the_poll_interval(
    drain_seconds: float, session_ms: int | None, expected_ms: int
) -> None:
    supervisor = SupervisorSettings(drain_timeout_seconds=drain_seconds, session_timeout_ms=session_ms)
    assert max_poll_interval_ms(settings(supervisor)) == expected_ms
    assert accepted(member_config(settings(supervisor)))


def test_redacted_hides_secrets_and_nothing_else() -> None:
    config = settings(
        sasl_username="app", sasl_password="hunter2", ssl_key_location="/etc/key.pem", ssl_key_pem="-----BEGIN"
    )
    shown = redacted(worker_config(config))
    assert shown["sasl.password"] == shown["ssl.key.pem"] == HIDDEN
    assert shown["sasl.username"] == "app"
    assert shown["ssl.key.location"] == "/etc/key.pem"
    assert shown["queued.max.messages.kbytes"] == 2_048


SECRET_NAMES = [
    "sasl.password",
    "ssl.key.password",
    "ssl.keystore.password",
    "ssl.key.pem",
    "sasl.oauthbearer.client.secret",
    "sasl.oauthbearer.client.credentials.client.secret",
    "sasl.oauthbearer.assertion.private.key.passphrase",
    "sasl.oauthbearer.assertion.private.key.pem",
    "sasl.oauthbearer.config",
    "API_TOKEN",
    "KAFKA_PASSWD",
    "api_key",
    "vault_secret_id",
]
OPEN_NAMES = [
    "sasl.username",
    "sasl.mechanism",
    "ssl.key.location",
    "ssl.ca.pem",
    "sasl.oauthbearer.token.endpoint.url",
    "sasl.oauthbearer.client.id",
    "sasl.oauthbearer.client.credentials.client.id",
    "sasl.oauthbearer.assertion.private.key.file",
    "sasl.kerberos.keytab",
    "socket.keepalive.enable",
    "group_id",
    "monkey",
]


@pytest.mark.parametrize(("name", "secret"), [*((n, True) for n in SECRET_NAMES), *((n, False) for n in OPEN_NAMES)])
def test_secrets_are_known_by_name(name: str, secret: bool) -> None:
    assert is_secret(name) is secret


def test_passwords_in_urls_are_hidden() -> None:
    text = "postgresql+psycopg://app:p:w@2@db:5432/x and https://user:geheim@host/"
    assert hide_url_passwords(text) == f"postgresql+psycopg://app:{HIDDEN}@db:5432/x and https://user:{HIDDEN}@host/"
    assert hide_url_passwords("sqlite:////var/lib/a@b:c.db") == "sqlite:////var/lib/a@b:c.db"
