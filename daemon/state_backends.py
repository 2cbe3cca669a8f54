"""Where a KafkaSource keeps how far it has got, beside Kafka itself."""

from kafkasrcd.storage.opening import MEMORY_URL


class SqlStateBackend:
    """The database at ``url``: ``sqlite:///path`` or ``postgresql://user@host/database``. Nothing is opened here."""

    def __init__(self, url: str) -> None:
        self._url = url

    @property
    def url(self) -> str:
        """With its password, where it has one."""
        return self._url

    def __repr__(self) -> str:
        """Without the URL, which may have a password."""
        return "SqlStateBackend(<not shown>)"


class MemoryStateBackend:
    """None but Kafka's own offsets."""

    url = MEMORY_URL

    def __repr__(self) -> str:
        return "MemoryStateBackend()"


StateBackend = SqlStateBackend | MemoryStateBackend
