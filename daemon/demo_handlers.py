"""What the demo's daemon calls. `kafkasrcd demo` writes this file anew each time; copy it to build on it.

Each handler process appends the orders it has handled to a file of its own, handled/<pid>.jsonl, a line an order.
"""

import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from kafkasrcd import Message

FOLDER = Path(__file__).parent / "handled"
MOST_BYTES = 4_000_000  # then a file becomes <pid>.old.jsonl, and the one before it goes


@dataclass
class Item:
    sku: str
    quantity: int
    price_cents: int


@dataclass
class Order:
    """A record's value, as JSON. Fields in it that are not named here are ignored."""

    order_id: str
    user: str
    amount_cents: int
    placed_at: datetime
    items: list[Item]


class HandledFile:
    """The orders that this process has handled, and running totals of them."""

    def __init__(self) -> None:
        self.orders = 0
        self.cents = 0
        self._path = FOLDER / f"{os.getpid()}.jsonl"
        self._file = self._path.open("ab", buffering=0)  # a line is a single write: whole, also when this is killed

    def append(self, message: Message[Order]) -> None:
        order = message.payload
        self.orders += 1
        self.cents += order.amount_cents
        line = {
            "orders": self.orders,
            "cents": self.cents,
            "order_id": order.order_id,
            "user": order.user,
            "amount_cents": order.amount_cents,
            "placed_at": order.placed_at.isoformat(),
            "partition": message.partition,
            "offset": message.offset,
        }
        if self._file.tell() > MOST_BYTES:
            self._file.close()
            self._path.replace(self._path.with_suffix(".old.jsonl"))
            self._file = self._path.open("ab", buffering=0)
        self._file.write(json.dumps(line).encode() + b"\n")


handled: HandledFile | None = None


def handle(message: Message[Order]) -> None:
    """Called with one order at a time; those of a user in order, since a user's orders share a partition."""
    global handled
    order = message.payload
    if order.amount_cents != sum(item.quantity * item.price_cents for item in order.items):
        raise ValueError(f"order {order.order_id}: the amount is not that of its items")
    if handled is None:
        handled = HandledFile()
    handled.append(message)
