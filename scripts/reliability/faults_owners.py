"""Two processes that start on one output: the first is undisturbed, the second is refused.

A requeued job may start while the old one still runs. Each case begins a verb twice in one
directory, the second time after a random part, at most 0.7, of the time that the verb takes:

    first     start-up | lock | work .................................. | exit code 0
    second         start-up | refused in one line, exit code 2

A second process that begins after the first has ended is an ordinary second start.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from faults_kills import VERBS
from faults_place import ANSWERS, Case, Place, all_cases, cleared, difference, in_turn, left
from faults_verdict import DONE, ownership

# `generate` writes nothing. Longer answers than elsewhere: the starts are to overlap.
OWNING = {verb: words for verb, words in VERBS.items() if verb != "generate"} | {
    "regenerate": (
        (*ANSWERS, *("--batch-size", "2", "--max-new-tokens", "100", "--temperature", "0.7")),
        "answers.jsonl",
    ),
    "append": (
        (
            *("evaluate", "trained", "prompts.jsonl", "--append"),
            *("--limit", "4", "--max-new-tokens", "40", "--timed", "0"),
        ),
        "trained/evaluation.json",
    ),
    "export": (("export", "trained", "exported"), "exported"),
    "import": (("import", "draft", "imported", "--target", "target"), "imported"),
}
# A second start after the first has ended succeeds; the others find their output there.
AGAIN = ("train", "capture", "report", "evaluate", "append")


@dataclass(frozen=True)
class Undisturbed:
    """A verb that ran alone: the bits and the files that it left, and its time."""

    bits: object
    names: set[str]
    seconds: float


def owners(place: Place, count: int) -> Iterator[Case]:
    """Starts each verb twice in one directory, `count` times in all."""
    trained, filling = place.copy(), place.filling
    for words in (("train", "config.yaml"), ("export", "run", "draft", "--dtype", "float32")):
        outcome = filling.run(trained, *words)
        assert outcome.code == DONE, outcome.log
    (trained / "run").rename(trained / "trained")
    undisturbed: dict[str, Undisturbed] = {}
    for verb, (words, name) in OWNING.items():
        filling.run(place.copy(trained), *words)
        directory = place.copy(trained)
        outcome = place.processes().run(directory, *words, command=True)
        assert outcome.code == DONE, outcome.log
        bits = left(directory, name, outcome)
        undisturbed[verb] = Undisturbed(bits, _names(directory), outcome.seconds)

    def case(index: int, verb: str) -> Case:
        delay = float(place.random(6, index).uniform(0, 0.7 * undisturbed[verb].seconds))
        return _twice(place, place.copy(trained), verb, undisturbed[verb], delay=delay)

    yield from all_cases("owners", in_turn(OWNING, count, case), count)


def _twice(
    place: Place, directory: Path, verb: str, undisturbed: Undisturbed, *, delay: float
) -> Case:
    words, where = OWNING[verb]
    first = place.processes().begin(directory, *words, command=True)
    first.wait_until(delay)
    overlap = first.poll() is None
    second = place.processes().begin(directory, *words, command=True)
    outcomes = {first.pid: first.wait(), second.pid: second.wait()}
    fault = ownership(outcomes, overlap=overlap, again=verb in AGAIN)
    if fault is None:
        done = next(outcome for outcome in outcomes.values() if outcome.code == DONE)
        found = difference(undisturbed.bits, left(directory, where, done))
        fault = found and f"the output differs from that of an undisturbed start: {found}"
    if fault is None:
        added = sorted(_names(directory) ^ undisturbed.names)
        fault = f"other files: {added[:3]}" if added else None
    kind = ", ".join(str(outcome.code) for outcome in outcomes.values())
    return Case("owners", f"{verb} after {delay:.2f} s", cleared(directory, fault), f"codes {kind}")


def _names(directory: Path) -> set[str]:
    """Files below a case, without the names that TensorStore draws and the processes' output."""
    paths = (path.relative_to(directory) for path in directory.rglob("*"))
    kept = (path for path in paths if len(path.parts) <= 3 and path.parts[0] != "cache")
    return {str(path) for path in kept if ".process-" not in path.name}
