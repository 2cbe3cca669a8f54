"""Handlers for tests/test_strategies.py. What each does is in the record: {"do": "raise"} and the like."""

import os
import time
from collections import Counter
from typing import Any

from sqlalchemy import BigInteger, Column, Connection, Integer, MetaData, Table, insert
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from kafkasrcd import Message
from tests import ledger

metadata = MetaData()
# No key: a record whose effect is there twice shows.
effects = Table("effects", metadata, Column("partition", Integer), Column("offset", BigInteger))

_raised: Counter[tuple[int, int]] = Counter()
_later: list[Message[Any]] = []


class _Base(DeclarativeBase):
    metadata = metadata


class Effect(_Base):
    """As ``effects``, for the ORM, which wants a key of its own."""

    __tablename__ = "orm_effects"
    id: Mapped[int] = mapped_column(primary_key=True)
    partition: Mapped[int]
    offset: Mapped[int]


def _raise_if_told(message: Message[Any]) -> None:
    """{"raise": N}: the first N times."""
    times = message.payload.get("raise", 0)
    _raised[message.partition, message.offset] += 1
    if _raised[message.partition, message.offset] <= times:
        raise ValueError("told to")


def effect(message: Message[Any], tx: Connection) -> None:
    """One row, then perhaps an exception."""
    tx.execute(insert(effects), {"partition": message.partition, "offset": message.offset})
    _raise_if_told(message)


def effects_of_batch(messages: list[Message[Any]], tx: Connection) -> None:
    """A row each, in one statement."""
    rows = [{"partition": message.partition, "offset": message.offset} for message in messages]
    tx.execute(insert(effects), rows)
    for message in messages:
        _raise_if_told(message)


async def effect_async(message: Message[Any], tx: AsyncConnection) -> None:
    """As ``effect``."""
    await tx.execute(insert(effects), {"partition": message.partition, "offset": message.offset})
    _raise_if_told(message)


def effect_by_orm(message: Message[Any], session: Session) -> None:
    """As ``effect``, by an object."""
    session.add(Effect(partition=message.partition, offset=message.offset))
    _raise_if_told(message)


def slow(message: Message[Any]) -> None:
    """Five milliseconds each, written down afterwards."""
    time.sleep(0.005)
    ledger.append(message)


def commit_each(message: Message[Any]) -> None:
    """As ``manual`` is meant."""
    ledger.append(message)
    message.commit()


def commit_as_told(message: Message[Any]) -> None:
    """{"commit": "no" | "later" | "now"}: later is with the next one that says now, after it."""
    ledger.append(message)
    told = message.payload.get("commit", "now")
    if told == "later":
        _later.append(message)
    elif told == "now":
        message.commit()
        while _later:
            _later.pop().commit()


def commit_as_told_or_die(message: Message[Any]) -> None:
    """As ``commit_as_told``; {"die": true} ends the process, the first time that it is met in this folder."""
    mark = os.path.join(os.environ["LEDGER_FOLDER"], f"died-{message.partition}-{message.offset}")
    commit_as_told(message)
    if message.payload.get("die") and not os.path.exists(mark):
        with open(mark, "w"):
            os._exit(7)
