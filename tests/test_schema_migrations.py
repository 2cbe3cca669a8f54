"""What is shipped can migrate: Alembic looks for its revisions in a folder, which a wheel might lack."""

import json
import os
import shutil
import sqlite3
import sys
import zipfile
from contextlib import closing
from pathlib import Path

import pytest

from tests.test_migrations import BEFORE_ALEMBIC
from tests.test_packaging import ROOT, run

OPEN = """
import json, sys
import kafkasrcd.storage.opening as opening
store = opening.open_store(sys.argv[1], "billing", 5000)
rows = [[str(row.topic_partition), row.assignment_epoch, row.next_offset] for row in store.offsets()]
store.close()
print(json.dumps([opening.__file__, rows]))
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's contents; what it depends on is where the tests run."""
    folder = tmp_path_factory.mktemp("wheel % of a build")  # a name that Alembic's settings would interpolate
    left_out = shutil.ignore_patterns(".git", ".venv", ".*_cache", "*.egg-info", ".hypothesis")
    shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=left_out)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "built", folder / "tree", cwd=folder)
    (wheel,) = (folder / "built").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.parametrize("script", ["", BEFORE_ALEMBIC], ids=["from nothing", "from before migrations"])
def test_an_installed_wheel_migrates(
    unpacked: Path, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(sqlite3.connect(tmp_path / "offsets.db")) as before:
        before.executescript(script)
    monkeypatch.setenv("PYTHONPATH", str(unpacked))
    said = run(sys.executable, "-W", "error", "-c", OPEN, f"sqlite:///{tmp_path}/offsets.db", cwd=tmp_path)
    where, rows = json.loads(said)
    assert Path(where).is_relative_to(unpacked), os.environ["PYTHONPATH"]
    assert rows == ([["orders[0]", 7, 120], ["orders[1]", 3, None]] if script else [])
