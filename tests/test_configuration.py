"""Loading the configuration: where values come from, and every way in which it can be wrong."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kafkasrcd.daemon.configuration import Configuration, load
from kafkasrcd.daemon.configuration_options import CONTROL_SETTINGS
from kafkasrcd.daemon.configuration_rules import validate
from kafkasrcd.daemon.configuration_sources import is_list, is_table, variable_of
from kafkasrcd.daemon.configuration_view import as_json, as_toml
from kafkasrcd.daemon.librdkafka_names import CONSUMER_SETTINGS
from kafkasrcd.daemon.setting_fields import FIELDS, TABLES
from kafkasrcd.errors import ConfigurationError
from kafkasrcd.settings import (
    AutoOffsetReset,
    CommitStrategy,
    FormatSettings,
    GroupProtocol,
    HandlerSettings,
    LogLevel,
    Ordering,
    Settings,
    StoreSettings,
    SupervisorSettings,
)
from kafkasrcd.workers.control import Setup
from kafkasrcd.workers.redaction import HIDDEN

LEAST = 'topics = ["orders"]\nhandler.target = "shop:handle"\n'
NO_ENVIRONMENT: dict[str, str] = {}


@pytest.fixture
def write(tmp_path: Path) -> "Write":
    return Write(tmp_path / "kafkasrcd.toml")


class Write:
    """Writes the configuration file of a test and loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(
        self,
        text: str = LEAST,
        overrides: Mapping[str, str] | None = None,
        environ: Mapping[str, str] = NO_ENVIRONMENT,
    ) -> Configuration:
        self.path.write_text(text, encoding="utf-8")
        self.path.chmod(0o600)
        return load(self.path, overrides or {}, environ)

    def problems(
        self,
        text: str,
        overrides: Mapping[str, str] | None = None,
        environ: Mapping[str, str] = NO_ENVIRONMENT,
    ) -> list[str]:
        """The lines that loading answers with, without the file's name in front."""
        with pytest.raises(ConfigurationError) as refusal:
            self(text, overrides, environ)
        return [line.removeprefix(f"{self.path}: ") for line in str(refusal.value).splitlines()]


# ── Where values come from ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_least_configuration_is_the_defaults(write: Write) -> None:
    configuration = write()
    expected = Settings(topics=["orders"], handler=HandlerSettings(target="shop:handle"))
    assert configuration.settings == expected
    assert configuration.origins["topics"] == str(write.path)
    assert configuration.origins["brokers"] == "default"
    assert configuration.path == write.path
    assert configuration.base_directory == write.path.parent
    assert configuration.warnings == ()


def test_every_setting_has_an_origin(write: Write) -> None:
    assert set(write().origins) == set(FIELDS)


def test_command_line_over_environment_over_file_over_default(write: Write) -> None:
    text = LEAST + 'group_id = "file"\n'
    environ = {"KAFKASRCD_GROUP_ID": "environment"}
    overrides = {"group_id": "command"}

    def group(configuration: Configuration) -> tuple[str, str]:
        return configuration.settings.group_id, configuration.origins["group_id"]

    assert group(write()) == ("kafkasrcd", "default")
    assert group(write(text)) == ("file", str(write.path))
    assert group(write(text, environ=environ)) == ("environment", "environment KAFKASRCD_GROUP_ID")
    assert group(write(text, overrides, environ)) == ("command", "command line")


def test_no_file_is_needed() -> None:
    environ = {"KAFKASRCD_TOPICS": "orders, payments,", "KAFKASRCD_HANDLER__TARGET": "shop:handle"}
    configuration = load(None, {}, environ)
    assert configuration.settings.topics == ["orders", "payments"]
    assert configuration.path is None
    assert configuration.base_directory == Path.cwd()


def test_text_becomes_the_type_of_its_setting(write: Write) -> None:
    overrides = {
        "handler.processes": "4",
        "commit_interval_secs": "0.5",
        "supervisor.group_protocol": "consumer",
        "supervisor.session_timeout_ms": "",
        "supervisor.log_level": "debug",
        "auto_offset_reset": "latest",
        "handler.path": 'a, b,"c',
        "topics": '["^a{1,2}$", "orders"]',
    }
    settings = write(LEAST, overrides).settings
    assert settings.handler.processes == 4
    assert settings.commit_interval_secs == 0.5
    assert settings.supervisor.group_protocol is GroupProtocol.CONSUMER
    assert settings.supervisor.session_timeout_ms is None
    assert settings.supervisor.log_level is LogLevel.DEBUG
    assert settings.auto_offset_reset is AutoOffsetReset.LATEST
    assert settings.handler.path == ["a", "b", '"c']
    assert settings.topics == ["^a{1,2}$", "orders"]


