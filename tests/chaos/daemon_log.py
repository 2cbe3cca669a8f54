"""What a daemon's log must not have: a defect, or a traceback."""

from typing import Any

from kafkasrcd import Reject
from tests.chaos.daemon_slot import entries
from tests.chaos.payment import PaymentRefused

FORBIDDEN_EVENTS = frozenset({"defect", "process_failed", "ring_corrupted", "ring_replaced", "offset_out_of_range"})
"""Nothing that a storm does may lead to these."""
_MEANT = tuple(f" raised {kind.__name__} at " for kind in (PaymentRefused, Reject))
"""What the handlers of a storm raise is logged with its traceback."""


def defects(log_text: str) -> list[str]:
    """The lines that tell of one."""
    found = [
        f"{entry.get('time')} {entry['event']}: {entry.get('message')}\n{entry.get('traceback', '')}".rstrip()
        for entry in entries(log_text)
        if entry["event"] in FORBIDDEN_EVENTS or ("traceback" in entry and not _is_meant(entry))
    ]
    # One that nobody caught does not come as an event.
    lines = log_text.splitlines()
    found += [
        "\n".join(lines[number : number + 20])
        for number, line in enumerate(lines)
        if line.startswith("Traceback (most")
    ]
    return found


def _is_meant(entry: dict[str, Any]) -> bool:
    return entry["event"] == "handler_failed" and any(raised in entry["message"] for raised in _MEANT)


def alarms(log_text: str) -> dict[str, int]:
    """How often each event of level error or warning was logged, the most frequent first."""
    counts: dict[str, int] = {}
    for entry in entries(log_text):
        if entry.get("level") in ("error", "warning", "critical"):
            counts[entry["event"]] = counts.get(entry["event"], 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))
