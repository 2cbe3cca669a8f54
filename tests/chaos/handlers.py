"""The handlers of a storm. They never raise: what is counted is what kafkasrcd does."""

import os
import time

from sqlalchemy import Connection, text

from kafkasrcd import Message
from tests.chaos.payment import Payment

DAEMON_VARIABLE = "STORM_DAEMON"
"""The number of the daemon whose process it is."""
SECONDS_A_PAYMENT = 0.001
"""After the effect: so that a kill finds records in hands, done and not yet counted as processed."""

_INSERT = text(
    "INSERT INTO payments (partition, record_offset, account, number, amount, at_ns, daemon, pid)"
    " VALUES (:partition, :offset, :account, :number, :amount, :at_ns, :daemon, :pid)"
)
# After partitions were added, two processes may be paid to the same accounts at once, each in a transaction that holds
# others: then the database ends a deadlock, which is for kafkasrcd to mend.
_ADD = text(
    "INSERT INTO balances (account, total) VALUES (:account, :amount)"
    " ON CONFLICT (account) DO UPDATE SET total = balances.total + excluded.total"
)

_file = -1


def append(message: Message[Payment]) -> None:
    """Write the payment down, with one system call: even SIGKILL loses nothing that was handled."""
    global _file
    if _file < 0:
        # A process identifier may come again.
        path = os.path.join(os.environ["LEDGER_FOLDER"], f"payments-{os.getpid()}-{time.monotonic_ns()}")
        _file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    payment = message.payload
    line = (
        f"{message.partition} {message.offset} {payment.account} {payment.number} {payment.amount}"
        f" {time.monotonic_ns()}\n"
    )
    os.write(_file, line.encode())
    time.sleep(SECONDS_A_PAYMENT)


def pay(message: Message[Payment], tx: Connection) -> None:
    """The effect in the database, in the transaction that records the offset. Nothing there refuses a second one."""
    payment = message.payload
    values = {
        "partition": message.partition,
        "offset": message.offset,
        "account": payment.account,
        "number": payment.number,
        "amount": payment.amount,
        "at_ns": time.monotonic_ns(),
        "daemon": int(os.environ[DAEMON_VARIABLE]),
        "pid": os.getpid(),
    }
    tx.execute(_INSERT, values)
    tx.execute(_ADD, values)
    time.sleep(SECONDS_A_PAYMENT)
