"""Two processes that take turns at the same work.

Each side waits while the other works, so that a busy moment hits both; a process of its own keeps
the memory of the one out of the figures of the other.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# A step, which returns its loss when it is done, and what to say at the end.
Worker = tuple[Callable[[], float], Callable[[], dict[str, Any]]]


class SideEnded(Exception):
    """A side's process ended before it was asked to."""


class Side:
    """One worker process and the times of its steps.

    Attributes:
        name: of the side.
        seconds: of the measured steps.
        losses: of all steps.
        last: seconds of the latest step.
    """

    def __init__(
        self, name: str, words: Sequence[str], environment: dict[str, str] | None = None
    ) -> None:
        self.name, self.last = name, 0.0
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | (environment or {}),
        )
        self._ask("ready")

    def step(self, *, measured: bool) -> None:
        """Runs one step while the other side waits."""
        answer = self._ask("step")
        self.last = answer["seconds"]
        self.losses.append(answer["loss"])
        if measured:
            self.seconds.append(self.last)

    def finish(self) -> dict[str, Any]:
        """What the side says of itself at the end; its process ends."""
        figures = self._ask("finish")
        self._process.communicate()
        return figures

    def _ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the empty line below says it
        line = self._process.stdout.readline()
        if not line:
            raise SideEnded(f"the {self.name} side ended: exit code {self._process.wait()}")
        return json.loads(line)


def serve(make: Callable[[], Worker]) -> None:
    """Answers "ready", "step" and "finish" on standard input, one JSON line each."""
    replies, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    step, finish = make()
    for line in sys.stdin:
        answer: dict[str, Any] = {}
        if line.strip() == "step":
            began = time.perf_counter()
            loss = step()
            answer = {"seconds": time.perf_counter() - began, "loss": loss}
        elif line.strip() == "finish":
            answer = finish()
        print(json.dumps(answer), file=replies, flush=True)
