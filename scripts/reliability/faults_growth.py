"""A long run ends at whatever grows a little with each save: memory, file handles, mappings.

Those of the training process are sampled over minutes. It saves every few seconds, far more often
than runs do, so that what a save leaves shows (docs/reliability.md says what that is).

samples   | start-up, compilation, 200 steps | first fifth | ............ | last fifth |
                                               the two are compared: medians, of handles the least
"""

import re
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults_place import Case, Place, override
from faults_verdict import interruption

FIRST_STEP = 200
SAMPLE_SECONDS = 2.0
# Largest growth that counts as none: memory as was asked for; a handle or two are a save under way.
LIMITS = {"memory": 0.02, "handles": 0.0, "mappings": 0.01}
WORDS = (
    *("train", "config.yaml", override(train__steps=10**7), override(train__checkpoint_every=50)),
    *(override(train__log_every=10), override(train__eval_every=100)),
)


@dataclass(frozen=True)
class Sample:
    """Of a process: its newest step, resident memory in KiB, open file handles, memory mappings."""

    step: int
    memory: int
    handles: int
    mappings: int


def growth(place: Place, minutes: int) -> Iterator[Case]:
    """Trains for so many minutes; one case each for memory, handles and mappings."""
    directory = place.copy()
    process = place.processes().begin(directory, *WORDS, command=True)
    samples: list[Sample] = []
    while process.poll() is None and time.monotonic() - process.began < 60 * minutes:
        time.sleep(SAMPLE_SECONDS)
        samples.append(sample(process.pid, process.log))
    process.send(signal.SIGTERM)
    sent = time.monotonic()
    outcome = process.wait(limit=60 * minutes + 60)
    fault = interruption(outcome, seconds=time.monotonic() - sent)
    yield Case("growth", f"{minutes} min, {samples[-1].step} steps: its end", fault)
    for what in LIMITS:
        found, fault = grown(samples, what)
        yield Case("growth", f"{what}: {found}", fault)


def sample(pid: int, log: Path) -> Sample:
    """Reads /proc of a process and the end of its log."""
    proc = Path("/proc") / str(pid)
    memory = re.search(r"VmRSS:\s+(\d+)", (proc / "status").read_text())
    steps = re.findall(r"^step (\d+)/", log.read_text()[-4000:], re.MULTILINE)
    return Sample(
        step=int(steps[-1]) if steps else 0,
        memory=int(memory[1]) if memory else 0,
        handles=len(list((proc / "fd").iterdir())),
        mappings=len((proc / "maps").read_text().splitlines()),
    )


def grown(samples: Sequence[Sample], what: str) -> tuple[str, str | None]:
    """The typical value of the first and last fifth after `FIRST_STEP`; a fault above the limit."""
    values = [getattr(one, what) for one in samples if one.step >= FIRST_STEP]
    fifth = len(values) // 5
    if fifth < 3:
        return "too short", f"{len(values)} samples after step {FIRST_STEP}, expected at least 15"
    # Handles come and go with each save: what is left between two of them counts.
    typical = min if what == "handles" else statistics.median
    first, last = typical(values[:fifth]), typical(values[-fifth:])
    words = f"{first:.0f} -> {last:.0f} ({last / first - 1:+.2%})"
    grew = last / first - 1 > LIMITS[what] + 1e-9
    return words, f"{what} grew {words}, at most {LIMITS[what]:.0%} is none" if grew else None
