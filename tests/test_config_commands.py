"""The commands `kafkasrcd config` and `kafkasrcd init`, run as people run them."""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec
import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin._acl import AclBinding, AclOperation, AclPermissionType
from confluent_kafka.admin._config import ConfigResource
from confluent_kafka.admin._resource import ResourcePatternType, ResourceType
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kafkasrcd.daemon.broker_check import check_broker
from kafkasrcd.daemon.commands import COMMANDS, main
from kafkasrcd.daemon.configuration import load
from kafkasrcd.daemon.exit_codes import ExitCode, exit_code_for
from kafkasrcd.daemon.finding import Finding, Outcome, exit_code
from kafkasrcd.daemon.setting_fields import FIELDS
from kafkasrcd.daemon.starter import CONFIGURATION
from kafkasrcd.errors import ConfigurationError, GroupError, KafkasrcdError, StoreUnavailable, WorkerBootError
from kafkasrcd.settings import GroupProtocol, HandlerSettings, Settings, SupervisorSettings
from kafkasrcd.workers.deadline import Deadline
from tests.kafka_cluster import KafkaCluster
from tests.waiting import wait_until

KAFKASRCD = Path(sys.executable).with_name("kafkasrcd")
LEAST = 'topics = ["orders"]\nhandler.target = "handlers:handle"\n'


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def run(*arguments: str | Path, cwd: Path, environ: Mapping[str, str] | None = None) -> Ended:
    """The real command. Settings in the environment are only those in ``environ``."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("KAFKASRCD_") or name.startswith("KAFKASRCD_TEST_")
    }
    ended = subprocess.run(
        [KAFKASRCD, *arguments],
        cwd=cwd,
        env={**inherited, **(environ or {})},
        capture_output=True,
        timeout=60,
        check=False,
    )
    encoding = (environ or {}).get("PYTHONIOENCODING", "utf-8")
    return Ended(ended.returncode, ended.stdout.decode(encoding), ended.stderr.decode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a configuration and a handler that fit."""
    (tmp_path / "kafkasrcd.toml").write_text(LEAST)
    (tmp_path / "handlers.py").write_text("def handle(message):\n    pass\n")
    return tmp_path


# ── The command line as a whole ──────────────────────────────────────────────────────────────────────────────────────


def test_help_is_quick_since_it_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys; from kafkasrcd.daemon.commands import main; main(['--help'], standalone_mode=False);"
        "print(*(m for m in ('confluent_kafka', 'sqlalchemy', 'rich', 'asyncio', 'psutil') if m in sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == ""


def test_finding_a_daemon_needs_no_kafka_library(folder: Path) -> None:
    program = (
        "import sys; from kafkasrcd.daemon.configuration import *; "
        "from kafkasrcd.daemon.configuration_options import CONTROL_SETTINGS; "
        "load(find_file(), {}, {}, only=CONTROL_SETTINGS);"
        "sys.exit('confluent_kafka' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)


def test_version(tmp_path: Path) -> None:
    ended = run("--version", cwd=tmp_path)
    assert ended.code == ExitCode.OK
    assert re.fullmatch(r"kafkasrcd \d+\.\d+\.\d+\S*\n", ended.out)


def all_commands() -> list[tuple[str, click.Command]]:
    def below(name: str, command: click.Command) -> list[tuple[str, click.Command]]:
        inner = command.commands.items() if isinstance(command, click.Group) else ()
        return [(name, command), *(pair for key, value in inner for pair in below(f"{name} {key}", value))]

    context = click.Context(main)
    found = [(name, main.get_command(context, name)) for name in main.list_commands(context)]
    return [pair for name, command in found if command is not None for pair in below(name, command)]


@pytest.mark.parametrize(("name", "command"), all_commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_and_option_has_help(name: str, command: click.Command) -> None:
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts}"


def test_every_registered_command_is_listed(tmp_path: Path) -> None:
    ended = run("--help", cwd=tmp_path)
    assert ended.code == ExitCode.OK
    for name in COMMANDS:
        assert f"\n  {name} " in ended.out


def test_every_exit_code_is_in_the_help() -> None:
    assert main.help is not None
    codes = set(map(int, re.findall(r"\b\d+\b", main.help.partition("Exit codes")[2])))
    assert codes == set(ExitCode)


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("config", "nonsense"),
        ("config", "show", "--nonsense"),
        ("config", "show", "-s", "nonsense"),
        ("config", "show", "-s", "=1"),
        ("config", "show", "surplus"),
        ("config", "check", "--timeout", "soon"),
        ("config", "check", "--timeout", "0"),
        ("config", "check", "--timeout", "nan"),
        ("init", "a", "b"),
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments: tuple[str, ...], folder: Path) -> None:
    ended = run(*arguments, cwd=folder)
    assert ended.code == ExitCode.USAGE
    assert "Traceback" not in ended.err
    assert "Error: " in ended.err
    assert ended.out == ""


