"""Topics by regular expression: an entry of ``topics`` that starts with ``^``."""

import re
import warnings

from kafkasrcd.settings import GroupProtocol


def is_pattern(topic: str) -> bool:
    """Whether an entry is a regular expression and not a name."""
    return topic.startswith("^")


def pattern_error(pattern: str) -> str | None:
    """Why Python cannot compile ``pattern``; None where it can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what a future Python may read differently
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            return str(error) or type(error).__name__
    return None


def subscribes(entry: str, topic: str, protocol: GroupProtocol) -> bool:
    """Whether a group that subscribes to ``entry`` is given ``topic``.

    Measured on Kafka 4.3: with the classic protocol librdkafka matches the beginning of a name, so ``^orders`` takes
    in ``orders-eu``; with KIP-848 the broker matches (RE2/J), and only whole names.
    """
    if not is_pattern(entry):
        return entry == topic
    if pattern_error(entry) is not None:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        match = re.match if protocol is GroupProtocol.CLASSIC else re.fullmatch
        return match(entry, topic) is not None
