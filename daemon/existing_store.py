"""A part of the group's offset store, for commands: they work beside a daemon, and never make or migrate a store."""

import contextlib
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from kafkasrcd.daemon.configuration import Configuration


class _Part(Protocol):
    def close(self) -> None: ...


P = TypeVar("P", bound=_Part)


@contextlib.contextmanager
def existing_store(configuration: "Configuration", open_part: Callable[..., P]) -> Generator[P]:
    """What ``open_part`` of ``storage.opening`` opens of the configured store, until the block ends.

    Raises ConfigurationError where there is no store, StoreUnavailable where it is away.
    """
    from kafkasrcd.daemon.places import existing_store_url
    from kafkasrcd.settings import CommitStrategy

    settings = configuration.settings
    part = open_part(
        existing_store_url(settings, configuration.base_directory),
        settings.group_id,
        settings.store.busy_timeout_ms,
        shared_with_effects=settings.commit_strategy is CommitStrategy.ON_CHECKPOINT,
        must_exist=True,
    )
    with contextlib.closing(part):
        yield part
