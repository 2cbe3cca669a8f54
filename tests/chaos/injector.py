"""Does what the plan says, at its time, and remembers what was really done."""

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil

from tests.chaos.daemon_slot import DaemonSlot, described
from tests.chaos.disturbance import Disturbance
from tests.chaos.fault import Fault, FaultKind, Lane, Role
from tests.chaos.plan import Plan
from tests.kafka_cluster import KafkaCluster
from tests.postgres import PostgresServer

IN_SYNC_DEADLINE_SECONDS = 120.0
"""A broker that was killed reads its logs again first; and then fetches what it has missed."""
_OFFSETS_TOPIC = "__consumer_offsets"


# A server dies with the *thread* that started it: this one lives as long as the process, and a lane does not.
_launcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store-launcher")


class Injector:
    """One thread a lane, so that a lane's faults follow each other. `store` is None where no server has it."""

    def __init__(
        self,
        plan: Plan,
        slots: Sequence[DaemonSlot],
        cluster: KafkaCluster,
        topic: str,
        store: PostgresServer | None,
        note: Callable[[str], None],
    ) -> None:
        self.disturbances: list[Disturbance] = []
        self.injected: Counter[str] = Counter()
        self.troubles: list[str] = []
        """What the test itself could not do."""
        self.began_ns = time.monotonic_ns()
        """When the storm began (CLOCK_MONOTONIC)."""
        self._plan = plan
        self._slots = slots
        self._cluster = cluster
        self._topic = topic
        self._store = store
        self._note = note
        self._calm = threading.Event()
        self._thaws: list[threading.Thread] = []

    def run(self) -> None:
        """All of the plan. Returns when the last lane is through; what is frozen then may be so still."""
        self.began_ns = time.monotonic_ns()
        lanes: dict[tuple[Lane, int], list[Fault]] = {}
        for fault in self._plan.faults:
            lanes.setdefault(fault.lane, []).append(fault)
        threads = [
            threading.Thread(target=self._run_lane, args=(faults,), name=f"{lane} {number}", daemon=True)
            for (lane, number), faults in lanes.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def kill_children(self) -> None:
        """Every worker and handler process there is, one after the other, now."""
        for slot in self._slots:
            for role in (Role.WORKER, Role.HANDLER):
                # From the last on: those that are gone do not change the others' places.
                for nth in reversed(range(len(slot.processes(role)))):
                    self._run_lane([Fault(self._seconds, FaultKind.KILL, slot.number, role, nth)])

    def calm(self) -> None:
        """Thaw what is frozen, now."""
        self._calm.set()
        for thaw in self._thaws:
            thaw.join()

    # ── Inside ───────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _seconds(self) -> float:
        return (time.monotonic_ns() - self.began_ns) / 1e9

    def _run_lane(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            # Where the one before took longer than planned, this one comes late.
            time.sleep(max(0.0, fault.at_seconds - self._seconds))
            try:
                done = self._do(fault)
            except Exception as error:
                self.troubles.append(f"the test could not {fault}: {error!r}")
                done = f"FAILED: {error!r}"
            if done is None:
                self._tell(fault, "nobody there")
            elif done:
                self.injected[_label(fault)] += 1
                self._tell(fault, done)

    def _tell(self, fault: Fault, done: str) -> None:
        self._note(f"{fault}: {done}, at {self._seconds:.1f} s")

    def _do(self, fault: Fault) -> str | None:
        """Do it; says what was done, None where there was nobody to do it to."""
        match fault.kind:
            case FaultKind.START:
                return "started" if self._slots[fault.target].start() else None
            case FaultKind.STOP:
                return self._stop(fault)
            case FaultKind.KILL:
                return self._kill(fault)
            case FaultKind.FREEZE | FaultKind.FREEZE_DAEMON:
                return self._freeze(fault)
            case FaultKind.KILL_BROKER | FaultKind.STOP_BROKER:
                return self._restart_broker(fault)
            case FaultKind.RESTART_STORE | FaultKind.CRASH_STORE | FaultKind.CUT_STORE:
                return self._disturb_store(fault)
            case FaultKind.ADD_PARTITION:
                total = len(self._cluster.partitions(self._topic)) + 1
                self._cluster.add_partitions(self._topic, total)
                return f"{total} partitions"

    def _stop(self, fault: Fault) -> str | None:
        now_ns = time.monotonic_ns()
        if not self._slots[fault.target].signal(signal.SIGTERM):
            return None
        self.disturbances.append(Disturbance(fault.kind, fault.target, None, now_ns, time.monotonic_ns()))
        return "told to end"

    def _kill(self, fault: Fault) -> str | None:
        assert fault.role is not None
        slot = self._slots[fault.target]
        victim = slot.pick(fault.role, fault.nth)
        if victim is None:
            return None
        dying = _with_children(victim)
        shown = described([victim])
        now_ns = time.monotonic_ns()
        if fault.role is Role.SUPERVISOR:
            if not slot.signal(signal.SIGKILL):
                return None
        else:
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                return None
        pids = frozenset(process.pid for process in dying)
        self.disturbances.append(Disturbance(fault.kind, fault.target, fault.role, now_ns, time.monotonic_ns(), pids))
        return f"{shown} killed"

    def _freeze(self, fault: Fault) -> str | None:
        slot = self._slots[fault.target]
        if fault.role is None:
            victims = slot.tree()
        else:
            victim = slot.pick(fault.role, fault.nth)
            victims = [] if victim is None else [victim]
        if not victims:
            return None
        shown = described(victims)
        from_ns = time.monotonic_ns()
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.suspend()
        pids = frozenset(victim.pid for victim in victims)

        def thaw() -> None:
            self._calm.wait(fault.lasts_seconds)
            for victim in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.resume()
            self.disturbances.append(
                Disturbance(fault.kind, fault.target, fault.role, from_ns, time.monotonic_ns(), pids)
            )

        thread = threading.Thread(target=thaw, name="thaw", daemon=True)
        self._thaws.append(thread)
        thread.start()
        return f"{shown} frozen"

    def _restart_broker(self, fault: Fault) -> str:
        from_ns = time.monotonic_ns()
        self._tell(fault, "begun")
        if fault.kind is FaultKind.KILL_BROKER:
            self._cluster.kill_broker(fault.target)
        else:
            self._cluster.stop_broker(fault.target)
        time.sleep(fault.lasts_seconds)
        self._cluster.start_broker(fault.target)
        for topic in (self._topic, _OFFSETS_TOPIC):
            self._cluster.wait_in_sync(topic, IN_SYNC_DEADLINE_SECONDS)
        self.disturbances.append(Disturbance(fault.kind, None, None, from_ns, time.monotonic_ns()))
        return f"in sync again after {(time.monotonic_ns() - from_ns) / 1e9:.1f} s"

    def _disturb_store(self, fault: Fault) -> str | None:
        if self._store is None:
            return ""
        from_ns = time.monotonic_ns()
        self._tell(fault, "begun")
        if fault.kind is FaultKind.CUT_STORE:
            self._store.terminate_connections()
        else:
            self._store.stop(immediate=fault.kind is FaultKind.CRASH_STORE)
            time.sleep(fault.lasts_seconds)
            _launcher.submit(self._store.start).result()
        self.disturbances.append(Disturbance(fault.kind, None, None, from_ns, time.monotonic_ns()))
        return f"back after {(time.monotonic_ns() - from_ns) / 1e9:.1f} s"


def _label(fault: Fault) -> str:
    return str(fault.kind) if fault.role is None else f"{fault.kind} ({fault.role})"


def _with_children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return [process]