def test_tables_are_merged_by_key(write: Write) -> None:
    configuration = write(
        LEAST + '[extra_config]\nfetch.min.bytes = 1\n"client.rack" = "file"\n',
        {"extra_config.fetch.min.bytes": "3", "handler.topics": "orders=a:b"},
        {"KAFKASRCD_EXTRA_CONFIG__FETCH_MIN_BYTES": "2", "KAFKASRCD_EXTRA_CONFIG__FETCH_WAIT_MAX_MS": "9"},
    )
    assert configuration.settings.extra_config == {
        "fetch.min.bytes": "3",
        "client.rack": "file",
        "fetch.wait.max.ms": "9",
    }
    assert configuration.origins["extra_config.fetch.min.bytes"] == "command line"
    assert (
        configuration.origins["extra_config.fetch.wait.max.ms"]
        == "environment KAFKASRCD_EXTRA_CONFIG__FETCH_WAIT_MAX_MS"
    )
    assert configuration.settings.handler.topics == {"orders": "a:b"}
    assert "extra_config" not in configuration.origins


def test_extra_config_needs_no_quotes(write: Write) -> None:
    text = LEAST + "[extra_config]\nsocket.keepalive.enable = true\nfetch.min.bytes = 5\n'client.rack' = 'a'\n"
    assert write(text).settings.extra_config == {
        "socket.keepalive.enable": "true",
        "fetch.min.bytes": "5",
        "client.rack": "a",
    }


def test_topics_with_dots_need_no_quotes(write: Write) -> None:
    text = 'topics = ["shop.orders"]\n[handler.topics]\nshop.orders = "shop:handle"\n'
    assert write(text).settings.handler.topics == {"shop.orders": "shop:handle"}


def test_formats_by_topic_come_from_everywhere(write: Write) -> None:
    configuration = write(
        LEAST
        + 'value_format = "string"\n[formats.orders]\nkey_format = "string"\n[formats."^o.*"]\nkey_format = "json"',
        {"formats.orders.value_format": "bytes"},
        {"KAFKASRCD_FORMATS": "orders.key_format=msgpack"},
    )
    assert configuration.settings.formats == {
        "orders": FormatSettings(value_format="bytes", key_format="msgpack"),
        "^o.*": FormatSettings(key_format="json"),
    }
    assert configuration.origins["formats.orders.key_format"] == "environment KAFKASRCD_FORMATS"
    assert configuration.origins["formats.orders.value_format"] == "command line"
    dotted = write(LEAST.replace("orders", "a.b") + "[formats.a.b]\nkey_format = 'json'")
    assert dotted.settings.formats == {"a.b": FormatSettings(key_format="json")}


@pytest.mark.parametrize(
    "name", [*(n for n in FIELDS if n not in TABLES), "extra_config.sasl.password", "extra_config.log_level"]
)
def test_every_setting_has_a_variable_that_is_read_back(name: str, write: Write) -> None:
    values = {
        "brokers": "b:1",
        "topics": "orders",
        "handler.target": "shop:other",
        "store.url": "memory://",
        "extra_config.log_level": "3",
        "supervisor.group_instance_id": "a",
    }
    default: Any = FIELDS[name].default if name in FIELDS else "6"
    if is_list(default):
        default = ",".join(default)
    text = values.get(name) or str("" if default is None else msgspec.to_builtins(default))
    configuration = write(environ={variable_of(name): text})
    assert configuration.origins[name] == f"environment {variable_of(name)}"


