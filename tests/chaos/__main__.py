"""`python -m tests.chaos`: storms on a real Kafka, one after the other, and a table of what they came to."""

import sys
from pathlib import Path

import click

from kafkasrcd.settings import CommitStrategy, Ordering
from tests.chaos.plan import BROKERS, draw_plan
from tests.chaos.report import TABLE_HEAD, StormReport
from tests.chaos.storm import Storm, StormStore
from tests.kafka_cluster import KafkaCluster, kafka_missing

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
@click.option("--keep", is_flag=True, help="Keep the logs also where nothing went wrong.")
def main(seed: int, seeds: str | None, minutes: float, strategy: str, ordering: str | None, keep: bool) -> None:
    """Faults at random, from a seed, while a producer goes on; then a proof of what was delivered."""
    missing = kafka_missing()
    if missing is not None:
        click.echo(missing, err=True)
        sys.exit(1)
    reports: list[StormReport] = []
    for number in _numbers(seed, seeds):
        order = Ordering(ordering) if ordering else ordering_of(number)
        for commit_strategy in STRATEGIES[strategy]:
            # A new cluster for each: what one storm has done to it is not what the next one is about.
            with KafkaCluster(brokers=BROKERS) as cluster:
                storm = Storm(
                    draw_plan(number, minutes * 60), cluster, commit_strategy, order, store=sqlite_store, keep=keep
                )
                reports.append(storm.run())
            click.echo("\n".join(reports[-1].lines()))
    click.echo("\n".join([*TABLE_HEAD, *(report.table_row for report in reports)]))
    sys.exit(1 if any(report.troubles for report in reports) else 0)


def ordering_of(seed: int) -> Ordering:
    """Which order the storm of `seed` is about."""
    return Ordering.PARTITION if seed % 2 else Ordering.KEY


def sqlite_store(folder: Path) -> StormStore:
    """The offsets in a file."""
    return StormStore(f"sqlite:///{folder / 'offsets.db'}", None)


def _numbers(seed: int, seeds: str | None) -> list[int]:
    if seeds is None:
        return [seed]
    first, _, last = seeds.partition("-")
    return list(range(int(first), int(last or first) + 1))


if __name__ == "__main__":
    main()
