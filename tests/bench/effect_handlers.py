"""The handler of the rows with `on_checkpoint`. Apart from the others, which do not load SQLAlchemy."""

from typing import Any

from sqlalchemy import Connection, insert

from kafkasrcd import Message
from tests.bench.effects import effect, effects

_INSERT = insert(effects)


def insert_effects(messages: list[Message[dict[str, Any]]], tx: Connection) -> None:
    """A row a message, all in one call of SQLAlchemy."""
    tx.execute(_INSERT, [effect(message.partition, message.offset, message.payload) for message in messages])
