"""Fixtures for all tests: a real Kafka, PostgreSQL and schema registry, and a check that no process is left behind.

Tests that use `kafka` or `kafka_three` get the marker `kafka` by themselves, those that use `postgres` or
`schema_registry` the marker `postgres` or `registry`. Without Java or Maven, or without PostgreSQL, they are skipped,
with one line at the end that says what to install; with CI=true in the environment they fail instead.
"""

import contextlib
import os
import re
import uuid
from collections import Counter
from collections.abc import Generator

import psutil
import pytest

from tests.kafka_broker import TEST_MARK_VARIABLE, fetch_kafka, kafka_missing
from tests.kafka_cluster import KafkaCluster
from tests.maven import MavenFailed
from tests.postgres import PostgresServer, postgres_missing
from tests.registry_server import RegistryServer, fetch_registry, registry_missing
from tests.waiting import wait_until

# What a killed supervisor's children may take to be gone; the design promises as much.
LEFT_BEHIND_DEADLINE_SECONDS = 2.0
TOPIC_NAME_LIMIT = 249  # Kafka's own


@pytest.fixture(scope="session")
def kafka() -> Generator[KafkaCluster]:
    """A Kafka of one broker for the whole session. A test that stops the broker starts it again."""
    with KafkaCluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def kafka_three() -> Generator[KafkaCluster]:
    """A Kafka of three brokers for the whole session, started when a test first asks for it."""
    with KafkaCluster(brokers=3) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def postgres() -> Generator[PostgresServer]:
    """A PostgreSQL for the whole session. A test that stops it starts it again."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def schema_registry() -> Generator[RegistryServer]:
    """A schema registry for the whole session. A test that stops it starts it again, empty."""
    with RegistryServer() as server:
        yield server


@pytest.fixture
def topic_name(request: pytest.FixtureRequest) -> str:
    """A topic name of this test's own, not created yet. It serves for group names as well."""
    readable = re.sub(r"[^a-zA-Z0-9_-]+", "-", str(request.node.name)).strip("-")
    unique = uuid.uuid4().hex[:8]
    return f"{readable[: TOPIC_NAME_LIMIT - 100]}-{unique}"


@pytest.fixture(autouse=True)
def no_process_left_behind(request: pytest.FixtureRequest) -> Generator[None]:
    """Fail a test that leaves a process running, and kill that process.

    Processes are recognised by a variable in the environment they inherit, however far they have forked, detached or
    lost their parents. Not seen: what is started with an environment of its own making, and what fixtures of wider
    scope start before the test. Brokers of KafkaCluster, and what multiprocessing keeps for the life of the pytest
    process, do not count.
    """
    mark = f"{request.node.nodeid} {uuid.uuid4().hex}"
    os.environ[TEST_MARK_VARIABLE] = mark
    try:
        yield
    finally:
        del os.environ[TEST_MARK_VARIABLE]
    if not _marked_processes(mark):
        return
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not _marked_processes(mark), LEFT_BEHIND_DEADLINE_SECONDS, "its processes to end")
    left_behind = _marked_processes(mark)
    lines: list[str] = []
    for process in left_behind:
        with contextlib.suppress(psutil.NoSuchProcess):
            lines.append(f"  {process.pid}, child of {process.ppid()}: {' '.join(process.cmdline())[:200]}")
            process.kill()
    if lines:
        pytest.fail("the test left processes behind (killed now):\n" + "\n".join(lines), pytrace=False)


def _marked_processes(mark: str) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        # Gone, a zombie, or another user's.
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(TEST_MARK_VARIABLE) == mark and not _is_multiprocessing_of_pytest(process):
                found.append(process)
    return found


def _is_multiprocessing_of_pytest(process: psutil.Process) -> bool:
    command = " ".join(process.cmdline())
    return process.ppid() == os.getpid() and (
        "multiprocessing.resource_tracker" in command or "multiprocessing.forkserver" in command
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names: list[str] = getattr(item, "fixturenames", [])
        if "kafka" in names or "kafka_three" in names:
            item.add_marker(pytest.mark.kafka)
        if "postgres" in names:
            item.add_marker(pytest.mark.postgres)
        if "schema_registry" in names:
            item.add_marker(pytest.mark.registry)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Download Kafka and the registry before the first test, whose time limit is too short for it."""
    for marker, missing, fetch in (
        ("kafka", kafka_missing, fetch_kafka),
        ("registry", registry_missing, fetch_registry),
    ):
        wanted = any(item.get_closest_marker(marker) for item in session.items)
        if wanted and not session.config.option.collectonly and missing() is None:
            # Where it fails, the fixture tries again and reports it.
            with contextlib.suppress(MavenFailed):
                fetch()


def pytest_runtest_setup(item: pytest.Item) -> None:
    missing = [
        reason
        for marker, reason_of in (
            ("kafka", kafka_missing),
            ("postgres", postgres_missing),
            ("registry", registry_missing),
        )
        if item.get_closest_marker(marker) is not None and (reason := reason_of()) is not None
    ]
    if not missing:
        return
    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(missing[0], pytrace=False)
    pytest.skip(missing[0])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test wrote may be no text; a report that goes to another process has to be."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = {kafka_missing(), registry_missing(), postgres_missing()} - {None}
    skipped: list[pytest.TestReport] = terminalreporter.stats.get("skipped", [])
    said = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in skipped if isinstance(report.longrepr, tuple)
    )
    for reason, count in said.items():
        if reason in reasons:
            terminalreporter.write_line(f"{count} SKIPPED: {reason}", yellow=True, bold=True)