def test_foreign_variables_are_left_alone(write: Write) -> None:
    kubernetes = {
        "KAFKASRCD_SERVICE_HOST": "10.0.0.1",
        "KAFKASRCD_SERVICE_PORT": "80",
        "KAFKASRCD_SERVICE_PORT_METRICS": "80",
        "KAFKASRCD_PORT": "tcp://10.0.0.1:80",
        "KAFKASRCD_PORT_80_TCP": "tcp://10.0.0.1:80",
        "KAFKASRCD_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    ours = {"KAFKASRCD_CONFIG": "/x", "KAFKASRCD_TEST_MARK": "x"}
    assert write(environ={**kubernetes, **ours, "KAFKA_BROKERS": "x", "kafkasrcd_brokers": "x"}).warnings == ()
    assert write(environ={"KAFKASRCD_VERSION": "1.2", "KAFKASRCD_": ""}).warnings == (
        "environment KAFKASRCD_: there is no such setting; ignored",
        "environment KAFKASRCD_VERSION: there is no such setting; ignored",
    )


def test_only_the_wanted_settings_are_read(write: Write) -> None:
    write.path.write_text(
        'group_id = "billing"\nnonsense = 1\nextra_config.sasl.password = "${credential:gone}"\n'
        '[supervisor]\ncontrol_socket = "/run/x.sock"\nlease_seconds = "no"\n'
    )
    configuration = load(write.path, {}, {"KAFKASRCD_NONSENSE": "1"}, only=CONTROL_SETTINGS)
    expected = Settings(group_id="billing", supervisor=SupervisorSettings(control_socket="/run/x.sock"))
    assert configuration.settings == expected


# ── References ───────────────────────────────────────────────────────────────────────────────────────────────────────

SASL = """
[extra_config]
security.protocol = "SASL_PLAINTEXT"
sasl.mechanism = "PLAIN"
sasl.username = "app"
sasl.password = "%s"
"""


def password(configuration: Configuration) -> str:
    return configuration.settings.extra_config["sasl.password"]


def test_references_to_environment_files_and_credentials(write: Write, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"from file \r\n")
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "kafka").write_text("from credential\n")
    environ = {"PW": "from ${env:PW}", "CREDENTIALS_DIRECTORY": str(credentials)}

    assert password(write(LEAST + SASL % "${env:PW}", environ=environ)) == "from ${env:PW}"
    assert password(write(LEAST + SASL % "${file:secret}")) == "from file "
    assert password(write(LEAST + SASL % f"<${{file:{tmp_path}/secret}}>")) == "<from file >"
    assert password(write(LEAST + SASL % "${credential:kafka}", environ=environ)) == "from credential"
    assert password(write(LEAST + SASL % "$${env:PW} $$ $x", environ=environ)) == "${env:PW} $$ $x"
    assert password(write(LEAST, {"extra_config.sasl.password": "${env:PW}"}, environ)) == "from ${env:PW}"


def test_the_environment_is_taken_literally(write: Write) -> None:
    """A password may have any characters, and no one escapes what a secret store puts into a variable."""
    environ = {"KAFKASRCD_EXTRA_CONFIG__SASL_PASSWORD": "a${env:b"}
    assert password(write(environ=environ)) == "a${env:b"


