"""The real `domino` command in processes of its own, which the harness may kill at any moment.

Importing jax takes longer than most cases. So there are two ways to begin a process, and both run
the same `main` to the interpreter's own end:

    command   python -m domino_jax WORDS      start-up included
    forked    a server that has imported everything, but has no device yet, forks      ~3 s less

Both run on one thread's account: `Processes` belongs to one worker of the harness.
"""

import json
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = "XDG_CACHE_HOME"  # the user's cache lies in each case's directory
HANG_SECONDS = 240.0  # a machine with two busy cores needs up to 30 for the longest case


@dataclass(frozen=True)
class Outcome:
    """How a process ended: exit code (negative: by that signal), what it wrote, its seconds."""

    code: int
    out: str
    log: str
    seconds: float
    hung: bool = False


class Running(ABC):
    """A process that was begun; `wait` must be called once."""

    def __init__(self, directory: Path, tag: str, words: tuple[str, ...]) -> None:
        self.pid = 0
        self.words = words
        self.began = time.monotonic()
        self.out, self.log = directory / f".{tag}.out", directory / f".{tag}.log"
        for path in (self.out, self.log):
            path.write_bytes(b"")
        self.code: int | None = None

    def send(self, number: int) -> bool:
        """Sends a signal; whether the process was still there."""
        if self.poll() is not None:
            return False
        os.kill(self.pid, number)
        return True

    def wait_until(self, seconds: float) -> None:
        """Waits until the process has run so long or has ended."""
        while self.poll() is None and time.monotonic() - self.began < seconds:
            time.sleep(0.002)

    @abstractmethod
    def poll(self) -> int | None:
        """The exit code once it has ended."""

    def wait(self, limit: float = HANG_SECONDS) -> Outcome:
        """Waits for the end, at most so long, and reads what the process wrote."""
        hung = False
        while self.poll() is None:
            if time.monotonic() - self.began > limit and not hung:
                os.kill(self.pid, signal.SIGKILL)
                hung = True
            time.sleep(0.005)
        seconds = time.monotonic() - self.began
        out, log = (
            path.read_text(encoding="utf-8", errors="replace") for path in (self.out, self.log)
        )
        assert self.code is not None
        return Outcome(self.code, out, log, seconds, hung)


class _Command(Running):
    def __init__(
        self, directory: Path, tag: str, words: tuple[str, ...], environment: dict[str, str]
    ) -> None:
        super().__init__(directory, tag, words)
        with self.out.open("wb") as out, self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "domino_jax", *words],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=environment | {CACHE: str(directory / "cache")},
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        self.code = self._process.poll()
        return self.code


class _Forked(Running):
    """Its server is its parent and tells the exit code in a file."""

    def __init__(
        self, directory: Path, tag: str, words: tuple[str, ...], server: "subprocess.Popen[str]"
    ) -> None:
        super().__init__(directory, tag, words)
        self._server = server
        self._ended = directory / f".{tag}.code"
        self._ended.unlink(missing_ok=True)
        request = {
            "words": words,
            "directory": str(directory),
            "out": str(self.out),
            "log": str(self.log),
        }
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps({**request, "ended": str(self._ended)}) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())
        self.began = time.monotonic()

    def poll(self) -> int | None:
        if self.code is None and self._ended.exists():
            assert self._server.stdout is not None
            self.code = int(self._server.stdout.readline())
        return self.code


class Processes:
    """Begins processes with one environment, one at a time.

    Attributes:
        environment: variables of each process.
    """

    def __init__(self, *, cache: Path, fill_cache: bool = False) -> None:
        self.environment = environment(cache, fill=fill_cache)
        self._server: subprocess.Popen[str] | None = None
        self._count = 0

    def begin(self, directory: Path, *words: object, command: bool = False) -> Running:
        """Begins `domino WORDS` in a directory; `command` takes the way from the very start."""
        self._count += 1
        tag, texts = f"process-{self._count}", tuple(map(str, words))
        if command:
            return _Command(directory, tag, texts, self.environment)
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self.environment,
                text=True,
            )
            assert self._server.stdout is not None
            self._server.stdout.readline()
        return _Forked(directory, tag, texts, self._server)

    def run(self, directory: Path, *words: object, command: bool = False) -> Outcome:
        """Runs `domino WORDS` to its end."""
        return self.begin(directory, *words, command=command).wait()

    def close(self) -> None:
        if self._server is not None and self._server.stdin is not None:
            self._server.stdin.close()
            self._server.wait()


def environment(cache: Path, *, fill: bool) -> dict[str, str]:
    """Of all processes: a CPU, quick compilation, and a cache of programs that only `fill` writes.

    A process that is killed while it writes the cache would be judged for jax's file, not its own.
    """
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))
    }
    return kept | {
        "PYTHONPATH": os.pathsep.join(
            map(str, (ROOT, ROOT / "tests" / "support", Path(__file__).parent))
        ),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0" if fill else "1e9",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }


def _serve() -> None:
    """Forks one process per line of stdin: tells its pid, then its exit code."""
    import array_record.python.array_record_module  # noqa: F401
    import grain.checkpoint  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401

    # Each verb imports its part of these when it runs.
    import domino_jax.cli.measurement
    import domino_jax.cli.verbs
    import domino_jax.datagen.capture
    import domino_jax.datagen.prompts
    import domino_jax.datagen.regenerate
    import domino_jax.training.loop  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(request)
            return
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        Path(request["ended"]).touch()


def _become(request: dict[str, str]) -> None:
    """Makes this process the command, until it exits as any other."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, path, mode in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], flags),
        (2, request["log"], flags),
    ):
        opened = os.open(path, mode, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(request["directory"])
    os.environ[CACHE] = str(Path("cache").absolute())
    sys.argv = ["domino", *request["words"]]
    from domino_jax.cli import main

    main()


if __name__ == "__main__":
    _serve()
