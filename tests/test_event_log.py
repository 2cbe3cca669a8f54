"""Event lines: for machines, for people, and not a million times."""

import io
import json
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

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


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("no text: \udcff", "no text: \udcff"),
        (2**70, 2**70),
        (b"\xff", r"b'\xff'"),
        (ValueError("x"), "x"),
        (Path("/etc"), "/etc"),
    ],
    ids=["a file name that is no text", "a large number", "bytes", "an object", "a path"],
)
def test_no_event_is_lost_for_what_is_in_it(value: object, expected: object) -> None:
    stream = _lines("json")
    EventLog("part").error("it_failed", f"it failed: {value!s}", value=value)
    (line,) = stream.getvalue().splitlines()
    line.encode("ascii")
    assert json.loads(line)["value"] == expected
    assert json.loads(line)["message"] == f"it failed: {value!s}"


def test_times_are_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        stream = _lines("json")
        before = datetime.now(UTC)
        EventLog("part").info("it_happened", "x")
        at = datetime.fromisoformat(json.loads(stream.getvalue())["time"])
        assert timedelta(milliseconds=-1) <= at - before < timedelta(seconds=10)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_people_see_the_traceback_below_the_sentence() -> None:
    stream = _lines("human")
    try:
        raise ValueError("of the user's")
    except ValueError as error:
        EventLog("part").error("it_failed", "it failed", cause=error)
    first, *more = stream.getvalue().splitlines()
    assert first.endswith("it failed")
    assert more[0].startswith("Traceback")
    assert more[-1] == "ValueError: of the user's"


def test_configured_again_it_writes_once_and_to_the_new_place(capsys: pytest.CaptureFixture[str]) -> None:
    old, new = _lines("json"), _lines("json")
    root = logging.getLogger()
    elsewhere = logging.StreamHandler(io.StringIO())
    root.addHandler(elsewhere)
    try:
        EventLog("part").error("it_happened", "x")
    finally:
        root.removeHandler(elsewhere)
    assert old.getvalue() == ""
    assert len(new.getvalue().splitlines()) == 1
    assert elsewhere.stream.getvalue() == "", "other loggers of the process get none of it"
    assert capsys.readouterr().err == ""


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
    for _ in range(9):
        now[0] += 0.5
        log.repeated("it_failed", "it failed", same=(1,))
    assert len(stream.getvalue().splitlines()) == 2
    now[0] += 0.5  # five seconds after the line, however often it came meanwhile
    log.repeated("it_failed", "it failed", same=(1,))
    assert json.loads(stream.getvalue().splitlines()[-1])["repeated"] == 1008
    log.repeated("something_else", "and another event of the same", same=(1,))
    assert len(stream.getvalue().splitlines()) == 4
