"""Commands and programs one after the other in another process, which starts jax once at most."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

TOP = Path(__file__).parents[2]
# Reads lists of words: of a command, or of a program by its file. Writes exit code, stdout, stderr.
RUNNER = """
import contextlib, io, json, runpy, sys
from domino_jax.cli import command
from domino_jax.cli.shared import logs
told = []
for sys.argv in json.load(sys.stdin):
    out, errors = io.StringIO(), io.StringIO()
    logs.file = errors
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            if sys.argv[0] == "domino":
                command()
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    told.append((code, out.getvalue(), errors.getvalue()))
"""


def run_commands(
    commands: Iterable[Sequence[str]],
    directory: Path,
    *,
    paths: Sequence[Path] = (TOP,),
    before: str = "",
    after: str = "",
) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command, run in a directory on one device.

    Args:
        commands: the words of each, "domino" or the file of a program first.
        directory: where they run, and where they keep answers.
        paths: where modules are found, the package among them.
        before: code that runs first.
        after: code that runs last.
    """
    result = subprocess.run(
        [sys.executable, "-c", f"{before}{RUNNER}{after}\njson.dump(told, sys.stdout)"],
        input=json.dumps(list(commands)),
        cwd=directory,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
            "XDG_CACHE_HOME": str(directory / "cache"),  # not of another state of the code
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [tuple(told) for told in json.loads(result.stdout)]
