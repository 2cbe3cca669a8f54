"""The records of a storm: payments to accounts, the account being the key. With some of them something is wrong."""

from enum import StrEnum
from typing import Final

import msgspec


class PaymentRefused(Exception):
    """What the handlers of a storm raise."""


class Flaw(StrEnum):
    """What is wrong with a payment, which says what becomes of it."""

    NONE = "none"
    UNREADABLE = "unreadable"
    """Its value is no JSON."""
    REFUSED = "refused"
    """The handler raises each time."""
    REFUSED_ONCE = "refused-once"
    """The handler raises when a process has it for the first time; then it is paid."""
    REJECTED = "rejected"
    """The handler raises Reject."""
    DEADLY = "deadly"
    """The handler ends its process."""


DIED: Final = "HandlerProcessEnded"
LETTER_ERRORS: Final = {
    Flaw.UNREADABLE: "DecodeError",
    Flaw.REFUSED: f"{PaymentRefused.__module__}.{PaymentRefused.__qualname__}",
    Flaw.REJECTED: "kafkasrcd.Reject",
    Flaw.DEADLY: DIED,
}
"""What the dead letter of a payment says; the others are paid."""


class Payment(msgspec.Struct, frozen=True):
    """`number` counts from 0 in the order of production; `amount` is in cents."""

    number: int
    account: str
    amount: int
    flaw: Flaw = Flaw.NONE

    @property
    def key(self) -> bytes:
        """As it is produced."""
        return self.account.encode()

    @property
    def value(self) -> bytes:
        """As it is produced; no other payment has the same."""
        whole = msgspec.json.encode(self)
        return whole[:-1] + b"\0\xff" if self.flaw is Flaw.UNREADABLE else whole
