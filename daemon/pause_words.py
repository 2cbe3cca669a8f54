"""A pause in words: who ended the work, and what ends the pause."""

from typing import Final

from kafkasrcd.settings import Settings
from kafkasrcd.storage.intents import Intent
from kafkasrcd.storage.opening import MEMORY_URL

BREAKER: Final = "breaker"
"""In the place of a person, whose name has a host."""


def way_on(intent: Intent, settings: Settings) -> str:
    """The command that ends it."""
    if settings.store.url == MEMORY_URL:
        return "restart kafkasrcd, since a memory:// store is out of reach of kafkasrcd resume"
    return f"kafkasrcd resume {intent.scope}"
