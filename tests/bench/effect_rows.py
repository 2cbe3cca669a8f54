"""kafkasrcd's rows with `on_checkpoint`: from the first committed record to the last, counted in the database."""

import time
from contextlib import AbstractContextManager

from sqlalchemy.exc import OperationalError, ProgrammingError

from kafkasrcd.storage.schema import offsets
from tests.bench.effects import (
    BATCH,
    committed,
    connect,
    postgres_database,
    require_exactly_once,
    sqlite_database,
)
from tests.bench.result import BenchResult, Workload
from tests.bench.running_daemon import DEADLINE_SECONDS, running_daemon
from tests.kafka_cluster import KafkaCluster
from tests.waiting import wait_until


def run_sqlite(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """One writer at a time: processes take turns."""
    return _run("SQLite", sqlite_database(), cluster, workload)


def run_postgres(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """A transaction in each process."""
    return _run("PostgreSQL", postgres_database(), cluster, workload)


def _run(name: str, database: AbstractContextManager[str], cluster: KafkaCluster, workload: Workload) -> BenchResult:
    wanted = workload.effect_messages
    with database as url:
        engine = connect(url)
        settings = {
            "commit_strategy": "on_checkpoint",
            "checkpoint_max_messages": workload.checkpoint_messages,
            "handler.batch_max_messages": BATCH,
            "store.url": url,
        }
        with running_daemon("effect_handlers:insert_effects", cluster, workload, settings) as daemon:

            def done() -> int:
                daemon.require_running()
                return committed(engine, offsets)

            # Before the daemon has made its tables there are none.
            before = wait_until(
                done,
                DEADLINE_SECONDS,
                "the first commit",
                seen=daemon.log_end,
                ignoring=(OperationalError, ProgrammingError),
            )
            started, cpu_started = time.monotonic(), daemon.cpu_seconds()
            wait_until(lambda: done() >= wanted, DEADLINE_SECONDS, f"{wanted} effects", seen=daemon.log_end)
            result = BenchResult(
                name=f"kafkasrcd, on_checkpoint in {name}",
                messages=done() - before,
                seconds=time.monotonic() - started,
                cpu_seconds=daemon.cpu_seconds() - cpu_started,
                processes=daemon.process_count(),
                worker_pss_mb=daemon.worker_pss_mb(),
            )
        require_exactly_once(engine, offsets)
        engine.dispose()
        return result