def test_references_stand_in_lists_and_for_numbers_too(write: Write) -> None:
    environ = {"TOPIC": "orders", "N": "4", "TARGET": "shop:handle"}
    text = 'topics = ["${env:TOPIC}", "${env:TOPIC}-eu"]\nhandler = {target = "${env:TARGET}", processes = "${env:N}"}'
    settings = write(text, environ=environ).settings
    assert settings.topics == ["orders", "orders-eu"]
    assert settings.handler.processes == 4


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("${env:GONE}", "'${env:GONE}': the environment has no variable GONE"),
        ("${file:gone}", "'${file:gone}' cannot be read: No such file or directory"),
        ("${file:.}", "'${file:.}' cannot be read: Is a directory"),
        ("${file:/dev/zero}", "'${file:/dev/zero}' is larger than 1048576 bytes"),
        ("${file:latin}", "'${file:latin}' is not UTF-8 text"),
        ("${file:a\\u0000b}", "'${file:a\\x00b}' cannot be read: embedded null byte"),
        ("${credential:x}", "'${credential:x}': $CREDENTIALS_DIRECTORY is not set"),
        (
            "${HOME}",
            "'${HOME}' is no reference: the forms are ${env:NAME}, ${file:/path} and ${credential:NAME}; "
            "for the variable write '${env:HOME}'",
        ),
        ("${vault:x}", "'${vault:x}' is no reference"),
        ("${env:}", "'${env:}' is no reference"),
        ("a${env:X", "'${' without its '}'"),
    ],
)
def test_a_reference_that_leads_nowhere(value: str, problem: str, write: Write, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (line,) = write.problems(LEAST + SASL % value)
    assert line.startswith(f"extra_config.sasl.password: {problem}")


def test_a_credential_cannot_leave_its_folder(write: Write, tmp_path: Path) -> None:
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    (line,) = write.problems(LEAST + SASL % "${credential:../etc/passwd}", environ=environ)
    assert "a credential's name has no '/'" in line


# ── Secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_shown_hides_secrets(write: Write, tmp_path: Path) -> None:
    (tmp_path / "rack").write_text("hunter-file")
    configuration = write(LEAST + SASL % "hunter2" + 'client.rack = "${file:rack}"\nssl.key.location = "/k"\n')
    shown = configuration.shown_values()
    assert shown["extra_config.sasl.password"] == HIDDEN
    assert shown["extra_config.client.rack"] == HIDDEN  # a file is what one hides things in
    assert shown["extra_config.ssl.key.location"] == "/k"
    assert shown["extra_config.sasl.username"] == "app"
    for text in (as_toml(configuration), as_json(configuration)):
        assert "hunter" not in text


@pytest.mark.parametrize(
    "url", ["postgresql://app:hunter2@db/x", "postgresql+psycopg://:hunter2@db/x", "postgresql://app:a@hunter2:/@db/x"]
)
def test_a_password_in_the_store_s_address_is_hidden(url: str, write: Write) -> None:
    configuration = write(LEAST, {"store.url": url})
    assert configuration.settings.store.url == url
    for text in (str(configuration.shown_values()["store.url"]), as_toml(configuration), as_json(configuration)):
        assert HIDDEN in text
        assert "@db/x" in text
        assert "hunter2" not in text


@pytest.mark.parametrize(
    "text",
    [
        LEAST + SASL % "hunter2" + "ssl.key.password = [1]\n",
        LEAST + SASL % "hunter2" + 'security.protocols = "hunter2"',
        LEAST + SASL % "hunter2" + 'linger.ms = "5"\n',
        LEAST + '[extra_config]\nsasl.password = ["hunter2"]\n',
        LEAST + "[extra_config]\nssl.key.password = 2020-01-01\nfetch.max.bytes = \"hunter\"\nsasl.pasword = 'hunter2'",
        LEAST + 'sasl_password = "hunter2"\n',
        LEAST + 'store = {url = "postgresql://app:hunter2@db/x"}\n',
        LEAST + 'store = {url = "postgres://app:hunter2@db/x"}\n',
        LEAST + 'store = {url = "postgres://app:a hunter2@db/x"}\n',
        LEAST + 'store = {url = "postgresql://app:hunter2@db"}\n',
        LEAST + 'store = {url = "postgresql://app:a/hunter2@db/x"}\n',
        LEAST + 'store = {url = "postgresql://app:a hunter2@db/x"}\n',
        LEAST + 'store = {url = "postgresql:///x?password=hunter2"}\n',
        LEAST + 'store = {url = "mysql:///x?password=hunter2"}\n',
        'topics = ["orders"]\nbrokers = "kafka://app:hunter2@b:1"\nhandler = {target = "a:b"}',
        LEAST + SASL % "hunter2" + 'ssl.key.pem = "hunter2"\nsecurity = "hunter2"',
        LEAST + (SASL % "hunter2").replace("SASL_PLAINTEXT", "SSL") + 'ssl.key.pem = "hunter2"',
    ],
)
def test_no_message_has_a_secret_in_it(text: str, write: Write) -> None:
    try:
        warnings: list[str] = list(write(text).warnings)
    except ConfigurationError as error:
        warnings = [str(error)]
    assert "hunter2" not in "\n".join(warnings)


def test_exposed_secrets_are_warned_about(write: Write) -> None:
    write(LEAST + SASL % "hunter2")
    write.path.chmod(0o644)
    (warning,) = load(write.path, {}, {}).warnings
    assert "everyone on this host can read it, and it holds extra_config.sasl.password" in warning

    (warning,) = write(LEAST + SASL % "x", {"extra_config.sasl.password": "hunter2"}).warnings
    assert warning.startswith("extra_config.sasl.password: everyone on this host can read a command line")

    assert write(LEAST + SASL % "x", {"extra_config.sasl.password": "${env:PW}"}, {"PW": "y"}).warnings == ()


# ── What is wrong ────────────────────────────────────────────────────────────────────────────────────────────────────


def wrong_configurations() -> Iterator[tuple[str, str]]:
    """The cases in wrong_configurations.txt, as (TOML, expected line)."""
    text = Path(__file__).with_name("wrong_configurations.txt").read_text(encoding="utf-8")
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        if lines:
            *document, problem = lines
            least = LEAST if document[0] == "+" else ""
            yield least + "\n".join(document[bool(least) :]), problem.removeprefix("=> ")


@pytest.mark.parametrize(("text", "problem"), list(wrong_configurations()), ids=lambda value: value[:50])
def test_a_wrong_configuration_is_one_line_that_says_what_is_allowed(text: str, problem: str, write: Write) -> None:
    (line,) = write.problems(text)
    if problem.endswith("dlopen() failed"):  # what follows is the system's
        line = line[: len(problem)]
    assert line == problem


@pytest.mark.parametrize(
    "brokers",
    ["b", "b:9092", "a.b-c.d:1,[::1]:9092", "10.0.0.1:65535", "SASL_SSL://b:9093", "my_broker:9092", " a , b:1 "],
)
def test_brokers_that_are_fine(brokers: str, write: Write) -> None:
    assert write(LEAST, {"brokers": brokers}).settings.brokers == brokers


@pytest.mark.parametrize(
    "url",
    [
        "",
        "memory://",
        "sqlite:///o.db",
        "sqlite:////var/lib/o.db?timeout=3",
        "postgresql://db/offsets",
        "postgresql://app:p%40ss@[::1]:5432/offsets?sslmode=require",
        "postgresql+psycopg:///offsets?host=/run/postgresql",
    ],
)
def test_stores_that_are_fine(url: str, write: Write) -> None:
    assert write(LEAST, {"store.url": url}).settings.store.url == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "earliest",
        "latest",
        "offset:0",
        "offset:999999999999999999",
        "timestamp:2026-01-31T12:00:00Z",
        "timestamp:2026-01-31T12:00:00.123+01:00",
        "timestamp:1970-01-01T01:00+01:00",
        "timestamp:20260131T120000Z",
    ],
)
def test_starts_that_are_fine(text: str, write: Write) -> None:
    assert write(LEAST, {"start_from": text}).settings.start_from == text


