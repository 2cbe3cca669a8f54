"""The process of one target: `python -m tests.fuzz.process TARGET [FLAG | FILE | FOLDER]…`. Its files stay behind."""

import importlib
import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

_DEFAULTS = ("-max_len=65536", "-timeout=20", "-rss_limit_mb=2048", "-keep_seed=1")
"""Seeds are kept also where they cover nothing new: what is written in C and Rust is not instrumented."""
_INSTRUMENTED = ["kafkasrcd.workers", "kafkasrcd.message", "fastavro._read_py"]


def main(name: str, *arguments: str) -> None:
    """Does not return."""
    atheris: Any = importlib.import_module("atheris")  # it has no annotations
    with atheris.instrument_imports(include=_INSTRUMENTED):
        targets = importlib.import_module("tests.fuzz.targets")
    target, seeds = targets.TARGETS[name]()
    atheris.Setup([name, *_DEFAULTS, *arguments, *_seed_folders(seeds, arguments)], target)
    atheris.Fuzz()


def _seed_folders(seeds: list[bytes], arguments: tuple[str, ...]) -> list[str]:
    """What libFuzzer starts from, behind the folder for what it finds; none where it is to run a file."""
    paths = [Path(argument) for argument in arguments if not argument.startswith("-")]
    if any(path.is_file() for path in paths):
        return []
    folder = Path(mkdtemp())
    for number, seed in enumerate(seeds):
        (folder / f"seed-{number}").write_bytes(seed)
    return [str(folder)] if paths else [mkdtemp(), str(folder)]


if __name__ == "__main__":
    main(*sys.argv[1:])
