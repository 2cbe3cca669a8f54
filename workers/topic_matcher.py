"""Topics by name, or by regular expression, as keys of a table."""

import re
from collections.abc import Callable


def topic_matcher(pattern: str) -> Callable[[str], object]:
    """As librdkafka takes topics: a name, or a regular expression where it starts with ``^``. Raises re.error."""
    return re.compile(pattern).search if pattern.startswith("^") else pattern.__eq__
