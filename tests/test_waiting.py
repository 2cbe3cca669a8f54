"""Waiting returns what was waited for, and a failure says what was seen."""

import pytest

from tests.waiting import wait_until, wait_until_equal


def test_the_true_value_is_returned() -> None:
    values = iter([0, None, "found"])
    assert wait_until(lambda: next(values), 5, "a value", interval_seconds=0) == "found"


def test_the_failure_says_what_was_seen_last() -> None:
    with pytest.raises(AssertionError, match=r"waited 0\.01 s for rain; last seen: \[\]"):
        wait_until(list, 0.01, "rain")
    with pytest.raises(AssertionError, match="last seen: 'clouds'"):
        wait_until(list, 0, "rain", seen=lambda: "clouds")


def test_the_condition_is_asked_at_least_once() -> None:
    assert wait_until(lambda: True, 0, "nothing")


def test_only_ignored_exceptions_count_as_not_yet() -> None:
    def fail() -> bool:
        raise KeyError("missing")

    with pytest.raises(KeyError):
        wait_until(fail, 1, "a key")
    with pytest.raises(AssertionError, match="KeyError") as caught:
        wait_until(fail, 0.01, "a key", ignoring=(KeyError,))
    assert isinstance(caught.value.__cause__, KeyError)


def test_waiting_for_equality_shows_both_values() -> None:
    values = iter([1, 2, 3])
    wait_until_equal(lambda: next(values), 3, 5, "the count", interval_seconds=0)
    with pytest.raises(AssertionError, match=r"for the count to be 4; last seen: 3"):
        wait_until_equal(lambda: 3, 4, 0, "the count")
