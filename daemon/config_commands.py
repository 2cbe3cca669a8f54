"""``kafkasrcd config show`` and ``kafkasrcd config check``."""

from typing import TYPE_CHECKING

import click

from kafkasrcd.daemon.configuration_options import with_configuration

if TYPE_CHECKING:
    from kafkasrcd.daemon.configuration import Configuration


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