def test_a_password_in_a_wrong_assignment_is_not_repeated(folder: Path) -> None:
    assert "hunter2" not in run("config", "show", "-s", "hunter2", "-s", "=hunter2", cwd=folder).err


def test_exit_codes_of_errors() -> None:
    assert exit_code_for(ConfigurationError()) == ExitCode.CONFIG
    assert exit_code_for(GroupError()) == ExitCode.UNAVAILABLE
    assert exit_code_for(StoreUnavailable()) == ExitCode.UNAVAILABLE
    assert exit_code_for(WorkerBootError()) == ExitCode.SOFTWARE
    assert exit_code_for(KafkasrcdError()) == ExitCode.FAILURE


def test_a_closed_pipe_ends_quietly(folder: Path) -> None:
    with subprocess.Popen(
        [KAFKASRCD, "config", "show"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


def test_a_full_disk_is_one_line(folder: Path) -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [KAFKASRCD, "config", "show"], cwd=folder, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    assert "No space left on device" in ended.stderr


# ── config show ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_show_says_what_is_in_effect_and_from_where(folder: Path) -> None:
    ended = run("config", "show", "-s", "handler.processes=3", cwd=folder, environ={"KAFKASRCD_GROUP_ID": "billing"})
    assert ended.code == ExitCode.OK
    assert ended.err == ""
    lines = [re.sub(r" +", " ", line) for line in ended.out.splitlines()]
    assert 'brokers = "localhost:9092" # default' in lines
    assert 'group_id = "billing" # environment KAFKASRCD_GROUP_ID' in lines
    assert 'topics = ["orders"] # kafkasrcd.toml' in lines
    assert "processes = 3 # command line" in lines
    assert "# session_timeout_ms is unset # default" in lines


def test_what_show_prints_can_be_loaded_again(folder: Path) -> None:
    extra = '[extra_config]\nclient.rack = "a\\"b\\\\c\\u007f\\n"\nlog_level = 3\n[handler.topics]\n"^o.*" = "a:b"\n'
    extra += '[formats."^o.*"]\nvalue_format = "string"\n[formats.orders]\nkey_format = "json"\n'
    (folder / "kafkasrcd.toml").write_text(LEAST.replace("handler.target", "[handler]\ntarget") + extra)
    shown = run("config", "show", cwd=folder).out
    (folder / "shown.toml").write_text(shown)
    assert load(folder / "shown.toml", {}, {}).settings == load(folder / "kafkasrcd.toml", {}, {}).settings


def test_show_as_json(folder: Path) -> None:
    secret = {"KAFKASRCD_EXTRA_CONFIG__SASL_PASSWORD": "hunter2"}
    ended = run("config", "show", "--json", cwd=folder, environ=secret)
    rows = json.loads(ended.out)
    assert rows["topics"] == {"value": ["orders"], "origin": "kafkasrcd.toml"}
    assert rows["supervisor.session_timeout_ms"] == {"value": None, "origin": "default"}
    assert rows["extra_config.sasl.password"]["value"] == "********"
    assert set(FIELDS) - {"extra_config"} <= rows.keys()


def test_a_password_in_the_store_s_address_is_never_shown(folder: Path) -> None:
    url = "postgresql://app:hunter2@127.0.0.1:1/offsets"
    (folder / "kafkasrcd.toml").write_text(f"{LEAST}store.url = '{url}'\n")
    hidden = url.replace("hunter2", "********")
    assert f'url = "{hidden}"' in run("config", "show", cwd=folder).out
    assert json.loads(run("config", "show", "--json", cwd=folder).out)["store.url"]["value"] == hidden
    ended = run("config", "check", "--offline", cwd=folder)
    assert "hunter2" not in ended.out + ended.err
    # A store that is away is waited for, and said to be.
    arguments = ("start", "-s", "supervisor.log_level=debug", "-s", f"supervisor.control_socket={folder}/s")
    with subprocess.Popen([KAFKASRCD, *arguments], cwd=folder, stderr=subprocess.PIPE) as daemon:
        assert daemon.stderr is not None
        said = ""
        for line in daemon.stderr:
            said += line.decode()
            if "127.0.0.1:1 cannot be reached" in said:
                daemon.terminate()
    assert daemon.returncode == 0
    assert "127.0.0.1:1 cannot be reached" in said
    assert "hunter2" not in said


def test_which_file_is_used(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(LEAST + 'group_id = "other"\n')
    named = tmp_path / "named.toml"
    named.write_text(LEAST + 'group_id = "named"\n')
    environ = {"KAFKASRCD_CONFIG": str(other)}

    def group(*arguments: str | Path, environ: Mapping[str, str] | None = None) -> str:
        shown = json.loads(run("config", "show", "--json", *arguments, cwd=folder, environ=environ).out)
        return str(shown["group_id"]["value"])

    assert group() == "kafkasrcd"
    assert group(environ=environ) == "other"
    assert group("-c", named, environ=environ) == "named"


def test_the_last_assignment_of_a_setting_counts(folder: Path) -> None:
    shown = run("config", "show", "-s", "group_id=a", "--set", "group_id=b=c", cwd=folder).out
    assert 'group_id = "b=c"' in shown


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"brokers", "kafkasrcd: kafkasrcd.toml: not valid TOML: "),
        (b"\xff", "kafkasrcd: kafkasrcd.toml: not UTF-8 text (at line 1)"),
        (b"", "kafkasrcd: kafkasrcd.toml: topics: missing"),
        (b"brkers = 1", "kafkasrcd: kafkasrcd.toml: brkers: there is no such setting; did you mean 'brokers'?"),
        (b"brokers = 1", "kafkasrcd: kafkasrcd.toml: brokers: expected a text, got 1"),
        (b"commit_strategy = 'x'", "kafkasrcd: kafkasrcd.toml: commit_strategy: expected one of auto, manual, "),
        (b"start_from = 'x'", "kafkasrcd: kafkasrcd.toml: start_from: expected earliest, latest, offset:1000 or "),
        (
            b"extra_config.group.id = 'x'",
            "kafkasrcd: kafkasrcd.toml: extra_config.group.id: cannot be set: use group_id",
        ),
        (b"extra_config.a = 'x'", "kafkasrcd: kafkasrcd.toml: extra_config.a: librdkafka has no such setting"),
        (b"brokers = '${env:GONE}'", "kafkasrcd: kafkasrcd.toml: brokers: '${env:GONE}': the environment has no"),
    ],
)
def test_a_wrong_configuration_exits_with_78_and_says_so_on_standard_error(
    content: bytes, line: str, folder: Path
) -> None:
    (folder / "kafkasrcd.toml").write_bytes(content)
    ended = run("config", "show", cwd=folder)
    assert ended.code == ExitCode.CONFIG
    assert ended.out == ""
    assert any(printed.startswith(line) for printed in ended.err.splitlines())
    assert all(printed.startswith("kafkasrcd: ") for printed in ended.err.splitlines())


