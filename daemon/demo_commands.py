"""``kafkasrcd demo``."""

from pathlib import Path

import click


@click.command()
@click.option("--brokers", metavar="HOST:PORT", help="Use this Kafka, unencrypted, instead of an embedded broker.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="End after so long; default: at Ctrl-C.")
@click.option("--rate", type=click.IntRange(1, 100_000), default=2_000, show_default=True, help="Orders a second.")
@click.option("--processes", type=click.IntRange(1, 64), help="Handler processes; default: one a core, at most 4.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo-output"),
    show_default=True,
    help="Where everything is written; a new or empty folder, or an earlier demo's.",
)
def demo(brokers: str | None, seconds: float | None, rate: int, processes: int | None, directory: Path) -> None:
    """Watch it work: a broker, a producer of orders, and the daemon that handles them, until Ctrl-C.

    Needs nothing but kafkasrcd. Afterwards it counts: orders produced, orders handled, offsets committed.
    """
    from kafkasrcd.daemon.demo import Demo, DemoOptions
    from kafkasrcd.daemon.demo_view import open_view

    options = DemoOptions(brokers=brokers, seconds=seconds, rate=rate, processes=processes, directory=directory)
    with open_view() as view:
        outcome = Demo(options, view).run()
    view.summary(outcome)
    outcome.check()
