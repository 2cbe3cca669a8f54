"""Pauses in the status for people."""

import time

import msgspec

from kafkasrcd.daemon.status import PauseStatus, Status
from tests.test_open_letters import shown, status_of

PAUSED_MS = int(time.mktime((2026, 1, 31, 12, 3, 10, 0, 0, -1)) * 1000)


def paused(pause: PauseStatus, *, partitions: int = 1, problem: str = "", after_ms: int = 5_000) -> Status:
    status = status_of([])
    (one,) = status.partitions
    each = msgspec.structs.replace(one, state="paused", since_ms=PAUSED_MS, paused=pause, problem=problem)
    numbered = [msgspec.structs.replace(each, partition=number) for number in range(partitions)]
    return msgspec.structs.replace(status, now_ms=PAUSED_MS + after_ms, partitions=numbered)


def alices(scope: str) -> PauseStatus:
    return PauseStatus(
        by="alice@host", since_ms=PAUSED_MS, reason="the move", scope=scope, way_on=f"kafkasrcd resume {scope}"
    )


def test_who_since_when_why_and_what_ends_it() -> None:
    lines = shown(paused(alices("orders:0")), 100).splitlines()
    assert "healthy" in lines[0]
    assert lines[1] == "! orders:0 paused by alice@host since 12:03:10: the move — kafkasrcd resume orders:0"


def test_a_pause_of_yesterday_has_its_day() -> None:
    line = shown(paused(alices("orders:0"), after_ms=86_400_000), 100).splitlines()[1]
    assert "since 2026-01-31 12:03:10" in line


def test_one_word_about_many_partitions_is_one_line() -> None:
    lines = shown(paused(alices("orders"), partitions=50), 100).splitlines()
    assert [line for line in lines if "alice" in line] == [
        "! orders paused by alice@host since 12:03:10: the move — kafkasrcd resume orders"
    ]
    assert shown(paused(alices("--all")), 100).splitlines()[1].startswith("! all topics paused by alice@host")


def test_another_problem_of_the_partition_hides_no_pause() -> None:
    lines = shown(paused(alices("orders:0"), problem="offset 7: its schema is waited for"), 100).splitlines()
    assert "its schema is waited for" in lines[1]
    assert "paused by alice@host" in lines[2]


def test_the_breakers_is_a_problem_and_said_once() -> None:
    pause = msgspec.structs.replace(alices("orders:0"), by="breaker", reason="6 of its last 11 records")
    status = paused(pause, problem="6 of its last 11 records; mend it, then kafkasrcd resume orders:0")
    lines = shown(status, 100).splitlines()
    assert "1 problem" in lines[0]
    assert [line for line in lines if "6 of its last" in line] == [
        "! orders[0] paused since 12:03:10 (5 s): 6 of its last 11 records; mend it, then kafkasrcd resume orders:0"
    ]
