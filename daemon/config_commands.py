"""``kafkasrcd config show`` and ``kafkasrcd config check``."""

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from kafkasrcd.daemon.configuration_options import configuration_options, with_configuration
from kafkasrcd.daemon.exit_codes import ExitCode
from kafkasrcd.daemon.seconds_option import checked_seconds
from kafkasrcd.errors import ConfigurationError

if TYPE_CHECKING:
    from kafkasrcd.daemon.configuration import Configuration
    from kafkasrcd.daemon.finding import Finding
    from kafkasrcd.workers.handler_target import HandlerTargets


@click.group()
def config() -> None:
    """Show or check the configuration."""


@config.command()
@click.option("--json", "as_json", is_flag=True, help="An object with the value and origin of each setting.")
@with_configuration()
def show(configuration: "Configuration", as_json: bool) -> None:
    """Print every setting in effect and where it comes from. Secrets are hidden."""
    from kafkasrcd.daemon import configuration_view

    render = configuration_view.as_json if as_json else configuration_view.as_toml
    click.echo(render(configuration))
    for warning in configuration.warnings:
        click.echo(f"kafkasrcd: warning: {warning}", err=True)


@config.command()
@click.option(
    "--timeout",
    "timeout_seconds",
    type=float,
    callback=checked_seconds,
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the broker.",
)
@click.option("--offline", is_flag=True, help="Do not ask the broker.")
@click.pass_context
@configuration_options
def check(
    load_configuration: Callable[..., "Configuration"],
    context: click.Context,
    timeout_seconds: float,
    offline: bool,
) -> None:
    """Check settings, handlers and the broker, and say what to do.

    Imports the handlers' modules. Joins no group and changes nothing. Exits with 78 where the configuration cannot
    work, with 69 where the broker cannot be reached.
    """
    from kafkasrcd.daemon.finding import exit_code

    findings: list[Finding] = []
    for finding in _findings(load_configuration, None if offline else timeout_seconds):
        findings.append(finding)
        _print(finding)
    context.exit(exit_code(findings))


def _findings(load_configuration: Callable[..., "Configuration"], timeout_seconds: float | None) -> "Iterator[Finding]":
    """Each thing looked at, as soon as it is known."""
    from kafkasrcd.daemon.finding import Finding, Outcome

    try:
        configuration = load_configuration()
    except ConfigurationError as error:
        for line in str(error).splitlines():
            yield Finding(Outcome.BAD, line, exit_code=ExitCode.CONFIG)
        return
    for warning in configuration.warnings:
        yield Finding(Outcome.NOTE, warning)
    yield Finding(Outcome.GOOD, f"settings from {configuration.path or 'the environment and the command line'} fit")

    targets = None
    try:
        targets = load_handlers(configuration)
    except ConfigurationError as error:
        yield Finding(Outcome.BAD, str(error), exit_code=ExitCode.CONFIG)
    else:
        for target in targets.all():
            yield Finding(Outcome.GOOD, f"handler {target.name} can be called")

    if timeout_seconds is None:
        return
    from kafkasrcd.daemon.broker_check import check_broker

    answer = check_broker(configuration.settings, timeout_seconds)
    yield from answer.findings
    if configuration.settings.schema_registry.url:
        yield _registry_finding(configuration)
    if targets is None:
        return
    from kafkasrcd.workers.formats import Formats

    formats = Formats(configuration.settings)
    for topic in answer.partitions:
        try:
            targets.for_topic(topic).reading(formats.value(topic))
        except ConfigurationError as error:
            yield Finding(Outcome.BAD, str(error), exit_code=ExitCode.CONFIG)


def _registry_finding(configuration: "Configuration") -> "Finding":
    from kafkasrcd.daemon.finding import Finding, Outcome
    from kafkasrcd.workers.schema_document import RegistryAway
    from kafkasrcd.workers.schema_registry import SchemaRegistry

    registry = SchemaRegistry(configuration.settings.schema_registry, configuration.base_directory)
    try:
        registry.check()
    except RegistryAway as error:
        return Finding(
            Outcome.BAD,
            f"no schema registry answers: {error}",
            "start it, or check schema_registry; records of schemas that are not known yet would wait",
            ExitCode.UNAVAILABLE,
        )
    return Finding(Outcome.GOOD, f"the schema registry at {registry.name} answers")


def load_handlers(configuration: "Configuration") -> "HandlerTargets":
    """Import the handlers and check their signatures, as the handler processes will. Raises ConfigurationError."""
    from kafkasrcd.settings import CommitStrategy
    from kafkasrcd.workers.formats import Formats
    from kafkasrcd.workers.handler_target import load_targets

    settings = configuration.settings
    in_transactions = settings.commit_strategy is CommitStrategy.ON_CHECKPOINT
    return load_targets(
        settings.handler,
        configuration.base_directory,
        in_transactions=in_transactions,
        formats=Formats(settings),
    )


def _print(finding: "Finding") -> None:
    from kafkasrcd.daemon.finding import Outcome

    marks = {Outcome.GOOD: "✓", Outcome.NOTE: "!", Outcome.BAD: "✗"}
    try:
        "".join(marks.values()).encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        marks = {Outcome.GOOD: "ok  ", Outcome.NOTE: "note", Outcome.BAD: "BAD "}
    colors = {Outcome.GOOD: "green", Outcome.NOTE: "yellow", Outcome.BAD: "red"}
    line = finding.line({outcome: click.style(mark, fg=colors[outcome]) for outcome, mark in marks.items()})
    click.echo("\n  ".join(line.splitlines()))
