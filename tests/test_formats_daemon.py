"""Formats in a real daemon, on a real broker and a real registry: what is read, what is waited for, what is refused."""

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

from kafkasrcd.storage.dead_letters import DeadLetter, LetterFilter
from kafkasrcd.storage.opening import open_dead_letters
from tests.daemon_process import COMMAND, ROOT, DaemonProcess
from tests.format_handlers import Kept
from tests.kafka_cluster import KafkaCluster, Record
from tests.registry_proxy import RegistryProxy
from tests.registry_server import RegistryServer
from tests.token_server import TokenServer
from tests.waiting import wait_until

USER = {"type": "record", "name": "User", "fields": [{"name": "name", "type": "string"}]}


@pytest.fixture
def topic(kafka: KafkaCluster, topic_name: str) -> str:
    kafka.create_topic(topic_name, partitions=2)
    return topic_name


def daemon(
    kafka: KafkaCluster, topic: str, folder: Path, *settings: str, target: str = "keep", **environment: str
) -> DaemonProcess:
    return DaemonProcess(
        folder,
        kafka.bootstrap,
        topic,
        f"tests.format_handlers:{target}",
        settings=("handler.on_failure=skip", *settings),
        environment={"XDG_STATE_HOME": str(folder / "state"), **environment},
    )


def kept(folder: Path) -> list[Kept]:
    """What handlers wrote down, by partition and offset."""
    lines = [line for path in folder.glob("kept-*") for line in path.read_text().splitlines()]
    return sorted((Kept(*eval(line)) for line in lines), key=lambda each: each[:3])


def letters(folder: Path, topic: str) -> list[DeadLetter]:
    """The dead letters, by offset."""
    store = open_dead_letters(f"sqlite:///{folder / 'offsets.db'}", topic, 5_000)
    try:
        return sorted((each.letter for each in store.find(LetterFilter())), key=lambda letter: letter.offset)
    finally:
        store.close()


def wait_kept(folder: Path, count: int) -> list[Kept]:
    wait_until(lambda: len(kept(folder)) >= count, 30, f"{count} records", seen=lambda: kept(folder)[-5:])
    return kept(folder)


def avro(registry: RegistryServer, topic: str, value: Any, field: MessageField = MessageField.VALUE) -> bytes:
    serializer: Any = AvroSerializer  # the type checkers disagree on what its constructor takes
    with SchemaRegistryClient({"url": registry.url}) as client:
        raw: bytes | None = serializer(client, json.dumps(USER))(value, SerializationContext(topic, field))
    assert raw is not None
    return raw


def test_avro_values_and_keys_and_bad_ones_among_them(
    kafka: KafkaCluster, schema_registry: RegistryServer, topic: str, tmp_path: Path
) -> None:
    ann, key = (
        avro(schema_registry, topic, {"name": "ann"}),
        avro(schema_registry, topic, {"name": "k"}, MessageField.KEY),
    )
    kafka.produce(
        topic,
        [
            Record(0, key, ann),
            Record(0, b"no key", ann),
            Record(0, None, None, [("h", b"1"), ("h", None), ("h", b"2")]),
            Record(0, key, b"{}"),
            Record(0, key, ann[:5] + b"\xff"),
            Record(0, None, ann),
        ],
    )
    settings = ("value_format=avro", "key_format=avro", f"schema_registry.url={schema_registry.url}")
    with daemon(kafka, topic, tmp_path, *settings) as running:
        records = wait_kept(tmp_path, 3)
        running.wait_caught_up({0: 6, 1: 0})
        undecodable = running.events("record_skipped")
    assert [(each.offset, each.key, each.payload) for each in records] == [
        (0, {"name": "k"}, {"name": "ann"}),
        (2, None, None),
        (5, None, {"name": "ann"}),
    ]
    assert records[1].headers == (("h", b"1"), ("h", None), ("h", b"2"))
    assert "its key: ValueError: no schema registry's header" in undecodable[0]["message"]


def test_dead_letters_have_what_kafka_has(
    kafka: KafkaCluster, schema_registry: RegistryServer, topic: str, tmp_path: Path
) -> None:
    good, key = (
        avro(schema_registry, topic, {"name": "ann"}),
        avro(schema_registry, topic, {"name": "k"}, MessageField.KEY),
    )
    raised = avro(schema_registry, topic, {"name": "raise"})
    records = [(key, good[:5] + b"\xff"), (b"no key", good), (key, raised), (key, good)]
    kafka.produce(topic, [Record(0, *record) for record in records])
    settings = ("value_format=avro", "key_format=avro", f"schema_registry.url={schema_registry.url}")
    with daemon(kafka, topic, tmp_path, *settings, "handler.on_failure=dead_letter", "max_retries=0") as running:
        running.wait_caught_up({0: 4, 1: 0})
    found = letters(tmp_path, topic)
    assert [(letter.key, letter.value) for letter in found] == records[:3]
    assert [letter.reason.partition(":")[0] for letter in found[:2]] == ["cannot be deserialized"] * 2
    assert [each.payload for each in kept(tmp_path)] == [{"name": "ann"}]


