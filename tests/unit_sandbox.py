"""Runs a command with the system calls that the systemd unit leaves it: ``python -m tests.unit_sandbox COMMAND …``.

The same libseccomp and the same sets as systemd uses, without a running systemd.
"""

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

UNIT = Path(__file__).parent.parent / "systemd" / "kafkasrcd.service"

# seccomp.h
ACT_ALLOW = 0x7FFF0000
ACT_ERRNO = 0x00050000


def unit_lines(key: str) -> list[str]:
    """The values of ``key`` in the unit, in order."""
    lines = UNIT.read_text().splitlines()
    return [line.partition("=")[2] for line in lines if line.partition("=")[0] == key]


def calls_in(name: str) -> set[str]:
    """The system calls of a set, ``@name``, with those of the sets in it."""
    if not name.startswith("@"):
        return {name}
    said = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True)
    members = [line.strip() for line in said.stdout.splitlines()[1:]]
    return set[str]().union(*(calls_in(member) for member in members if member and not member.startswith("#")))


def calls_in_unit() -> set[str]:
    """What the unit allows: its SystemCallFilter= lines one after the other, and what systemd always allows."""
    allowed: set[str] = set()
    for line in unit_lines("SystemCallFilter"):
        named = set[str]().union(*(calls_in(name) for name in line.removeprefix("~").split()))
        allowed = allowed - named if line.startswith("~") else allowed | named
    return allowed | calls_in("@default")


def confine() -> None:
    """Put this process, and all that it starts, under the unit's filter. Cannot be undone."""
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    seccomp.seccomp_load.argtypes = [ctypes.c_void_p]
    seccomp.seccomp_rule_add.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint]
    rules = seccomp.seccomp_init(ACT_ERRNO | errno.EPERM)
    for call in calls_in_unit():
        number = seccomp.seccomp_syscall_resolve_name(call.encode())
        if number >= 0 and (failed := seccomp.seccomp_rule_add(rules, ACT_ALLOW, number, 0)):
            raise OSError(-failed, f"seccomp rule for {call}")
    if failed := seccomp.seccomp_load(rules):
        raise OSError(-failed, "seccomp_load")


if __name__ == "__main__":
    confine()
    os.execvp(sys.argv[1], sys.argv[1:])
