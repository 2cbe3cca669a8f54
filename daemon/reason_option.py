"""The option ``--reason`` of commands that change what others will ask about."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from kafkasrcd.storage.dead_letters import as_text

R = TypeVar("R")


def reason_option(help_text: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """``reason``: some words, as every database takes them."""
    option: Callable[[Any], Any] = click.option("--reason", required=True, callback=_words, help=help_text)
    return option


def _words(context: click.Context, option: click.Parameter, text: str) -> str:
    if not text.strip():
        raise click.BadParameter("expected some words")
    return as_text(text.strip())