@pytest.mark.parametrize("strategy", list(CommitStrategy))
@pytest.mark.parametrize("ordering", list(Ordering))
def test_strategies_and_orderings_that_are_fine(strategy: CommitStrategy, ordering: Ordering, write: Write) -> None:
    overrides = {
        "commit_strategy": strategy.value,
        "handler.ordering": ordering.value,
        "handler.processes": "1024" if ordering is Ordering.PARTITION else "240",
        "handler.threads": "1" if strategy is CommitStrategy.ON_CHECKPOINT else "8",
        "store.url": "" if strategy is CommitStrategy.ON_CHECKPOINT else "memory://",
    }
    settings = write(LEAST, overrides).settings
    assert (settings.commit_strategy, settings.handler.ordering) == (strategy, ordering)


def test_one_process_for_each_of_too_many_cores(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def cores(_: int) -> set[int]:
        return set(range(256))

    monkeypatch.setattr(os, "sched_getaffinity", cores)
    assert write.problems(LEAST + "handler.ordering = 'key'") == [
        "handler.processes: unset, and 256, one for each core, is above 240, the most with ordering 'key'"
    ]
    write(LEAST)
    write(LEAST + "handler.ordering = 'key'\nhandler.processes = 240")


@pytest.mark.parametrize(
    "text",
    [
        'topics = ["orders", "x.y"]\nhandler.topics = {orders = "a:b", "^x" = "a.b.c:D.e"}',
        'topics = ["^orders-[0-9]+$"]\nhandler.topics = {"^orders-[0-9]+$" = "a:b", orders-1 = "a:c"}',
        "topics = ['^a\\\\d']\nhandler.target = 'a:b'",
        "topics = ['^a\\d']\nhandler.target = 'a:b'\nsupervisor.group_protocol = 'consumer'",
    ],
)
def test_topics_and_handlers_that_are_fine(text: str, write: Write) -> None:
    write(text)


def test_every_problem_is_reported_at_once(write: Write) -> None:
    text = """
        brokers = "a:b"
        topcis = ["orders"]
        commit_interval_secs = 0
        retry_backoff_ms = 99999
        [extra_config]
        group.id = "x"
        fetch.min.bytes = -1
        [supervisor]
        lease_seconds = 100
    """
    lines = write.problems(text, {"handler.target": "x"}, {"KAFKASRCD_GROUPID": "x"})
    assert [line.split(": ")[0] for line in lines] == [
        "topcis",
        "environment KAFKASRCD_GROUPID",
        "commit_interval_secs",
        "brokers",
        "command line",
        "supervisor.lease_seconds",
        "retry_backoff_ms",
        "extra_config.group.id",
        "extra_config.fetch.min.bytes",
    ]


def test_what_only_follows_from_another_problem_is_not_reported(write: Write) -> None:
    # The misspelt name is the problem, not that topics are then missing; the bad timeout, not what depends on it.
    text = 'topcs = ["orders"]\nhandler.target = "a:b"\nsupervisor = {session_timeout_ms = 5, lease_seconds = 100}'
    assert [line.split(":")[0] for line in write.problems(text)] == ["topcs", "supervisor.session_timeout_ms"]


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("KAFKASRCD_BROKRES", "x", "there is no such setting; did you mean 'KAFKASRCD_BROKERS'?"),
        ("KAFKASRCD_HANDLER_TARGET", "x", "there is no such setting; did you mean 'KAFKASRCD_HANDLER__TARGET'?"),
        ("KAFKASRCD_LOGGING__COLORS", "x", "there is no such setting"),
        ("KAFKASRCD_EXTRA_CONFIG__", "x", "there is no such setting; did you mean 'KAFKASRCD_EXTRA_CONFIG'?"),
        ("KAFKASRCD_MAX_RETRIES", "many", "max_retries: expected a whole number from 0 to 1000000, got 'many'"),
        ("KAFKASRCD_MAX_RETRIES", "", "max_retries: expected a whole number from 0 to 1000000, got ''"),
        (
            "KAFKASRCD_FORMATS__ORDERS__VALUE_FORMAT",
            "x",
            "a topic's name has no place in a variable's; use KAFKASRCD_FORMATS='topic.value_format=avro,…'",
        ),
        ("KAFKASRCD_EXTRA_CONFIG", "x", "extra_config: expected name=value, or several separated by commas"),
        (
            "KAFKASRCD_HANDLER__TOPICS__ORDERS",
            "x",
            "a topic's name has no place in a variable's; use KAFKASRCD_HANDLER__TOPICS='topic=module:function,…'",
        ),
        (
            "KAFKASRCD_HANDLER__PATH",
            "[1, ",
            "handler.path: expected texts separated by commas, or a TOML array, got '[1, '",
        ),
        ("KAFKASRCD_HANDLER__PATH", "[1]", "handler.path: expected a list of texts, got a whole number in it"),
        (
            "KAFKASRCD_HANDLER__PATH",
            "[]\nx=1",
            "handler.path: expected texts separated by commas, or a TOML array, got '[]\\nx=1'",
        ),
        ("KAFKASRCD_GROUP_ID", "caf\udce9", "group_id: a text must be Unicode without NUL characters"),
        (
            "KAFKASRCD_EXTRA_CONFIG__SASL_PASSWRD",
            "hunter2",
            "extra_config.sasl.passwrd: librdkafka has no such setting; did you mean 'sasl.password'?",
        ),
    ],
)
def test_wrong_variables(variable: str, value: str, problem: str, write: Write) -> None:
    assert write.problems(LEAST, environ={variable: value}) == [f"environment {variable}: {problem}"]


