"""The intents' statements, on a connection that is in a transaction."""

from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import Connection, Select, Table, delete, select
from sqlalchemy.dialects import postgresql, sqlite

from kafkasrcd.storage.intents import ALL_TOPICS, WHOLE_TOPIC, Intent, IntentKind, Scope
from kafkasrcd.storage.schema import intents

_INSERTS: Final[dict[str, Callable[[Table], Any]]] = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}
_KEY: Final = ("group_id", "topic", "partition", "kind")


class IntentRows:
    """Those of ``group_id``. Every method runs in the caller's transaction and raises SQLAlchemy's errors."""

    def __init__(self, group_id: str) -> None:
        self._group_id = group_id

    def set(self, connection: Connection, intent: Intent, *, replace: bool) -> None:
        """Keep it; where there is one of its kind and scope, that stays unless it is to be replaced."""
        values = {
            "group_id": self._group_id,
            "topic": intent.scope.topic,
            "partition": intent.scope.partition,
            "kind": intent.kind.value,
            "value": intent.value,
            "set_by": intent.set_by,
            "set_ms": intent.set_ms,
            "reason": intent.reason,
        }
        statement = _INSERTS[connection.dialect.name](intents).values(values)
        if replace:
            again = {name: statement.excluded[name] for name in values if name not in _KEY}
            connection.execute(statement.on_conflict_do_update(index_elements=_KEY, set_=again))
        else:
            connection.execute(statement.on_conflict_do_nothing(index_elements=_KEY))

    def clear(self, connection: Connection, kind: IntentKind, scope: Scope) -> list[Intent]:
        """Take back those of ``kind`` about ``scope`` or a part of it; what they were."""
        where = [intents.c.group_id == self._group_id, intents.c.kind == kind.value]
        if scope.topic != ALL_TOPICS:
            where.append(intents.c.topic == scope.topic)
        if scope.partition != WHOLE_TOPIC:
            where.append(intents.c.partition == scope.partition)
        found = self._found(connection, select(intents).where(*where))
        connection.execute(delete(intents).where(*where))
        return found

    def all(self, connection: Connection) -> list[Intent]:
        """Every one of a kind that this kafkasrcd knows, ordered by scope."""
        known = intents.c.kind.in_([kind.value for kind in IntentKind])
        return self._found(connection, select(intents).where(intents.c.group_id == self._group_id, known))

    @staticmethod
    def _found(connection: Connection, statement: Select[Any]) -> list[Intent]:
        found = [
            Intent(
                kind=IntentKind(row.kind),
                scope=Scope(row.topic, row.partition),
                value=row.value,
                set_by=row.set_by,
                set_ms=row.set_ms,
                reason=row.reason,
            )
            for row in connection.execute(statement)
        ]
        return sorted(found, key=lambda each: (each.scope, each.kind))