def test_a_missing_file_exits_with_78(tmp_path: Path) -> None:
    ended = run("config", "show", "-c", "gone.toml", cwd=tmp_path)
    assert ended == (
        ExitCode.CONFIG,
        "",
        "kafkasrcd: gone.toml: there is no such file; `kafkasrcd init` writes one to start from\n",
    )


# What is read is always a terminal's worth of text; the test of every kind of content is in test_configuration.py.
@hypothesis_settings(deadline=None, max_examples=15)
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_content_gives_a_traceback(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "kafkasrcd.toml").write_bytes(content)
    ended = run("config", "check", "--offline", cwd=folder)
    assert ended.code == ExitCode.CONFIG
    assert ended.err == ""
    assert all(line.startswith("✗ ") for line in ended.out.splitlines())


# ── config check, without a broker ───────────────────────────────────────────────────────────────────────────────────


def test_check_offline(folder: Path) -> None:
    ended = run("config", "check", "--offline", cwd=folder)
    assert ended == (
        ExitCode.OK,
        "✓ settings from kafkasrcd.toml fit\n✓ handler handlers:handle can be called\n",
        "",
    )


def test_check_lists_every_problem(folder: Path) -> None:
    ended = run("config", "check", "-s", "retry_backoff_ms=20000", "-s", "max_retries=x", cwd=folder)
    assert ended.code == ExitCode.CONFIG
    assert ended.out.splitlines() == [
        "✗ command line: max_retries: expected a whole number from 0 to 1000000, got 'x'",
        "✗ command line: retry_backoff_ms: 20000 is above retry_backoff_max_ms, 10000",
    ]


