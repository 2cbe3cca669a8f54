"""Rolling rates and restart delays: small clocks that operators and partitions depend on."""

import pytest

from kafkasrcd.daemon.backoff import RestartBackoff
from kafkasrcd.daemon.rolling_rate import WINDOW_SECONDS, RollingRate


def test_a_rate_is_right_from_the_first_second() -> None:
    rate = RollingRate(now=100.0)
    assert rate.per_second == 0.0
    rate.observe(101.0, 500)
    assert rate.per_second == 500.0
    rate.observe(102.0, 700)
    assert rate.per_second == 350.0


def test_a_rate_forgets_what_is_older_than_its_window() -> None:
    rate = RollingRate(now=0.0)
    for second in range(1, 301):
        rate.observe(float(second), 1000 * min(second, 200))
    assert rate.per_second == 0.0
    rate.observe(301.0, 200_000 + 600)
    assert rate.per_second == pytest.approx(600 / WINDOW_SECONDS, rel=0.05)


def test_a_rate_covers_a_minute_where_samples_are_far_apart() -> None:
    rate = RollingRate(now=0.0)
    rate.observe(50.0, 600)
    rate.observe(100.0, 600)
    assert rate.per_second == 6.0, "the sample before the window stays"
    rate.observe(110.0, 600)
    assert rate.per_second == 0.0, "until the next one is as old as the window"


def test_the_window_is_a_minute() -> None:
    rate = RollingRate(now=0.0)
    for second in range(1, 200):
        rate.observe(float(second), 600 if second > 100 else 0)
        assert (rate.per_second > 0) == (100 < second <= 160)
    assert WINDOW_SECONDS == 60.0


def test_a_rate_of_one_moment_is_none() -> None:
    rate = RollingRate(now=5.0)
    rate.observe(5.0, 100)
    assert rate.per_second == 0.0


def test_a_rate_is_never_negative() -> None:
    rate = RollingRate(now=0.0, total=10)
    rate.observe(1.0, 5)
    assert rate.per_second == 0.0


def test_the_first_restart_is_at_once_and_the_next_ones_wait_longer() -> None:
    backoff = RestartBackoff(limit=4, window_seconds=60.0)
    assert [backoff.next_delay() for _ in range(4)] == [0.0, 0.2, 0.4, 0.8]
    assert backoff.next_delay() is None
    assert backoff.total == 4


def test_a_restart_waits_ten_seconds_at_most_however_many_there_were() -> None:
    backoff = RestartBackoff(limit=1_000_000, window_seconds=86_400.0)
    delays = [backoff.next_delay() for _ in range(3_000)]
    assert delays[:9] == [0.0, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    assert set(delays[7:]) == {10.0}


def test_restarts_count_for_as_long_as_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    backoff = RestartBackoff(limit=2, window_seconds=60.0)
    assert [backoff.next_delay() for _ in range(3)] == [0.0, 0.2, None]
    now[0] += 59
    assert backoff.next_delay() is None
    now[0] += 2
    assert backoff.next_delay() == 0.2, "one death is still within the window"
    assert backoff.total == 3


def test_restarts_long_ago_do_not_count() -> None:
    backoff = RestartBackoff(limit=1, window_seconds=0.0)
    assert [backoff.next_delay() for _ in range(5)] == [0.0] * 5
