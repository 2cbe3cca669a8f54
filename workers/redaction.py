"""What must never be printed, and how it is hidden.

Names are judged, not values: a password cannot be told from any other text. Where in doubt a value is hidden.
"""

import re

HIDDEN = "********"

# ``key`` only as the last word or before ``pem``: ``ssl.key.pem`` is a key, ``ssl.key.location`` a path to one.
_SECRET = re.compile(r"passw|passphrase|pwd|secret|token|credential|private|bearer\.config|(^|[._-])key([._-]pem)?$")
_HARMLESS_END = re.compile(r"[._-](location|file|url|ms|seconds|name|client[._-]id)$")
# Up to the last @: a password may have one that should have been escaped.
_URL_PASSWORD = re.compile(r"(://[^\s/:@]*:)\S+(@)")


def is_secret(name: str) -> bool:
    """Whether a setting or variable of this name holds something that must not be shown.

    >>> is_secret("sasl.password"), is_secret("ssl.key.location")
    (True, False)
    """
    lower = name.lower()
    return bool(_SECRET.search(lower)) and not _HARMLESS_END.search(lower)


def hide_url_passwords(text: str) -> str:
    """``text`` with the password of each URL in it hidden.

    >>> hide_url_passwords("postgresql://app:hunter2@db/offsets")
    'postgresql://app:********@db/offsets'
    """
    return _URL_PASSWORD.sub(rf"\g<1>{HIDDEN}\g<2>", text)
