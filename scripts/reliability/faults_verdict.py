"""What counts as holding: the verdicts of the harness, without a process or a file of their own.

Each function returns what is wrong in a few words, or None. `tests/scripts/test_faults.py` holds
them against outcomes that are broken on purpose.
"""

import re

from faults_process import Outcome

DONE, NO_FIT, BAD_INPUT, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 130
DOCUMENTED = (DONE, NO_FIT, BAD_INPUT, DIVERGED, INTERRUPTED)
LINE_CHARACTERS = 500
# Of Python, of its fatal errors, of XLA and Abseil, of a C++ abort.
CRASHES = (
    "Traceback",
    "Fatal Python error",
    "Exception ignored",
    "terminate called",
    "Check failed",
    "*** SIG",
)
_OWNER = re.compile(r"process (\d+)")


def crash(outcome: Outcome) -> str | None:
    """A crash, a hang or an exit code that nothing documents."""
    if outcome.hung:
        return f"hung for {outcome.seconds:.0f} s"
    for word in CRASHES:
        if word in outcome.log + outcome.out:
            return (
                f"{word!r} in its output, exit code {outcome.code}; last line: {last_line(outcome)}"
            )
    if outcome.code not in DOCUMENTED:
        return f"exit code {outcome.code}; last line: {last_line(outcome)}"
    return None


def refusal(outcome: Outcome, *, names: str = "", code: int = BAD_INPUT) -> str | None:
    """Anything but one line that refuses, with its exit code.

    Args:
        outcome: of the process.
        names: what the line must name.
        code: 2 for bad input, with a line that begins `error: `; 3 for a run that diverged.
    """
    if found := crash(outcome):
        return found
    if outcome.code == DONE:
        return "accepted without a word, exit code 0"
    if outcome.code != code:
        return f"exit code {outcome.code}, expected {code}; last line: {last_line(outcome)}"
    begin = "error: " if code == BAD_INPUT else "stopped: "
    lines = [line for line in outcome.log.splitlines() if line.startswith(begin)]
    if len(lines) != 1 or outcome.log.splitlines()[-1] != lines[0]:
        return (
            f"{len(lines)} lines begin with {begin!r}, expected one, the last; "
            f"last line: {last_line(outcome)}"
        )
    if len(lines[0]) > LINE_CHARACTERS:
        return (
            f"a line of {len(lines[0])} characters, expected at most {LINE_CHARACTERS}: "
            f"{lines[0][:100]}"
        )
    if names not in lines[0]:
        return f"the line does not name {names!r}: {lines[0]}"
    return None


def completion(outcome: Outcome, *, start: str) -> str | None:
    """Anything but a whole end of a process that had nothing in its way; `start` says which."""
    if found := crash(outcome):
        return found
    if outcome.code != DONE:
        return f"{start} ends with code {outcome.code}: {last_line(outcome)}"
    return None


def interruption(outcome: Outcome, *, seconds: float, limit: float = 10.0) -> str | None:
    """Anything but an end in time with one line, where a process got a signal while it ran.

    Args:
        outcome: of the process.
        seconds: from the signal to the end.
        limit: of them.
    """
    if found := crash(outcome):
        return found
    if seconds > limit:
        return f"ended {seconds:.1f} s after the signal, expected at most {limit:g}"
    lines = outcome.log.splitlines()
    said = [line for line in lines if line.startswith(("interrupted", "stopped"))]
    if outcome.code == DONE:
        return None  # the work was done before the signal was looked at
    if outcome.code != INTERRUPTED:
        return f"exit code {outcome.code}, expected {INTERRUPTED}; last line: {last_line(outcome)}"
    # A run that saves itself says so at once, and what it saved in the end.
    if [line.split()[0] for line in said] not in (["interrupted:"], ["interrupted:", "stopped"]):
        return f"{len(said)} lines on the interruption: {said}"
    if lines[-1] != said[-1]:
        return f"the line is not the last one: {lines[-1][:200]}"
    return None


def damage(outcome: Outcome, *, differences: str | None, said: bool) -> tuple[str, str | None]:
    """What came of a damaged file: a word for it, and what did not hold.

    Args:
        outcome: of the process that met it.
        differences: from what an undisturbed start makes, None where all bits are equal.
        said: whether the process told of the damage.
    """
    if found := crash(outcome):
        return "crashed", found
    if outcome.code == BAD_INPUT:
        return "refused", refusal(outcome)
    if outcome.code != DONE:
        return "failed", f"exit code {outcome.code}; last line: {last_line(outcome)}"
    if differences is not None:
        return "wrong", f"exit code 0 with other numbers: {differences}"
    return ("restored" if said else "harmless"), None


def ownership(outcomes: dict[int, Outcome], *, overlap: bool, again: bool) -> str | None:
    """A fault unless one process is undisturbed and the other is refused and names it.

    Args:
        outcomes: of both processes, by process id.
        overlap: the second began while the first ran.
        again: a second start after the first has ended succeeds as well.
    """
    for outcome in outcomes.values():
        if found := crash(outcome):
            return found
    done = [pid for pid, outcome in outcomes.items() if outcome.code == DONE]
    refused = [one for one in outcomes.values() if one.code == BAD_INPUT]
    if not done:
        return f"both failed: {'; '.join(last_line(one) for one in outcomes.values())}"
    if len(done) == 2:
        # The first may have ended while the second still imported its packages.
        return None if again or not overlap else "both succeeded on one output"
    (outcome,) = refused
    if found := refusal(outcome):
        return found
    owner = _OWNER.search(outcome.log)
    if owner is None and "already there" in outcome.log:
        return None  # the first had ended by then
    if owner is None or int(owner[1]) != done[0]:
        return f"the line does not name process {done[0]}: {last_line(outcome)}"
    return None


def last_line(outcome: Outcome) -> str:
    """Of stderr, cut."""
    return (outcome.log.strip().splitlines() or ["(none)"])[-1][:200]
