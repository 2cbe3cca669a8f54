"""`python -m tests.chaos`: storms on a real Kafka, one after the other, and a table of what they came to."""

import sys
from collections.abc import Generator
from contextlib import contextmanager

import click

from kafkasrcd.settings import CommitStrategy, Ordering
from tests.chaos.plan import BROKERS, draw_plan
from tests.chaos.report import TABLE_HEAD, StormReport
from tests.chaos.storm import Storm
from tests.kafka_cluster import KafkaCluster, kafka_missing
from tests.postgres import PostgresServer, postgres_missing

STRATEGIES = {
    "on_checkpoint": (CommitStrategy.ON_CHECKPOINT,),
    "periodic": (CommitStrategy.PERIODIC,),
    "both": (CommitStrategy.ON_CHECKPOINT, CommitStrategy.PERIODIC),
}


@click.command()
@click.option("--seed", type=int, default=1, show_default=True, help="Which storm.")
@click.option("--seeds", help="Several, as in 1-10; over --seed.")
@click.option("--minutes", type=float, default=3.0, show_default=True, help="How long each storm lasts.")
@click.option("--strategy", type=click.Choice(list(STRATEGIES)), default="both", show_default=True)
@click.option("--ordering", type=click.Choice(["partition", "key"]), help="By partition with odd seeds, else by key.")
@click.option(
    "--store",
    type=click.Choice(["postgresql", "sqlite"]),
    default="postgresql",
    show_default=True,
    help="sqlite: with periodic only, and without faults of the store.",
)
@click.option("--keep", is_flag=True, help="Keep the logs also where nothing went wrong.")
def main(
    seed: int, seeds: str | None, minutes: float, strategy: str, ordering: str | None, store: str, keep: bool
) -> None:
    """Faults at random, from a seed, while a producer goes on; then a proof of what was delivered."""
    missing = kafka_missing() or (postgres_missing() if store == "postgresql" else None)
    if missing is not None:
        click.echo(missing, err=True)
        sys.exit(1)
    if store == "sqlite" and strategy != "periodic":
        raise click.UsageError("with --store sqlite, --strategy can only be periodic")
    reports: list[StormReport] = []
    for number in _numbers(seed, seeds):
        order = Ordering(ordering) if ordering else ordering_of(number)
        for commit_strategy in STRATEGIES[strategy]:
            # A new cluster for each: what one storm has done to it is not what the next one is about.
            with KafkaCluster(brokers=BROKERS) as cluster, _server(store) as postgres:
                plan = draw_plan(number, round(minutes * 60, 2))  # as the command to do it again has it
                reports.append(Storm(plan, cluster, commit_strategy, order, postgres=postgres, keep=keep).run())
            click.echo("\n".join(reports[-1].lines()))
    click.echo("\n".join([*TABLE_HEAD, *(report.table_row for report in reports)]))
    sys.exit(1 if any(report.troubles for report in reports) else 0)


def ordering_of(seed: int) -> Ordering:
    """Which order the storm of `seed` is about."""
    return Ordering.PARTITION if seed % 2 else Ordering.KEY


@contextmanager
def _server(store: str) -> Generator[PostgresServer | None]:
    if store == "sqlite":
        yield None
        return
    with PostgresServer() as server:
        yield server


def _numbers(seed: int, seeds: str | None) -> list[int]:
    if seeds is None:
        return [seed]
    first, _, last = seeds.partition("-")
    return list(range(int(first), int(last or first) + 1))


if __name__ == "__main__":
    main()