def test_wrong_on_the_command_line(write: Write) -> None:
    overrides = {"handler.proceses": "1", "max_retries": "x", "handler": "x", "extra_config.": "x"}
    assert write.problems(LEAST, overrides) == [
        "command line: handler.proceses: there is no such setting; did you mean 'handler.processes'?",
        "command line: handler: is a section; set one of its settings, such as handler.target",
        "command line: extra_config.: there is no such setting; did you mean 'extra_config'?",
        "command line: max_retries: expected a whole number from 0 to 1000000, got 'x'",
    ]


# ── The file itself ──────────────────────────────────────────────────────────────────────────────────────────────────


def refusal(path: Path) -> str:
    with pytest.raises(ConfigurationError) as error:
        load(path, {}, {})
    return str(error.value).removeprefix(f"{path}: ")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "kafkasrcd.toml"
    assert refusal(path) == "there is no such file; `kafkasrcd init` writes one to start from"
    assert refusal(tmp_path) == "cannot be read: Is a directory"
    assert refusal(path / "x") == "there is no such file; `kafkasrcd init` writes one to start from"
    assert refusal(Path("a\0b")) == "cannot be read: embedded null byte"
    path.symlink_to(path)
    assert refusal(path) == "cannot be read: Too many levels of symbolic links"
    path.unlink()
    path.write_bytes(b"brokers = 'a'\ngroup_id = 'caf\xe9'\n")
    assert refusal(path) == "not UTF-8 text (at line 2); save the file as UTF-8"
    path.write_bytes("brokers = 'a'".encode("utf-16"))
    assert refusal(path) == "not UTF-8 text (at line 1); save the file as UTF-8"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("brokers", "not valid TOML: Expected '=' after a key in a key/value pair (at end of document)"),
        ("a = 1\nb = \n", "not valid TOML: Invalid value (at line 2, column 5)"),
        ("a = 1\na = 2\n", "not valid TOML: Cannot overwrite a value (at line 2, column 6)"),
        ("a = " + "[" * 100_000, "not valid TOML: nested too deeply"),
        ("a = 1" + "0" * 5_000, "not valid TOML: Exceeds the limit (4300 digits) for integer string conversion"),
        ("a = 2020-02-31", "not valid TOML: Invalid date or datetime (at line 1, column 5)"),
    ],
)
def test_a_file_that_is_not_toml(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "kafkasrcd.toml"
    path.write_text(text)
    assert refusal(path).startswith(problem)


def test_without_any_file_the_problem_says_where_one_was_looked_for() -> None:
    with pytest.raises(ConfigurationError, match="no configuration file was used: name one with --config, or have"):
        load(None, {}, {})


tables = ["extra_config.debug", "handler.topics.x", "formats.x.value_format", "formats.^(.key_schema", "formats.x"]
keys = st.sampled_from([*FIELDS, *tables, "handler", "store", "supervisor", "schema_registry", "", "x.y"])
scalars = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "avro",
            "custom:a:b",
            "${env:HOME}",
            "${",
            "$${",
            "^(",
            "sqlite:///x",
            "postgresql://",
            "a:b",
            "a.b:c",
            "[::1]:1",
        ]
    ),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.dates(),
    st.none(),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


