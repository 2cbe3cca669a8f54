"""Which kafkasrcd this is."""

from functools import cache
from importlib.metadata import version


@cache
def installed_version() -> str:
    """Of the kafkasrcd distribution."""
    return version("kafkasrcd")
