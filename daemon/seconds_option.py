"""Options that are a time to wait: ``type=float, callback=checked_seconds``."""

import click


def checked_seconds(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """The value, where it is above 0 and up to 3600, or not given at all."""
    if value is not None and not 0 < value <= 3_600:  # which "nan" is not either
        raise click.BadParameter("expected seconds above 0 and up to 3600")
    return value
