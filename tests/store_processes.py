"""What the processes do that ``test_sqlite_store`` starts; importable by spawned processes."""

import os
import resource
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sqlalchemy import text

from kafkasrcd.errors import KafkasrcdError, StoreUnavailable
from kafkasrcd.storage.offset_store import Advance, OffsetStore, TopicPartition
from kafkasrcd.storage.opening import open_store
from kafkasrcd.storage.transaction import EffectsTransaction
from tests.awaited import Awaited

GROUP = "billing"
BUSY_TIMEOUT_MS = 10_000
PARTITIONS = [TopicPartition("orders", partition) for partition in range(50)]
CONTENDED = PARTITIONS[:5]
TURNS = 40
REOPEN_EVERY = 10
NOBODY = 65534
MOST_EFFECTS = 1_000_000

Epochs = dict[TopicPartition, list[int]]


def claim_and_advance(url: str, name: str, pipe: Connection) -> None:
    """Sends, for each partition, the epochs it was given and how many of its advances were accepted."""
    epochs: Epochs = {each: [] for each in CONTENDED}
    accepted = dict.fromkeys(CONTENDED, 0)
    pipe.recv()
    store = open_store(url, GROUP, BUSY_TIMEOUT_MS)
    for turn in range(TURNS):
        claims = store.claim(CONTENDED, name)
        for each, claim in claims.items():
            epochs[each].append(claim.assignment_epoch)
        refusals = store.advance(
            Advance(each, claim.assignment_epoch, (claim.next_offset or 0) + 1) for each, claim in claims.items()
        )
        for each in claims.keys() - refusals.keys():
            accepted[each] += 1
        if turn % REOPEN_EVERY == REOPEN_EVERY - 1:
            store.close()
            store = open_store(url, GROUP, BUSY_TIMEOUT_MS)
    store.close()
    pipe.send((epochs, accepted))


def advance_until_killed(url: str, pipe: Connection) -> None:
    """Moves all partitions together and sends the epoch first, then each offset that was recorded."""
    store = open_store(url, GROUP, BUSY_TIMEOUT_MS)
    claims = store.claim(PARTITIONS, "victim")
    pipe.send(claims[PARTITIONS[0]].assignment_epoch)
    next_offset = max(claim.next_offset or 0 for claim in claims.values())
    while True:
        next_offset += 1
        assert store.advance(Advance(each, claims[each].assignment_epoch, next_offset) for each in PARTITIONS) == {}
        pipe.send(next_offset)


def _advance_until_refused(store: OffsetStore, epochs: dict[TopicPartition, int], next_offset: int) -> tuple[int, str]:
    """The last offset that was recorded for all partitions, and why the next was not."""
    while True:
        try:
            assert store.advance(Advance(each, epochs[each], next_offset + 1) for each in PARTITIONS) == {}
        except StoreUnavailable as error:
            return next_offset, str(error)
        next_offset += 1


def _offsets_after(store: OffsetStore, epochs: dict[TopicPartition, int], next_offset: int) -> None:
    """What was recorded is whole, and recording goes on."""
    assert {row.next_offset for row in store.offsets()} == {next_offset}
    assert store.advance(Advance(each, epochs[each], next_offset + 1) for each in PARTITIONS) == {}
    assert {row.next_offset for row in store.offsets()} == {next_offset + 1}
    store.close()


