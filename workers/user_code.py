"""Classes of the user's own, found by name."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class UserCodeError(Exception):
    """The class cannot be used; the message says why, and what would be right."""


class TwoHalves(Protocol):
    """What ``custom:package.module:Class`` has."""

    def prepare(self, raw: bytes) -> bytes: ...
    def build(self, prepared: bytes) -> Any: ...


def add_to_path(folders: Sequence[str], base_directory: Path) -> None:
    """Have modules looked for in ``folders``, relative to ``base_directory``, first."""
    for entry in reversed(folders):
        folder = str((base_directory / entry).resolve())
        if folder in sys.path:
            sys.path.remove(folder)
        sys.path.insert(0, folder)


def load_deserializer(name: str) -> TwoHalves:
    """An object of the class ``package.module:Class``; runs the user's code. Raises UserCodeError."""
    module_name, _, class_name = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in class_name.split("."):
            found = getattr(found, part)
        made: Any = found()
    except (Exception, SystemExit) as error:
        raise UserCodeError(f"{name!r} cannot be used: {type(error).__name__}: {error}") from error
    missing = [half for half in ("prepare", "build") if not callable(getattr(made, half, None))]
    if missing:
        raise UserCodeError(
            f"{name!r} has no {' and no '.join(missing)}: it needs prepare(bytes) -> bytes, for the worker, and "
            "build(bytes), for the handler; kafkasrcd.Deserializer has both"
        )
    return made  # type: ignore[no-any-return]
