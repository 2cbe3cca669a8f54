"""Java programs for tests: Maven artifacts with their dependencies, downloaded once into a cache folder."""

import fcntl
import functools
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

# Kafka 4 brokers need 17; so does the schema registry.
JAVA_NEEDED = 17
# A first download over a slow line. With a filled Maven repository it takes 4-6 s.
MAVEN_DEADLINE_SECONDS = 600

HOW_TO_INSTALL = (
    "Debian/Ubuntu: apt install default-jre-headless maven | "
    "Fedora: dnf install java-latest-openjdk-headless maven | "
    "macOS: brew install openjdk maven"
)


class MavenFailed(Exception):
    """Maven could not bring the artifacts; the message ends with what it printed."""


class Artifact(NamedTuple):
    """One artifact by its Maven coordinates."""

    group: str
    name: str
    version: str
    classifier: str | None = None
    type: str = "jar"

    def as_xml(self) -> str:
        """The `<dependency>` element of a pom."""
        fields = {"groupId": self.group, "artifactId": self.name, "version": self.version, "type": self.type}
        if self.classifier is not None:
            fields["classifier"] = self.classifier
        return "<dependency>" + "".join(f"<{k}>{escape(v)}</{k}>" for k, v in fields.items()) + "</dependency>"


def cache_root() -> Path:
    """Where downloads for tests are kept: `$KAFKASRCD_TEST_CACHE`, or `~/.cache/kafkasrcd-tests`."""
    configured = os.environ.get("KAFKASRCD_TEST_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "kafkasrcd-tests"


def java_command() -> str | None:
    """The java that runs the servers: `$JAVA_HOME/bin/java`, else the first on the path, else None."""
    java_home = os.environ.get("JAVA_HOME")
    if java_home and (java := shutil.which("java", path=str(Path(java_home, "bin")))):
        return java
    return shutil.which("java")


def java_missing() -> str | None:
    """None where a Java that is new enough works, else what is wrong with it, in a few words."""
    java = java_command()
    if java is None:
        return "no java"
    version = _java_version(java)
    if version is None:
        return f"{java} does not run"
    if version < JAVA_NEEDED:
        return f"{java} is Java {version}"
    return None


def mvn_missing() -> str | None:
    """None where Maven is on the path, else "no mvn"."""
    return None if shutil.which("mvn") else "no mvn"


@functools.cache
def _java_version(java: str) -> int | None:
    # macOS has a /usr/bin/java that only says where to download one: being on the path proves nothing.
    try:
        result = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r'version "(\d+)', result.stderr + result.stdout)
    return int(match[1]) if match else None


def is_fetched(folder_name: str) -> bool:
    """Whether `fetch` has filled this folder before, so that Maven and a network are not needed."""
    return (cache_root() / folder_name).is_dir()


def fetch(folder_name: str, artifacts: Sequence[Artifact]) -> Path:
    """The cache folder with these artifacts and all they depend on; downloaded by Maven at the first call.

    The folder is complete or absent, also when the process dies halfway or several run this at once: the download
    goes beside it under a file lock and is renamed into place. Blocks for the download, or for another process's.
    Raises MavenFailed.
    """
    return _filled(folder_name, lambda project: _copy_dependencies(project, artifacts))


def fetch_archive(folder_name: str, artifact: Artifact) -> Path:
    """As `fetch`: the cache folder with what is in this artifact, a tar, without what it depends on."""

    def fill(project: Path) -> None:
        coordinates = f"{artifact.group}:{artifact.name}:{artifact.version}:{artifact.type}:{artifact.classifier}"
        _maven(project, "dependency:copy", f"-Dartifact={coordinates}", f"-DoutputDirectory={project / 'tar'}")
        (archive,) = Path(project, "tar").iterdir()
        with tarfile.open(archive) as tar:
            tar.extractall(project / "lib", filter="data")

    return _filled(folder_name, fill)


def _filled(folder_name: str, fill: Callable[[Path], None]) -> Path:
    folder = cache_root() / folder_name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder_name}.lock")):
        if folder.is_dir():  # another process was faster
            return folder
        prefix = f".{folder_name}-partial-"
        for abandoned in folder.parent.glob(f"{prefix}*"):  # whoever wrote it died: we hold the lock
            shutil.rmtree(abandoned, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as partial:
            fill(Path(partial))
            os.rename(Path(partial, "lib"), folder)
    return folder


@contextmanager
def _locked(path: Path) -> Generator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it with the process, however that ends
        yield


def _copy_dependencies(project: Path, artifacts: Sequence[Artifact]) -> None:
    """Run Maven on a pom made for these artifacts; they arrive in `project`/lib."""
    dependencies = "\n".join(artifact.as_xml() for artifact in artifacts)
    Path(project, "pom.xml").write_text(
        '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>\n'
        "<groupId>kafkasrcd.tests</groupId><artifactId>servers</artifactId><version>1</version>\n"
        f"<dependencies>\n{dependencies}\n</dependencies></project>\n"
    )
    _maven(project, "dependency:copy-dependencies", f"-DoutputDirectory={project / 'lib'}")


def _maven(project: Path, *words: str) -> None:
    mvn = shutil.which("mvn")
    if mvn is None:
        raise MavenFailed(f"no mvn on the path. {HOW_TO_INSTALL}")
    command = [mvn, "-q", "-B", *words]
    try:
        result = subprocess.run(
            command,
            cwd=project,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=MAVEN_DEADLINE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MavenFailed(f"{' '.join(command)} took longer than {MAVEN_DEADLINE_SECONDS} s") from error
    if result.returncode != 0:
        raise MavenFailed(f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout[-3000:]}")