@pytest.mark.parametrize(
    "source",
    [
        "def other(message): pass",
        "def handle(): pass",
        "handle = 5",
        "import nowhere_to_be_found",
        "def handle(message:",
        "raise RuntimeError('at import')",
    ],
)
def test_check_finds_a_handler_that_cannot_be_called(source: str, folder: Path) -> None:
    (folder / "handlers.py").write_text(source)
    ended = run("config", "check", "--offline", cwd=folder)
    assert ended.code == ExitCode.CONFIG
    assert ended.err == ""
    assert any(line.startswith("✗ ") and "handlers" in line for line in ended.out.splitlines())


def test_check_of_an_unreachable_broker_exits_with_69_in_time(folder: Path) -> None:
    ended = run("config", "check", "--timeout", "1", "-s", "brokers=127.0.0.1:1", cwd=folder)
    assert ended.code == ExitCode.UNAVAILABLE
    assert ended.err == ""
    last = ended.out.splitlines()[-1]
    assert last.startswith("✗ broker 127.0.0.1:1 cannot be used: ")
    assert "Connection refused -> check that a broker runs there" in last


def test_a_wrong_configuration_counts_before_an_unreachable_broker(folder: Path) -> None:
    (folder / "handlers.py").write_text("")
    assert run("config", "check", "--timeout", "1", "-s", "brokers=127.0.0.1:1", cwd=folder).code == ExitCode.CONFIG


def test_marks_fit_the_terminal_s_encoding(folder: Path) -> None:
    ended = run("config", "check", "--offline", cwd=folder, environ={"PYTHONIOENCODING": "ascii"})
    assert ended.out.startswith("ok   settings from kafkasrcd.toml fit\n")


def test_what_the_terminal_cannot_show_is_escaped(folder: Path) -> None:
    ended = run("config", "show", "-s", "group_id=größe-日", cwd=folder, environ={"PYTHONIOENCODING": "latin-1"})
    assert ended.code == ExitCode.OK
    assert r'group_id = "größe-\u65e5"' in ended.out


def test_exit_code_of_findings() -> None:
    good = Finding(Outcome.GOOD, "x")
    unreachable = Finding(Outcome.BAD, "x", exit_code=ExitCode.UNAVAILABLE)
    wrong = Finding(Outcome.BAD, "x", exit_code=ExitCode.CONFIG)
    assert exit_code([]) == exit_code([good, Finding(Outcome.NOTE, "x")]) == ExitCode.OK
    assert exit_code([unreachable, good]) == ExitCode.UNAVAILABLE
    assert exit_code([unreachable, wrong]) == ExitCode.CONFIG


# ── init ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_init_writes_what_can_be_checked_at_once(tmp_path: Path) -> None:
    ended = run("init", "new/place", cwd=tmp_path)
    assert ended.code == ExitCode.OK
    assert ended.out.startswith("wrote new/place/kafkasrcd.toml\nwrote new/place/handlers.py\nnext: ")
    assert f"`kafkasrcd config check -c {Path('new/place/kafkasrcd.toml')}`" in ended.out
    checked = run("config", "check", "--offline", cwd=tmp_path / "new/place")
    assert checked == (
        ExitCode.OK,
        "✓ settings from kafkasrcd.toml fit\n✓ handler handlers:handle can be called\n",
        "",
    )


