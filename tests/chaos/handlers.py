"""The handlers of a storm. They fail as a payment's flaw says, and never otherwise."""

import os
import time

from sqlalchemy import Connection, text

from kafkasrcd import Message, Reject
from tests.chaos.payment import Flaw, Payment, PaymentRefused

DAEMON_VARIABLE = "STORM_DAEMON"
"""The number of the daemon whose process it is."""
SECONDS_A_PAYMENT = 0.001
"""After the effect: so that a kill finds records in hands, done and not yet counted as processed."""

_INSERT = text(
    "INSERT INTO payments (partition, record_offset, account, number, amount, flaw, at_ns, daemon, pid)"
    " VALUES (:partition, :offset, :account, :number, :amount, :flaw, :at_ns, :daemon, :pid)"
)
# After partitions were added, two processes may be paid to the same accounts at once, each in a transaction that holds
# others: then the database ends a deadlock, which is for kafkasrcd to mend.
_ADD = text(
    "INSERT INTO balances (account, total) VALUES (:account, :amount)"
    " ON CONFLICT (account) DO UPDATE SET total = balances.total + excluded.total"
)

_file = -1
_refused: set[int] = set()
"""The payments that this process has refused once."""


def append(message: Message[Payment]) -> None:
    """Write the payment down, with one system call: even SIGKILL loses nothing that was handled."""
    global _file
    _balk(message.payload)  # before the effect, which nobody takes back
    if _file < 0:
        # A process identifier may come again.
        path = os.path.join(os.environ["LEDGER_FOLDER"], f"payments-{os.getpid()}-{time.monotonic_ns()}")
        _file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    payment = message.payload
    line = (
        f"{message.partition} {message.offset} {payment.account} {payment.number} {payment.amount} {payment.flaw}"
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
        "flaw": payment.flaw.value,
        "at_ns": time.monotonic_ns(),
        "daemon": int(os.environ[DAEMON_VARIABLE]),
        "pid": os.getpid(),
    }
    tx.execute(_INSERT, values)
    tx.execute(_ADD, values)
    _balk(payment)  # after the effect, which is undone
    time.sleep(SECONDS_A_PAYMENT)


def _balk(payment: Payment) -> None:
    """Do what its flaw says."""
    if payment.flaw is Flaw.REFUSED:
        raise PaymentRefused(f"payment {payment.number} is refused")
    if payment.flaw is Flaw.REFUSED_ONCE and payment.number not in _refused:
        _refused.add(payment.number)
        raise PaymentRefused(f"payment {payment.number} is refused for now")
    if payment.flaw is Flaw.REJECTED:
        raise Reject(f"payment {payment.number} is rejected")
    if payment.flaw is Flaw.DEADLY:
        os._exit(1)
