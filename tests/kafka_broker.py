"""One Apache Kafka broker as a child process: its settings, its ports, its signals, its log."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tests import maven

KAFKA_VERSION = "4.3.1"
ARTIFACTS = (
    maven.Artifact("org.apache.kafka", "kafka_2.13", KAFKA_VERSION),
    maven.Artifact("org.apache.kafka", "kafka-tools", KAFKA_VERSION),
    # Kafka logs to slf4j 1.7 and ships log4j 2.25.4 without what joins the two.
    maven.Artifact("org.apache.logging.log4j", "log4j-slf4j-impl", "2.25.4"),
)
CACHE_FOLDER = f"kafka-{KAFKA_VERSION}"

FORMAT_DEADLINE_SECONDS = 60
# A clean stop syncs every log and hands leadership over; a loaded machine with two cores needs a few seconds.
STOP_DEADLINE_SECONDS = 60
LOG_TAIL_BYTES = 4000

# Marks the processes a test started (conftest.py). A broker outlives the test that restarts it, so it is not marked.
TEST_MARK_VARIABLE = "KAFKASRCD_TEST_MARK"

# Becomes java after asking the kernel for SIGKILL at the parent's death: a preexec_fn would run Python between fork
# and exec in a process with librdkafka's threads. The parent may have died before prctl: then there is nobody to serve.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""

# PR_SET_PDEATHSIG means the death of the *thread* that forked. All brokers are started by this one, which lives as
# long as the process, so that a test may restart a broker from a thread of its own.
_launcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kafka-launcher")

_LOG4J = """
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{HH:mm:ss.SSS} %-5p %c{1}: %m%n
rootLogger.level = INFO
rootLogger.appenderRef.console.ref = console
"""


class KafkaFailed(Exception):
    """A broker did not do what was asked of it; the message ends with the tail of its log."""


def kafka_missing() -> str | None:
    """None where the tests on a real Kafka can run, else one line that says what to install."""
    java_trouble = maven.java_missing()
    # Maven is needed only to fill the cache.
    maven_trouble = None if maven.is_fetched(CACHE_FOLDER) else maven.mvn_missing()
    troubles = [trouble for trouble in (java_trouble, maven_trouble) if trouble is not None]
    if not troubles:
        return None
    return (
        f"tests on a real Kafka need Java {maven.JAVA_NEEDED} or newer and Maven "
        f"({', '.join(troubles)}). {maven.HOW_TO_INSTALL}"
    )


def fetch_kafka() -> Path:
    """The folder with Kafka's jars, downloaded at the first call (54 MB). Raises MavenFailed."""
    return maven.fetch(CACHE_FOLDER, ARTIFACTS)


def launch_server(command: Sequence[str], log_path: Path) -> subprocess.Popen[bytes]:
    """Start a server that ends with this process, however that ends, and is no test's own; its output is appended."""
    guard = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
    environment = {name: value for name, value in os.environ.items() if name != TEST_MARK_VARIABLE}

    def launch() -> subprocess.Popen[bytes]:
        with log_path.open("ab") as log:
            # Its own session: Ctrl-C in the terminal is for pytest, which then stops the servers in order.
            return subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    return _launcher.submit(launch).result()


