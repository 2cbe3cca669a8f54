"""What `handlers.pay` leaves in PostgreSQL: the tables, and what is in them."""

from tests.chaos.handling import Handling
from tests.chaos.payment import Flaw, Payment
from tests.ledger import Coordinate
from tests.postgres import PostgresServer

_TABLES = (
    # No key on (partition, record_offset): a second effect of a record must be possible to be found. `id` tells the
    # order: a partition's next owner begins after the one before has committed, so its identifiers are larger.
    "CREATE TABLE payments (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, partition int NOT NULL,"
    " record_offset bigint NOT NULL, account text NOT NULL, number bigint NOT NULL, amount bigint NOT NULL,"
    " flaw text NOT NULL, at_ns bigint NOT NULL, daemon int NOT NULL, pid int NOT NULL)",
    "CREATE TABLE balances (account text PRIMARY KEY, total bigint NOT NULL)",
)


def create_tables(server: PostgresServer, database: str) -> None:
    """Empty ones, in the database that has the offsets as well."""
    for table in _TABLES:
        server.execute(table, database)


def handlings_in_table(server: PostgresServer, database: str) -> list[Handling]:
    """Every effect that was committed, in the order in which they were made."""
    rows = server.execute(
        "SELECT partition, record_offset, number, account, amount, flaw, id, at_ns, daemon, pid"
        " FROM payments ORDER BY id",
        database,
    )
    return [
        Handling(
            Coordinate(partition, offset),
            Payment(number, account, amount, Flaw(flaw)),
            order,
            at_ns,
            daemon,
            pid,
            f"process {pid}",
        )
        for partition, offset, number, account, amount, flaw, order, at_ns, daemon, pid in rows
    ]


def balances(server: PostgresServer, database: str) -> dict[str, int]:
    """What each account has."""
    return dict(server.execute("SELECT account, total::bigint FROM balances", database))