def test_init_overwrites_only_when_told_to(tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text("mine")
    ended = run("init", cwd=tmp_path)
    assert ended.code == ExitCode.FAILURE
    assert ended.err == "kafkasrcd: handlers.py exists already; nothing was written; --force overwrites\n"
    assert not (tmp_path / "kafkasrcd.toml").exists()
    assert run("init", "--force", cwd=tmp_path).code == ExitCode.OK
    assert (tmp_path / "handlers.py").read_text() != "mine"


def test_init_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = run("init", "file/below", cwd=tmp_path)
    assert ended.code == ExitCode.FAILURE
    assert ended.err.startswith("kafkasrcd: ")
    assert "Not a directory" in ended.err
    assert len(ended.err.splitlines()) == 1


def test_every_default_in_the_starter_is_the_default() -> None:
    """Each "# name = value" line is true, by section; those under [extra_config] are examples."""
    section = ""
    found = 0
    for line in CONFIGURATION.splitlines():
        if match := re.fullmatch(r"\[(.+)\]", line):
            section = f"{match[1]}."
        elif (match := re.fullmatch(r"# (\w+) = (.+)", line)) and section != "extra_config.":
            name = section + match[1]
            assert tomllib.loads(f"value = {match[2]}")["value"] == FIELDS[name].default, name
            found += 1
    assert found >= 10


def test_everything_in_the_starter_can_be_taken_in(tmp_path: Path) -> None:
    """With each comment taken away it still loads."""
    path = tmp_path / "kafkasrcd.toml"
    text = re.sub(r"(?m)^# ([\w.]+ = )", r"\1", CONFIGURATION)
    assert text.count("\n# ") < CONFIGURATION.count("\n# ")
    path.write_text(text)
    (tmp_path / "kafka-password").write_text("x")
    settings = load(path, {}, {"CREDENTIALS_DIRECTORY": str(tmp_path)}).settings
    assert settings.extra_config["sasl.password"] == "x"
    assert settings.handler == HandlerSettings(target="handlers:handle")
    assert settings.supervisor == SupervisorSettings()


# ── config check, with a broker ──────────────────────────────────────────────────────────────────────────────────────


def settings_for(kafka: KafkaCluster, *topics: str, **supervisor: object) -> Settings:
    return Settings(
        brokers=kafka.bootstrap,
        group_id=topics[0].removeprefix("^"),
        topics=list(topics),
        handler=HandlerSettings(target="a:b"),
        supervisor=msgspec.convert(supervisor, SupervisorSettings),
    )


def lines(settings: Settings, outcome: Outcome | None = None) -> list[str]:
    """What the broker check finds, without marks."""
    findings = check_broker(settings, 10).findings
    marks = dict.fromkeys(Outcome, "")
    return [finding.line(marks).strip() for finding in findings if outcome in {None, finding.outcome}]


def test_check_against_a_broker(kafka: KafkaCluster, topic_name: str, folder: Path) -> None:
    kafka.create_topic(topic_name, 3)
    options = ("-s", f"brokers={kafka.bootstrap}", "-s", f"topics={topic_name}", "-s", f"group_id={topic_name}")
    ended = run("config", "check", *options, cwd=folder)
    assert ended.code == ExitCode.OK
    assert ended.err == ""
    assert ended.out.splitlines() == [
        "✓ settings from kafkasrcd.toml fit",
        "✓ handler handlers:handle can be called",
        f"✓ broker {kafka.bootstrap} answers",
        f"✓ topic '{topic_name}' exists, with 3 partitions",
        f"✓ group '{topic_name}' has committed offsets for 0 of 3 partitions; "
        "the rest start by auto_offset_reset, 'earliest'",
        "✓ messages of up to 1048588 bytes fit the ring, which takes records of 2096896",
        "✓ a session timeout of 45000 ms is allowed",
    ]


def test_check_of_a_missing_topic_names_the_near_one_and_creates_none(
    kafka: KafkaCluster, topic_name: str, folder: Path
) -> None:
    kafka.create_topic(topic_name)
    options = ("-s", f"brokers={kafka.bootstrap}", "-s", f"topics={topic_name}x")
    ended = run("config", "check", *options, cwd=folder)
    assert ended.code == ExitCode.CONFIG
    cure = f"create it, or correct topics; did you mean '{topic_name}'?"
    assert f"✗ topic '{topic_name}x' does not exist -> {cure}" in ended.out.splitlines()
    assert f"{topic_name}x" not in kafka.admin.list_topics(timeout=10).topics


def test_check_of_expressions(kafka: KafkaCluster, topic_name: str) -> None:
    kafka.create_topic(f"{topic_name}-eu")
    assert f"expression '^{topic_name}' matches 1 topic: {topic_name}-eu" in lines(
        settings_for(kafka, f"^{topic_name}")
    )
    assert lines(settings_for(kafka, f"^x{topic_name}"), Outcome.NOTE) == [
        f"expression '^x{topic_name}' matches no topic -> it will be consumed once there is one"
    ]
    # KIP-848: the broker matches whole names.
    assert lines(settings_for(kafka, f"^{topic_name}", group_protocol="consumer"), Outcome.NOTE) == [
        f"expression '^{topic_name}' matches no topic -> "
        f"with group_protocol 'consumer' it must match the whole name, as in '^{topic_name}.*'"
    ]


@pytest.mark.parametrize("protocol", list(GroupProtocol))
def test_what_the_check_says_of_an_expression_is_what_the_group_is_given(
    protocol: GroupProtocol, kafka: KafkaCluster, topic_name: str
) -> None:
    for name in (topic_name, f"{topic_name}-eu", f"{topic_name}x-eu"):
        kafka.create_topic(name)
    for expression in (f"^{topic_name}$", f"^{topic_name}-[a-z]+$", f"^{topic_name}.*", f"^{topic_name}x", "^.*x-eu"):
        expected = set(check_broker(settings_for(kafka, expression, group_protocol=protocol.value), 10).partitions)
        assert subscribed(kafka, expression, protocol, bool(expected)) == expected


def subscribed(kafka: KafkaCluster, expression: str, protocol: GroupProtocol, wait: bool) -> set[str]:
    """The topics that a member of a new group is assigned."""
    assigned: set[str] = set()
    settings = {**kafka.client_settings(), "group.id": uuid.uuid4().hex, "group.protocol": protocol.value}
    consumer = Consumer(settings)
    try:
        consumer.subscribe([expression], on_assign=lambda _, partitions: assigned.update(p.topic for p in partitions))
        deadline = Deadline(20 if wait else 3)
        while not assigned and not deadline.passed:
            consumer.poll(0.1)
    finally:
        consumer.close()
    return assigned


def test_check_of_message_sizes(kafka: KafkaCluster, topic_name: str) -> None:
    kafka.create_topic(topic_name, config={"max.message.bytes": "3000000"})
    assert lines(settings_for(kafka, topic_name), Outcome.BAD) == [
        f"topic '{topic_name}' takes messages of 3000000 bytes, and a ring records of up to 2096896 -> "
        "set supervisor.ring_bytes to 6000640 or more"
    ]
    assert lines(settings_for(kafka, topic_name, ring_bytes=6_000_640), Outcome.BAD) == []


def test_check_of_the_session_timeout(kafka: KafkaCluster, topic_name: str) -> None:
    kafka.create_topic(topic_name)
    assert lines(settings_for(kafka, topic_name, session_timeout_ms=2_000_000), Outcome.BAD) == [
        "a session timeout of 2000000 ms is not allowed -> set supervisor.session_timeout_ms from "
        f"{broker_value(kafka, 'group.min.session.timeout.ms')} to 1800000"
    ]
    session = broker_value(kafka, "group.consumer.session.timeout.ms")
    assert lines(settings_for(kafka, topic_name, group_protocol="consumer", lease_seconds=44), Outcome.BAD) == [
        "a lease of 44 s is not below the broker's session timeout, "
        f"group.consumer.session.timeout.ms = {session} -> lower supervisor.lease_seconds"
    ]
    assert lines(settings_for(kafka, topic_name, group_protocol="consumer", lease_seconds=1), Outcome.BAD) == []


def broker_value(kafka: KafkaCluster, name: str) -> str:
    resource = ConfigResource(ResourceType.BROKER, "0")
    admin: Any = kafka.admin
    return str(admin.describe_configs([resource])[resource].result(timeout=20)[name].value)


def test_check_sees_committed_offsets(kafka: KafkaCluster, topic_name: str) -> None:
    kafka.create_topic(topic_name, 2)
    consumer = Consumer({**kafka.client_settings(), "group.id": topic_name})
    consumer.commit(offsets=[TopicPartition(topic_name, 0, 0)], asynchronous=False)
    consumer.close()
    assert f"group '{topic_name}' has committed offsets for 1 of 2 partitions; " in "\n".join(
        lines(settings_for(kafka, topic_name))
    )


def test_check_says_at_once_that_the_broker_speaks_another_protocol(
    kafka: KafkaCluster, topic_name: str, folder: Path
) -> None:
    sasl = {
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "PLAIN",
        "sasl.username": "app",
        "sasl.password": "hunter2",
    }
    options = [text for name, value in sasl.items() for text in ("-s", f"extra_config.{name}={value}")]
    started = time.monotonic()
    ended = run("config", "check", "--timeout", "30", "-s", f"brokers={kafka.bootstrap}", *options, cwd=folder)
    assert time.monotonic() - started < 10
    assert ended.code == ExitCode.UNAVAILABLE
    assert "-> check sasl.mechanism, sasl.username and sasl.password in extra_config" in ended.out
    assert "hunter2" not in ended.out + ended.err


def test_check_of_an_expression_with_a_handler_of_its_own(kafka: KafkaCluster, topic_name: str, folder: Path) -> None:
    kafka.create_topic(f"{topic_name}-eu")
    text = f'topics = ["^{topic_name}.*"]\nhandler.topics."^{topic_name}.*" = "handlers:handle"\n'
    (folder / "kafkasrcd.toml").write_text(text)
    assert run("config", "check", "-s", f"brokers={kafka.bootstrap}", cwd=folder).code == ExitCode.OK


def test_check_of_a_frozen_broker_ends_in_time(kafka: KafkaCluster, topic_name: str) -> None:
    kafka.create_topic(topic_name)
    kafka.freeze_broker(0)
    try:
        started = time.monotonic()
        answer = check_broker(settings_for(kafka, topic_name), 2)
        assert time.monotonic() - started < 5
    finally:
        kafka.thaw_broker(0)
    (finding,) = answer.findings
    assert finding.exit_code == ExitCode.UNAVAILABLE
    assert finding.text == f"broker {kafka.bootstrap} does not answer within 2 s"


def test_check_names_what_this_user_may_not_do() -> None:
    properties = {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "allow.everyone.if.no.acl.found": "true",
    }
    with KafkaCluster(properties=properties) as kafka:
        kafka.create_topic("open")
        kafka.create_topic("closed")
        deny(kafka, ResourceType.TOPIC, "closed")
        deny(kafka, ResourceType.GROUP, "open")
        wait_until(lambda: "closed" not in kafka.admin.list_topics(timeout=10).topics, 20, "the rules to be in force")
        started = time.monotonic()
        assert lines(settings_for(kafka, "open", "closed"), Outcome.BAD) == [
            "topic 'closed' may not be read by this user -> allow this user to DESCRIBE and READ it",
            "group 'open' may not be used by this user -> allow this user to READ the group, or correct group_id",
        ]
        assert time.monotonic() - started < 5

        deny(kafka, ResourceType.BROKER, "kafka-cluster")  # and with it everything about the cluster
        wait_until(lambda: bool(lines(settings_for(kafka, "open"), Outcome.NOTE)), 20, "the rule to be in force")
        (note,) = lines(settings_for(kafka, "open"), Outcome.NOTE)
        assert note.startswith("the broker's limits cannot be looked at: ")
        assert note.endswith("Cluster authorization failed.")


def deny(kafka: KafkaCluster, kind: ResourceType, name: str) -> None:
    """Forbid everyone everything on it."""
    rule = AclBinding(
        kind, name, ResourcePatternType.LITERAL, "User:ANONYMOUS", "*", AclOperation.ALL, AclPermissionType.DENY
    )
    admin: Any = kafka.admin
    for created in admin.create_acls([rule]).values():
        created.result(timeout=20)
