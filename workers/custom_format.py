"""A format of the user's: the worker's half of ``custom:package.module:Class``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.workers.formats import Format
from kafkasrcd.workers.user_code import UserCodeError, add_to_path, load_deserializer


class CustomPreparer:
    """Calls the user's ``prepare``."""

    def __init__(self, form: Format, path: Sequence[str], base_directory: Path) -> None:
        add_to_path(path, base_directory)
        try:
            self._prepare = load_deserializer(form.deserializer).prepare
        except UserCodeError as error:
            raise ConfigurationError(f"{form.setting}: {error}") from error.__cause__

    def need(self, raw: bytes, header: bytes = b"") -> None:
        """Nothing is needed."""

    def prepare(self, raw: bytes, header: bytes = b"") -> bytes:
        """What the user's class makes of ``raw``."""
        prepared: Any = self._prepare(raw)
        if type(prepared) is not bytes:
            raise TypeError(f"prepare returned {type(prepared).__name__}, not bytes")
        return prepared
