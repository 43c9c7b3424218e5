"""Another process that has locks."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from commands import TOP

PROGRAM = """
import sys
from contextlib import ExitStack
from pathlib import Path
from domino_jax.base.lock import LOCK, lock_beside, lock_inside
with ExitStack() as locks:
    for name in sys.argv[1:]:
        file = Path(name)
        if file.name == LOCK:
            lock = lock_inside(file.parent, command="first")
        else:
            output = file.with_name(file.name.removeprefix(".").removesuffix(LOCK))
            lock = lock_beside(output, command="first")
        locks.enter_context(lock)
    print("ready", flush=True)
    input()
"""


@contextmanager
def lock_owner(directory: Path, *files: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has these lock files of a directory; it is killed after the body."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *files],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(TOP)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    with process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()
