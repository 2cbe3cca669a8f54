"""What is shipped: everything of the four folders under one name, nothing else, and it works where it is installed."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
NOT_PACKAGES = {"tests", "systemd", "examples", "docs", "build", "dist"}
HEAVY = ("sqlalchemy", "click", "confluent_kafka", "rich", "pydantic", "psutil", "asyncio")

LAYERS = ("kafkasrcd", "kafkasrcd.storage", "kafkasrcd.workers", "kafkasrcd.daemon")
"""Each may import itself and what stands before it."""

WITHOUT_DECLARATION = {"pydantic"}
"""Used only where the user's own handler has imported it."""
BY_NAME = {"aiosqlite", "grpcio_tools"}
"""Loaded by SQLAlchemy, for a URL that names it; run as a program."""
DISTRIBUTIONS = {"google": "protobuf"}
"""Modules that are not called as what brings them."""
OF_EXTRAS = {f"kafkasrcd.workers.{name}_format" for name in ("avro", "protobuf", "json_schema")}
"""Loaded by workers of topics that have such a format."""


class Built(NamedTuple):
    tree: Path
    """A copy of the source, from which it was built."""
    sdist: Path
    wheel: Path
    wheel_from_sdist: Path


class Import(NamedTuple):
    line: int
    module: str


def run(*command: str | Path, cwd: Path) -> str:
    """Its output; the test's failure shows what it said."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def setuptools_table() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return table


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both distributions, built from a copy: a build leaves folders in its tree."""
    folder = tmp_path_factory.mktemp("a build")
    tree = folder / "source tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", ".*_cache", "*.egg-info"))
    run(sys.executable, "-m", "build", "--outdir", folder / "from sdist", tree, cwd=folder)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "from tree", tree, cwd=folder)
    (sdist,) = (folder / "from sdist").glob("*.tar.gz")
    (wheel_from_sdist,) = (folder / "from sdist").glob("*.whl")
    (wheel,) = (folder / "from tree").glob("*.whl")
    return Built(tree, sdist, wheel, wheel_from_sdist)


