"""The records of a storm: payments to accounts, the account being the key."""

import msgspec


class Payment(msgspec.Struct, frozen=True):
    """`number` counts from 0 in the order of production; `amount` is in cents."""

    number: int
    account: str
    amount: int