class ReservedPort:
    """A free port on 127.0.0.1 that stays ours for as long as this object is open, also while no broker listens.

    A bound socket that never listens keeps the kernel from giving the port to anyone else, and SO_REUSEADDR on both
    sides lets the broker bind it all the same. Without it, a client that retries a stopped broker can be given that
    very port as its own and connect to itself, and then the broker cannot come back.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: int = self._socket.getsockname()[1]

    def __enter__(self) -> "ReservedPort":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()


class KafkaBroker:
    """A broker and controller in one process. It keeps its ports and its data from start to start."""

    def __init__(self, node_id: int, folder: Path, java_options: Sequence[str]) -> None:
        self.node_id = node_id
        self.folder = folder
        self.log_path = folder / "broker.log"
        self._properties_path = folder / "server.properties"
        self._log4j_path = folder / "log4j2.properties"
        self._java_options = tuple(java_options)
        self._process: subprocess.Popen[bytes] | None = None
        with ExitStack() as ports:
            self.port = ports.enter_context(ReservedPort()).number
            self.controller_port = ports.enter_context(ReservedPort()).number
            self._ports = ports.pop_all()
        folder.mkdir(parents=True)

    @property
    def address(self) -> str:
        """`host:port` for clients."""
        return f"127.0.0.1:{self.port}"

    @property
    def is_running(self) -> bool:
        """Whether the process exists; it may still be starting, or frozen."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the running process. Raises KafkaFailed where there is none."""
        return self._running().pid

    def format(self, cluster_id: str, properties: Mapping[str, str]) -> None:
        """Write the settings and prepare the data folder. Blocks about a second. Raises KafkaFailed."""
        everything = {
            "node.id": str(self.node_id),
            "process.roles": "broker,controller",
            "listeners": f"PLAINTEXT://{self.address},CONTROLLER://127.0.0.1:{self.controller_port}",
            "advertised.listeners": f"PLAINTEXT://{self.address}",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": str(self.folder / "data"),
            **properties,
        }
        self._properties_path.write_text("".join(f"{name}={value}\n" for name, value in everything.items()))
        self._log4j_path.write_text(_LOG4J)
        command = self._java(
            "kafka.tools.StorageTool", "format", f"--cluster-id={cluster_id}", "-c", str(self._properties_path)
        )
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=FORMAT_DEADLINE_SECONDS,
            check=False,
        )
        if result.returncode != 0:
            raise KafkaFailed(f"formatting broker {self.node_id} ended with {result.returncode}:\n{result.stdout}")

    def start(self) -> None:
        """Start the process and return at once; see `KafkaCluster.wait_ready`. Raises KafkaFailed if it runs."""
        if self.is_running:
            raise KafkaFailed(f"broker {self.node_id} is running already")
        self._process = launch_server(self._java("kafka.Kafka", str(self._properties_path)), self.log_path)

    def stop(self) -> None:
        """SIGTERM, and wait for the end. Raises KafkaFailed where it does not come."""
        process = self._running()
        process.terminate()
        try:
            process.wait(STOP_DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise self.failure(f"did not stop within {STOP_DEADLINE_SECONDS} s of SIGTERM, and was killed") from None

    def kill(self) -> None:
        """SIGKILL, also to a frozen broker, and wait for the end."""
        process = self._running()
        process.kill()
        process.wait()

    def freeze(self) -> None:
        """SIGSTOP: connections stay open and nothing answers, like a host that hangs."""
        self._running().send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._running().send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill the process if it runs, and give the ports back."""
        if self.is_running:
            self.kill()
        self._ports.close()

    def failure(self, what: str) -> KafkaFailed:
        """An exception that says `what` of this broker, with the tail of its log."""
        return KafkaFailed(f"broker {self.node_id} {what}. Its log ends with:\n{self.log_tail()}")

    def require_running(self) -> None:
        """Raises KafkaFailed, with the exit code and the log, where the process has ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            raise self.failure(f"ended with {self._process.returncode}")

    def log_tail(self) -> str:
        """The last lines it logged, over all its starts."""
        if not self.log_path.exists():
            return "(no log)"
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - LOG_TAIL_BYTES))
            return log.read().decode(errors="replace")

    def _java(self, main_class: str, *arguments: str) -> list[str]:
        java = maven.java_command()
        if java is None:
            raise KafkaFailed(kafka_missing() or "no java")
        return [
            java,
            *self._java_options,
            f"-Dlog4j2.configurationFile={self._log4j_path}",
            "-cp",
            f"{fetch_kafka()}/*",
            main_class,
            *arguments,
        ]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            raise KafkaFailed(f"broker {self.node_id} is not running")
        return self._process