@pytest.fixture(scope="session")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of executables of a new environment that has the wheel and what it depends on."""
    folder = tmp_path_factory.mktemp("a new environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", built.wheel, cwd=folder)
    return folder / "bin"


def code_folders() -> dict[str, Path]:
    """Package name to folder, of every folder of the tree that holds Python and is not tests or the like."""
    found = {"kafkasrcd": ROOT / "daemon" / "public"}
    for top in ROOT.iterdir():
        if top.is_dir() and not top.name.startswith(".") and top.name not in NOT_PACKAGES:
            for folder in sorted({path.parent for path in top.rglob("*.py")} - {found["kafkasrcd"]}):
                found[".".join(("kafkasrcd", *folder.relative_to(ROOT).parts))] = folder
    return found


def files_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_every_code_folder_is_named(setuptools_table: dict[str, Any]) -> None:
    folders = {name: str(folder.relative_to(ROOT)) for name, folder in code_folders().items()}
    assert set(setuptools_table["packages"]) == set(folders)
    assert setuptools_table["package-dir"] == folders


def test_the_wheel_has_every_module_and_nothing_else(built: Built) -> None:
    expected = {"kafkasrcd/py.typed"}
    for package, folder in code_folders().items():
        sources = built.tree / folder.relative_to(ROOT)
        expected |= {f"{package.replace('.', '/')}/{path.name}" for path in sources.glob("*.py")}
    assert {name for name in files_in(built.wheel) if ".dist-info/" not in name} == expected


def test_the_wheel_from_the_sdist_is_the_same(built: Built) -> None:
    assert files_in(built.wheel_from_sdist) == files_in(built.wheel)


def test_the_sdist_has_the_unit_and_no_tests(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"systemd/kafkasrcd.service", "LICENSE", "README.md", "pyproject.toml"} <= names
    assert not {name for name in names if name.startswith("tests")}


def test_works_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run(installed / "kafkasrcd", "--version", cwd=tmp_path) == f"kafkasrcd {version}\n"
    run(installed / "kafkasrcd", "init", cwd=tmp_path)
    assert {"kafkasrcd.toml", "handlers.py"} <= {path.name for path in tmp_path.iterdir()}
    run(installed / "python", "-c", "from kafkasrcd import Message", cwd=tmp_path)
    run(installed / "python", "-m", "pip", "check", cwd=tmp_path)


def test_every_module_imports_where_it_is_installed(installed: Path, built: Built, tmp_path: Path) -> None:
    """With what the wheel declares, and nothing that only a developer has; what needs an extra says so elsewhere."""
    names = {name.removesuffix(".py").replace("/", ".") for name in files_in(built.wheel) if name.endswith(".py")}
    assert names > OF_EXTRAS
    program = f"import importlib\nfor name in {sorted(names - OF_EXTRAS)!r}: importlib.import_module(name)"
    run(installed / "python", "-W", "error", "-c", program, cwd=tmp_path)


@pytest.mark.parametrize("module", ["kafkasrcd", "kafkasrcd.message", "kafkasrcd.errors", "kafkasrcd.settings"])
def test_the_public_root_imports_nothing_heavy(module: str, tmp_path: Path) -> None:
    program = f"import sys, {module}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    assert run(sys.executable, "-c", program, cwd=tmp_path).split() == []


# ── Which way imports go ─────────────────────────────────────────────────────────────────────────────────────────────


def modules() -> dict[str, Path]:
    return {
        package if path.stem == "__init__" else f"{package}.{path.stem}": path
        for package, folder in code_folders().items()
        for path in sorted(folder.glob("*.py"))
    }


def imports_of(path: Path) -> Iterator[Import]:
    """All of them: in functions, under TYPE_CHECKING, and names of modules in strings too."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (Import(node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=str(module), level=0, names=names):
                yield from (Import(node.lineno, f"{module}.{alias.name}") for alias in names)
            case ast.ImportFrom():
                raise AssertionError(f"{path}:{node.lineno}: a relative import")
            case ast.Constant(value=str(text)) if re.fullmatch(r"kafkasrcd(\.\w+)+(:\w+)?", text):
                yield Import(node.lineno, text.partition(":")[0])
            case _:
                pass


def layer_of(module: str) -> int:
    """Its place in LAYERS."""
    return max((place for place, name in enumerate(LAYERS[1:], 1) if f"{module}.".startswith(f"{name}.")), default=0)


@pytest.mark.parametrize("module", [module for module in modules() if module != "kafkasrcd"])
def test_imports_go_one_way(module: str) -> None:
    """But for the package's own front, which names what others have, and loads it when it is asked for."""
    path = modules()[module]
    upwards = [
        f"{path.relative_to(ROOT)}:{line}: {imported}"
        for line, imported in imports_of(path)
        if imported.partition(".")[0] == "kafkasrcd" and layer_of(imported) > layer_of(module)
    ]
    assert upwards == []


def test_the_direction_would_be_seen(tmp_path: Path) -> None:
    """The test above is not blind: it sees an import inside a function, and one by name."""
    source = tmp_path / "wrong.py"
    source.write_text(
        "def later():\n    from kafkasrcd.daemon import status\n    load('kafkasrcd.workers.ring:Ring')\n"
        "import kafkasrcd.storage.opening, os\nfrom kafkasrcd import daemon\n"
    )
    assert [layer_of(imported) for _, imported in sorted(imports_of(source))] == [3, 2, 1, 0, 3]


def test_nothing_is_imported_that_is_not_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [
        dependency for name, some in project["optional-dependencies"].items() if name != "dev" for dependency in some
    ]
    declared = {
        re.split(r"[^\w-]", dependency)[0].replace("-", "_") for dependency in [*project["dependencies"], *extras]
    }
    roots = {imported.partition(".")[0] for path in modules().values() for _, imported in imports_of(path)}
    used = {DISTRIBUTIONS.get(root, root) for root in roots}
    assert used - sys.stdlib_module_names - {"kafkasrcd"} - WITHOUT_DECLARATION == declared - BY_NAME
