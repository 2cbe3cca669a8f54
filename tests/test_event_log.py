"""Event lines: for machines, for people, and not a million times."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from kafkasrcd.workers import event_log
from kafkasrcd.workers.event_log import EventLog


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    logger = logging.getLogger("kafkasrcd")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], level, logger.propagate = before
    logger.setLevel(level)


def _lines(log_format: str, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    event_log.configure(log_format, level, stream)
    return stream


def test_json_has_time_level_event_and_fields() -> None:
    stream = _lines("json")
    EventLog("part").info("it_happened", "something happened", topic="orders", partition=3)
    line = json.loads(stream.getvalue())
    assert line["level"] == "info"
    assert line["event"] == "it_happened"
    assert line["message"] == "something happened"
    assert (line["topic"], line["partition"]) == ("orders", 3)
    assert line["time"].endswith("Z")


def test_a_cause_comes_with_its_traceback_in_one_line() -> None:
    stream = _lines("json")
    try:
        raise ValueError("of the user's")
    except ValueError as error:
        EventLog("part").error("it_failed", "it failed", cause=error)
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: of the user's" in json.loads(line)["traceback"]


def test_people_read_a_sentence_first() -> None:
    stream = _lines("human")
    EventLog("part").warning("it_happened", "50 % happened", topic="orders")
    assert stream.getvalue().split(" ", 1)[1] == "warning 50 % happened  (topic=orders)\n"


def test_auto_is_json_where_nobody_looks() -> None:
    stream = _lines("auto")
    EventLog("part").info("it_happened", "x")
    json.loads(stream.getvalue())


def test_what_is_below_the_level_is_not_written() -> None:
    stream = _lines("json", "warning")
    EventLog("part").info("it_happened", "x")
    assert stream.getvalue() == ""


def test_a_repeated_failure_is_counted_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = _lines("json")
    log = EventLog("part")
    for _ in range(1000):
        log.repeated("it_failed", "it failed", same=(1,))
    log.repeated("it_failed", "it failed elsewhere", same=(2,))
    assert len(stream.getvalue().splitlines()) == 2
    now[0] += 10
    log.repeated("it_failed", "it failed", same=(1,))
    assert json.loads(stream.getvalue().splitlines()[-1])["repeated"] == 999