def test_a_registry_that_is_away_is_waited_for_with_what_it_alone_knows(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    with RegistryServer() as registry, RegistryProxy(registry.url) as proxy:
        known = avro(registry, topic, {"name": "known"})
        kafka.produce(topic, [Record(0, None, known), Record(1, None, known)])
        settings = ("value_format=avro", f"schema_registry.url={proxy.url}", "schema_registry.timeout_ms=500")
        with daemon(kafka, topic, tmp_path, *settings) as running:
            wait_kept(tmp_path, 2)
            registry.stop()
            # Of schema 2, which does not exist yet.
            unknown = known[:4] + b"\2" + known[5:]
            kafka.produce(topic, [Record(0, None, known), Record(0, None, unknown), Record(1, None, known)])
            wait_kept(tmp_path, 4)
            status = running.wait_status(
                lambda status: any("its schema is waited for" in each.problem for each in status.partitions),
                "a partition that waits",
            )
            waiting, other = status.partitions
            assert waiting.problem.startswith("offset 2: its schema is waited for: http://127.0.0.1:")
            assert (waiting.state, waiting.position, waiting.processed) == ("running", 2, 2)
            assert (other.problem, other.processed) == ("", 2)
            assert running.events("record_undecodable") == []
            # It is killed and started again: what is known is still known.
            assert running.terminate() == 0
            kafka.produce(topic, [Record(1, None, known)])
            running.start()
            wait_kept(tmp_path, 5)
            proxy.answer = (503, b"", {})  # until it has what it had, and more
            registry.start()
            registry.register("a", json.dumps(USER))
            registry.register("b", json.dumps({**USER, "name": "Other"}))
            proxy.answer = None
            records = wait_kept(tmp_path, 6)
            running.wait_status(
                lambda status: not any(each.problem for each in status.partitions), "nothing to be waited for"
            )
    assert [(each.partition, each.offset) for each in records] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_a_token_that_cannot_be_had_is_waited_for(
    kafka: KafkaCluster, schema_registry: RegistryServer, topic: str, tmp_path: Path
) -> None:
    kafka.produce(topic, [Record(0, None, avro(schema_registry, topic, {"name": "ann"}))])
    known = "Basic " + base64.b64encode(b"orders:hunter2").decode()
    with TokenServer(known) as tokens, RegistryProxy(schema_registry.url) as proxy:
        tokens.answer = (503, b"")
        settings = (
            "value_format=avro",
            f"schema_registry.url={proxy.url}",
            f"schema_registry.bearer_issuer_endpoint_url={tokens.url}",
            "schema_registry.bearer_client_id=orders",
            "schema_registry.bearer_client_secret=${env:SECRET}",
        )
        with daemon(kafka, topic, tmp_path, *settings, SECRET="hunter2") as running:
            status = running.wait_status(
                lambda status: any(each.problem for each in status.partitions), "a partition that waits"
            )
            assert status.partitions[0].problem.startswith(
                f"offset 0: its schema is waited for: the token endpoint {tokens.url} answers 503"
            )
            tokens.answer = None
            wait_kept(tmp_path, 1)
            log = running.log_text()
        assert {each["authorization"] for each in proxy.headers} == {f"Bearer token-{len(tokens.asked)}"}
    assert "hunter2" not in log
    assert "token-" not in log


def test_a_format_of_one_s_own_and_string_keys(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    kafka.produce(
        topic, [Record(0, b"k", b"a"), Record(0, b"\xff", b"b"), Record(0, None, b"\xff"), Record(0, b"", b"")]
    )
    settings = ("value_format=custom:tests.format_handlers:Deadly", "key_format=string", "handler.ordering=key")
    with daemon(kafka, topic, tmp_path, *settings):
        records = wait_kept(tmp_path, 2)
        wait_until(lambda: len(kept(tmp_path)) == 2, 5, "no more")
    assert [(each.offset, each.key, each.payload) for each in records] == [(0, "k", "A"), (3, "", "")]


def test_a_record_that_ends_its_worker_is_refused_after_so_many_deaths(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    values = [b"a", b"deadly", b"b", b"deadly", b"c"]
    kafka.produce(topic, [Record(0, None, value) for value in values])
    kafka.produce(topic, [Record(1, None, b"other")])
    settings = ("value_format=custom:tests.format_handlers:Deadly", "handler.crash_attempts=2")
    with daemon(kafka, topic, tmp_path, *settings) as running:
        records = wait_kept(tmp_path, 4)
        running.wait_caught_up({0: 5, 1: 1})
        skipped = [event["message"] for event in running.events("record_skipped")]
        refused = [event["offset"] for event in running.events("record_refused")]
        deaths = len(running.events("worker_died"))
    assert [(each.partition, each.payload) for each in records] == [(0, "A"), (0, "B"), (0, "C"), (1, "OTHER")]
    assert (refused, deaths) == ([1, 3], 4)
    assert skipped[0].endswith(
        "@1 is skipped: cannot be deserialized: its deserializer ended the worker 2 times, last with SIGSEGV"
    )


@pytest.mark.parametrize("ordering", ["partition", "key"])
def test_a_record_whose_preparing_never_ends_is_refused_with_the_stacks(
    kafka: KafkaCluster, topic: str, tmp_path: Path, ordering: str
) -> None:
    values = [b"a", b"hang", b"b", b"hang", b"c"]
    kafka.produce(topic, [Record(0, None, value) for value in values])
    kafka.produce(topic, [Record(1, None, b"other")])
    settings = (
        "value_format=custom:tests.format_handlers:Hanging",
        "handler.on_failure=dead_letter",
        "handler.crash_attempts=2",
        "handler.timeout_seconds=1",
        f"handler.ordering={ordering}",
    )
    with daemon(kafka, topic, tmp_path, *settings) as running:
        running.wait_caught_up({0: 5, 1: 1})
        hung = running.events("worker_hung")
        assert running.terminate() == 0
    assert [(each.partition, each.payload) for each in kept(tmp_path)] == [(0, "A"), (0, "B"), (0, "C"), (1, "OTHER")]
    assert sorted(event["offset"] for event in hung) == [1, 1, 3, 3]
    assert all("format_handlers.py" in event["message"] and " in prepare" in event["message"] for event in hung)
    found = letters(tmp_path, topic)
    assert [(each.offset, each.value, each.error, each.attempts) for each in found] == [
        (1, b"hang", "WorkerTimeout", 2),
        (3, b"hang", "WorkerTimeout", 2),
    ]
    assert found[0].reason.endswith("its deserializer ended the worker 2 times, last by taking longer than 1 s")
    assert all("format_handlers.py" in each.traceback for each in found)


def test_a_registry_that_is_waited_for_and_a_preparing_that_takes_its_time_are_no_hang(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    kafka.produce(topic, [Record(0, None, b"slow"), Record(0, None, b"a")])
    with RegistryProxy("http://127.0.0.1:9") as proxy:
        kafka.produce(topic, [Record(1, b"\0\0\0\0\7", b"a")])
        settings = (
            "value_format=custom:tests.format_handlers:Hanging",
            "key_format=avro",
            f"schema_registry.url={proxy.url}",
            "handler.timeout_seconds=4",
        )
        with daemon(kafka, topic, tmp_path, *settings) as running:
            wait_kept(tmp_path, 2)
            waiting = running.wait_status(
                lambda status: any("its schema is waited for" in each.problem for each in status.partitions), "it waits"
            )
            pid = waiting.partitions[1].worker.pid
            wait_until(lambda: len(proxy.asked) > 6, 30, "questions for more than 6 s")
            status = running.status()
            assert status.partitions[1].worker.pid == pid
            assert running.events("worker_hung") == []


def test_config_check_asks_the_registry(
    kafka: KafkaCluster, schema_registry: RegistryServer, topic: str, tmp_path: Path
) -> None:
    def check(url: str) -> subprocess.CompletedProcess[str]:
        settings = {
            "brokers": kafka.bootstrap,
            "topics": topic,
            "handler.target": "tests.format_handlers:keep",
            "handler.path": str(ROOT),
            "value_format": "avro",
            "schema_registry.url": url,
        }
        options = [word for name, value in settings.items() for word in ("-s", f"{name}={value}")]
        command = [COMMAND, "config", "check", *options]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    good = check(schema_registry.url)
    assert good.returncode == 0, good.stdout + good.stderr
    assert f"the schema registry at {schema_registry.url} answers" in good.stdout
    bad = check("http://u:hunter2@127.0.0.1:9")
    assert bad.returncode == 69
    assert "no schema registry answers: http://127.0.0.1:9: " in bad.stdout
    assert "hunter2" not in bad.stdout + bad.stderr


@pytest.mark.parametrize("setting", ["value_format", "key_format"])
def test_a_missing_class_refuses_to_start(kafka: KafkaCluster, topic: str, tmp_path: Path, setting: str) -> None:
    with daemon(kafka, topic, tmp_path, f"{setting}=custom:tests.format_handlers:Gone") as refused:
        assert refused.process.wait(30) == 78
        assert f"{setting}: 'tests.format_handlers:Gone' cannot be used" in refused.log_text()


def test_a_topic_met_by_a_regular_expression_whose_format_does_not_fit_is_refused_record_by_record(
    kafka: KafkaCluster, topic: str, tmp_path: Path
) -> None:
    kafka.produce(topic, [Record(0, None, b"a")])
    settings = (f"topics=^{topic}", "formats.^t.value_format=string")
    with daemon(kafka, topic, tmp_path, *settings, target="keep_numbers") as running:
        running.wait_caught_up({0: 1, 1: 0})
        (undecodable,) = running.events("record_undecodable")
    assert "no value of format string can be read as int" in undecodable["message"]


def test_what_is_empty_is_not_what_is_missing(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    records = [
        Record(0, b"", b"", [("", b"")]),
        Record(0, None, None, []),
        Record(0, b"k", b"v", [("h", None), ("h", b""), ("g", b"1"), ("h", None)]),
    ]
    kafka.produce(topic, records)
    kafka.produce(topic, [Record(1, None, b""), Record(1, None, b"1")])
    with daemon(kafka, topic, tmp_path, f"formats.{topic}.value_format=bytes", "key_format=bytes") as running:
        found = wait_kept(tmp_path, 5)
        running.wait_caught_up({0: 3, 1: 2})
    assert [each[3:] for each in found[:3]] == [(each.key, each.value, tuple(each.headers or ())) for each in records]
    assert [each.payload for each in found[3:]] == [b"", b"1"]


def test_an_empty_value_is_no_json_and_a_missing_one_is_none(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    kafka.produce(topic, [Record(0, None, b""), Record(0, None, None), Record(0, None, b"null")])
    with daemon(kafka, topic, tmp_path) as running:
        running.wait_caught_up({0: 3, 1: 0})
        (undecodable,) = running.events("record_undecodable")
    assert undecodable["offset"] == 0
    assert [(each.offset, each.payload) for each in kept(tmp_path)] == [(1, None), (2, None)]


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
def test_compressed_batches(kafka: KafkaCluster, topic: str, tmp_path: Path, codec: str) -> None:
    producer = Producer(kafka.client_settings(compression_type=codec, linger_ms=50))
    for number in range(200):
        producer.produce(topic, json.dumps({"number": number, "more": "x" * 200}), partition=0)
    assert producer.flush(30) == 0
    with daemon(kafka, topic, tmp_path):
        records = wait_kept(tmp_path, 200)
    assert [each.payload["number"] for each in records] == list(range(200))


def test_aborted_records_are_not_handled_and_are_passed_over(kafka: KafkaCluster, topic: str, tmp_path: Path) -> None:
    producer = Producer(kafka.client_settings(transactional_id=topic))
    producer.init_transactions(30)
    for number in range(6):
        producer.begin_transaction()
        producer.produce(topic, json.dumps(number), partition=0)
        producer.flush(30)
        if number % 2:
            producer.abort_transaction(30)
        else:
            producer.commit_transaction(30)
    with daemon(kafka, topic, tmp_path) as running:
        records = wait_kept(tmp_path, 3)
        running.wait_caught_up({0: kafka.end_offsets(topic)[0], 1: 0})
    assert [each.payload for each in records] == [0, 2, 4]
    assert kafka.end_offsets(topic)[0] == 12, "a marker follows each"


def test_of_many_workers_that_start_one_asks(
    kafka: KafkaCluster, schema_registry: RegistryServer, topic_name: str, tmp_path: Path
) -> None:
    kafka.create_topic(topic_name, partitions=12)
    value = avro(schema_registry, topic_name, {"name": "x"})
    kafka.produce(topic_name, [Record(partition, None, value) for partition in range(12)])
    with RegistryProxy(schema_registry.url) as proxy:
        settings = ("value_format=avro", f"schema_registry.url={proxy.url}")
        for run in (1, 2):
            with daemon(kafka, topic_name, tmp_path, *settings) as running:
                wait_kept(tmp_path, 12 * run)
                assert running.terminate() == 0
            kafka.produce(topic_name, [Record(partition, None, value) for partition in range(12)])
        assert proxy.asked == [f"/schemas/ids/{int.from_bytes(value[1:5])}"]
    (kept_schema,) = (tmp_path / "state").rglob("*.json")
    assert kept_schema.stat().st_mode & 0o777 == 0o600
    assert kept_schema.parent.stat().st_mode & 0o777 == 0o700
