"""What the configuration says about a record whose handler raised."""

from kafkasrcd.errors import HandlerMisuse
from kafkasrcd.outcomes import Reject
from kafkasrcd.settings import OnFailure, Settings
from kafkasrcd.storage.opening import MEMORY_URL


def failure_policy(settings: Settings) -> OnFailure:
    """``handler.on_failure``, but that nothing is dead-lettered where there is no place for it."""
    handler = settings.handler
    has_place = handler.dead_letter_topic or (handler.dead_letter_store and settings.store.url != MEMORY_URL)
    return OnFailure.STOP if handler.on_failure is OnFailure.DEAD_LETTER and not has_place else handler.on_failure


class NeverAgain:
    """Which exceptions are not worth another attempt: ``Reject``, ``HandlerMisuse``, and those of
    ``handler.non_retryable``."""

    def __init__(self, names: list[str]) -> None:
        self._names = frozenset(names)

    def __call__(self, error: BaseException) -> bool:
        """By the names of its class and of those it comes from, with or without their module."""
        if isinstance(error, (Reject, HandlerMisuse)):
            return True
        if not self._names:
            return False
        kinds = type(error).__mro__
        return any(kind.__name__ in self._names or class_name(kind) in self._names for kind in kinds)


def class_name(kind: type) -> str:
    """``ValueError``, ``package.module.Error``: as a person would import it."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
