"""A real schema registry for tests: Apicurio in memory, with the Confluent API at `url`."""

import json
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from tests import maven
from tests.kafka_broker import ReservedPort, launch_server
from tests.waiting import wait_until

APICURIO_VERSION = "3.0.9"
ARTIFACT = maven.Artifact("io.apicurio", "apicurio-registry-app", APICURIO_VERSION, "all", "tar.gz")
CACHE_FOLDER = f"apicurio-{APICURIO_VERSION}"

# Up in 3.5 s on an idle machine.
READY_DEADLINE_SECONDS = 90


def registry_missing() -> str | None:
    """None where the tests on a real registry can run, else one line that says what to install."""
    troubles = [maven.java_missing(), None if maven.is_fetched(CACHE_FOLDER) else maven.mvn_missing()]
    named = [trouble for trouble in troubles if trouble is not None]
    if not named:
        return None
    return (
        f"tests on a real schema registry need Java {maven.JAVA_NEEDED} or newer and Maven ({', '.join(named)}). "
        f"{maven.HOW_TO_INSTALL}"
    )


def fetch_registry() -> Path:
    """The folder with the registry, downloaded at the first call (108 MB). Raises MavenFailed."""
    return maven.fetch_archive(CACHE_FOLDER, ARTIFACT)


class RegistryServer:
    """Keeps its port while it is stopped; what it was told is gone then."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="kafkasrcd-registry-"))
        self._port = ReservedPort()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "RegistryServer":
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Of the Confluent API."""
        return f"http://127.0.0.1:{self._port.number}/apis/ccompat/v7"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        (jar,) = fetch_registry().rglob("apicurio-registry-app-*-runner.jar")
        command = [
            maven.java_command() or "java",
            "-Xmx400m",
            "-XX:TieredStopAtLevel=1",
            f"-Dquarkus.http.port={self._port.number}",
            "-Dquarkus.http.host=127.0.0.1",
            "-jar",
            str(jar),
        ]
        log = self._folder / "registry.log"
        process = self._process = launch_server(command, log)

        def answers() -> bool:
            assert process.poll() is None, f"the registry has ended:\n{log.read_text()[-3000:]}"
            self.get("/subjects")
            return True

        wait_until(answers, READY_DEADLINE_SECONDS, "the registry to answer", ignoring=(OSError,))

    def stop(self) -> None:
        """Kill it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.stop()
        self._port.__exit__()
        shutil.rmtree(self._folder, ignore_errors=True)

    def get(self, path: str) -> Any:
        """What it answers."""
        with urllib.request.urlopen(self.url + path, timeout=5) as response:
            return json.load(response)

    def register(
        self, subject: str, schema: str, kind: str = "AVRO", references: list[dict[str, Any]] | None = None
    ) -> int:
        """Register a schema, and return its id."""
        body = {"schema": schema, "schemaType": kind, "references": references or []}
        request = urllib.request.Request(
            f"{self.url}/subjects/{subject}/versions",
            json.dumps(body).encode(),
            {"Content-Type": "application/vnd.schemaregistry.v1+json"},
        )
        with urllib.request.urlopen(request, timeout=20) as response:
            number: int = json.load(response)["id"]
        return number