def toml(value: Any) -> str:
    if is_list(value):
        return f"[{', '.join(map(toml, value))}]"
    if is_table(value):
        return "{" + ", ".join(f"{toml(key)} = {toml(item)}" for key, item in value.items()) + "}"
    match value:
        case bool():
            return str(value).lower()
        case str():
            # TOML has no surrogates, and wants DEL escaped.
            text = value.encode("utf-8", "ignore").decode()
            return "".join(f"\\U{ord(c):08x}" if c in '"\\\x7f' or ord(c) < 32 else c for c in text).join('""')
        case None:
            return '""'
        case _:
            return str(value)


def loads_or_refuses(path: Path, overrides: Mapping[str, str], environ: Mapping[str, str]) -> None:
    try:
        load(path, overrides, environ)
    except ConfigurationError as error:
        lines = str(error).splitlines()
        assert lines
        assert all(line.strip() and line.isprintable() for line in lines)


@hypothesis_settings(deadline=None, max_examples=200)
@given(content=st.binary() | st.text().map(str.encode))
def test_no_bytes_give_anything_but_a_refusal(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.toml"
    path.write_bytes(content)
    loads_or_refuses(path, {}, {})


@hypothesis_settings(deadline=None, max_examples=300)
@given(document=st.dictionaries(keys, values, max_size=8))
def test_no_values_give_anything_but_a_refusal(
    document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "values.toml"
    lines = [f"{'.'.join(toml(part) for part in key.split('.'))} = {toml(value)}" for key, value in document.items()]
    path.write_text("\n".join(lines), encoding="utf-8")
    loads_or_refuses(path, {}, {})


@hypothesis_settings(deadline=None, max_examples=200)
@given(texts=st.dictionaries(keys, st.text() | scalars.map(str), max_size=8))
def test_no_text_gives_anything_but_a_refusal(texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "least.toml"
    path.write_text(LEAST)
    loads_or_refuses(path, texts, {})
    loads_or_refuses(path, {}, {variable_of(name): text for name, text in texts.items()})


# ── librdkafka's part ────────────────────────────────────────────────────────────────────────────────────────────────


def test_librdkafka_s_warnings_are_passed_on(write: Write) -> None:
    (warning,) = write(LEAST + 'extra_config.sasl.mechanism = "PLAIN"').warnings
    assert warning.startswith("extra_config: Configuration property `sasl.mechanism` set to `PLAIN` but")


def test_a_missing_certificate_is_found(write: Write) -> None:
    (line,) = write.problems(LEAST + 'extra_config = {security.protocol = "ssl", ssl.ca.location = "/nowhere"}')
    assert line.startswith("extra_config.ssl.ca.location: librdkafka refuses the settings together: ")


def test_what_does_not_go_together_is_found(write: Write) -> None:
    text = 'extra_config = {security.protocol = "SASL_SSL", sasl.mechanism = "PLAIN"}'
    (line,) = write.problems(LEAST + text)
    assert line.endswith("sasl.username and sasl.password must be set")


COUNTED = """
import os, sys
from pathlib import Path
from kafkasrcd.daemon.configuration import load

def count():
    return [len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd")]

least, *paths = map(Path, sys.argv[1:])
load(least, {}, {})  # whatever is opened once
before = count()
for path in paths:
    assert load(path, {}, {}).warnings == ()
assert count() == before, (count(), before)
"""


def test_checking_connects_to_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither threads nor descriptors; also where a client would ask for a token at once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        files = {
            "least.toml": LEAST,
            "plain.toml": f"""
                brokers = "127.0.0.1:{port}"
                topics = ["^a", "b"]
                handler.target = "a:b"
                [extra_config]
                client.rack = "r"
                reconnect.backoff.ms = 0""",
            "token.toml": f"""
                brokers = "127.0.0.1:{port}"
                topics = ["b"]
                handler.target = "a:b"
                [extra_config]
                security.protocol = "SASL_SSL"
                sasl.mechanism = "OAUTHBEARER"
                sasl.oauthbearer.method = "OIDC"
                sasl.oauthbearer.client.id = "x"
                sasl.oauthbearer.client.secret = "${{file:least.toml}}"
                sasl.oauthbearer.token.endpoint.url = "http://127.0.0.1:{port}/token" """,
        }
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        command = [sys.executable, "-c", COUNTED, *files]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.stderr == ""
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize("name", sorted(CONSUMER_SETTINGS))
def test_librdkafka_knows_every_name_that_is_suggested(name: str, write: Write) -> None:
    text = LEAST + f'extra_config."{name}" = "?"\n'
    answer = ""
    try:
        write(text)
    except ConfigurationError as error:
        answer = str(error)
    assert "no such setting" not in answer
    assert "setting of producers" not in answer


# ── For programs ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_settings_built_in_a_program_are_checked_as_well() -> None:
    handler = HandlerSettings(target="a:b")
    validate(Settings(topics=["orders"], handler=handler))
    with pytest.raises(ConfigurationError) as error:
        validate(Settings(handler=handler, retry_backoff_ms=20_000))
    assert re.findall(r"^\w+", str(error.value), re.MULTILINE) == ["topics", "retry_backoff_ms"]


def test_no_repr_shows_a_password() -> None:
    settings = Settings(
        store=StoreSettings(url="postgresql://me:hunter2@db/orders"), extra_config={"sasl.password": "hunter3"}
    )
    setup = Setup(settings=b"hunter4", base_directory="", store_url=settings.store.url, slot=1)
    said = f"{settings!r} {settings.store!r} {setup!r}"
    assert "hunter" not in said
    assert "sasl.password" in said
