"""`python -m tests.fuzz [TARGET]… [FLAG | FILE | FOLDER]…`: libFuzzer on each of the targets (none named: on all).

Flags are libFuzzer's (`-max_total_time=60`, `-runs=3000`, `-seed=1`); a folder keeps what covers something new. The
first finding ends it with an exit code other than 0, a traceback, and a file `crash-…` with the input: that FILE after
its TARGET shows it again.
"""

import os
import subprocess
import sys
import tempfile

from tests.fuzz.targets import TARGETS


def main(arguments: list[str]) -> int:
    """The exit code."""
    names = [argument for argument in arguments if argument in TARGETS]
    others = [argument for argument in arguments if argument not in TARGETS]
    for name in names or TARGETS:
        print(f"--- {name}", flush=True)
        # libFuzzer ends its process without cleaning up.
        with tempfile.TemporaryDirectory(prefix="kafkasrcd-fuzz-") as folder:
            command = [sys.executable, "-m", "tests.fuzz.process", name, *others]
            done = subprocess.run(command, env={**os.environ, "TMPDIR": folder}, check=False)
        if done.returncode != 0:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