def meet_the_file_size_limit(url: str, pipe: Connection) -> None:
    """Sends what the store said at the limit, after seeing it resume with the limit raised."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = open_store(url, GROUP, BUSY_TIMEOUT_MS)
    epochs = {each: claim.assignment_epoch for each, claim in store.claim(PARTITIONS, "limited").items()}
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    last, said = _advance_until_refused(store, epochs, 0)
    # Perhaps some more: opening anew empties the log into the database.
    last, said_again = _advance_until_refused(store, epochs, last)
    assert said_again == said
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    _offsets_after(store, epochs, last)
    pipe.send(said)


def write_until_the_file_size_limit(url: str, is_async: str, pipe: Connection) -> None:
    """Commits an effect and an offset at a time; sends what was said at the limit."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = open_store(url, GROUP, BUSY_TIMEOUT_MS, shared_with_effects=True)
    mine = store.claim(PARTITIONS[:1], "limited")[PARTITIONS[0]].assignment_epoch
    store.close()
    transaction = (Awaited if is_async else EffectsTransaction)(url, GROUP, BUSY_TIMEOUT_MS, 60.0)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))

    def write(number: int, tx: Any) -> None:
        tx.exec_driver_sql("INSERT INTO effects VALUES (?)", (number,))

    number = 0
    while True:
        number += 1
        try:
            transaction.call(write, number, "connection")
            assert transaction.commit([Advance(PARTITIONS[0], mine, number)]) == {}
        except StoreUnavailable as error:
            transaction.close()
            pipe.send(str(error))
            return


def handle_until_refused(url: str, number: str, pipe: Connection) -> None:
    """Commits effects with the offsets of one partition, and is in a transaction nearly all of the time. Sends how many
    it has committed, or what went wrong."""
    name, epoch = PARTITIONS[int(number)], pipe.recv()
    transaction = EffectsTransaction(url, GROUP, BUSY_TIMEOUT_MS, 60.0)

    def write(effect: int, tx: Any) -> None:
        tx.execute(text("INSERT INTO effects VALUES (:number)"), {"number": int(number) * MOST_EFFECTS + effect})

    committed = 0
    try:
        while True:
            transaction.call(write, committed, "connection")
            time.sleep(0.02)
            if transaction.commit([Advance(name, epoch, committed + 1)]):
                break
            committed += 1
    except Exception as error:
        pipe.send(repr(error))
    else:
        pipe.send(committed)
    transaction.close()


def take_one_turn(url: str, number: str, is_async: str, pipe: Connection) -> None:
    """Commits one effect, which says how many there were before, and sends that."""
    transaction = (Awaited if is_async else EffectsTransaction)(url, GROUP, BUSY_TIMEOUT_MS, 60.0)

    def write(_: object, tx: Any) -> int:
        before = tx.scalar(text("SELECT count(*) FROM effects"))
        tx.execute(text("INSERT INTO effects VALUES (:number)"), {"number": int(number)})
        return int(before)

    before = transaction.call(write, None, "connection")
    assert transaction.commit([]) == {}
    transaction.close()
    pipe.send(before)


def open_read_only(folder: str, folder_mode: str, pipe: Connection) -> None:
    """Sends what the store said to a user who may only read ``offsets.db`` in ``folder``, of that mode."""
    os.chdir(folder)
    open_store("sqlite:///warm-up.db", GROUP, BUSY_TIMEOUT_MS).close()  # Another user cannot import from a root's home.
    os.chmod(".", int(folder_mode, 8))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    try:
        open_store("sqlite:///offsets.db", GROUP, BUSY_TIMEOUT_MS)
    except KafkasrcdError as error:
        pipe.send((type(error).__name__, str(error)))
    else:
        pipe.send(("", "opened"))


def fill_a_disk(folder: Path) -> None:
    """Runs in a mount namespace of its own; prints what the store said with the disk full."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], check=True)
    store = open_store(f"sqlite:///{folder}/offsets.db", GROUP, BUSY_TIMEOUT_MS)
    epochs = {each: claim.assignment_epoch for each, claim in store.claim(PARTITIONS, "crowded").items()}
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(400_000))
    last, said = _advance_until_refused(store, epochs, 0)
    # Perhaps some more: opening anew empties the log into the database.
    last, said_again = _advance_until_refused(store, epochs, last)
    assert said_again == said
    ballast.unlink()
    _offsets_after(store, epochs, last)
    print(said)


if __name__ == "__main__":
    fill_a_disk(Path(sys.argv[1]))
