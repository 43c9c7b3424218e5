"""What is no figure: warnings, decoded answers, and why a part of the page is not there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from domino_jax.page.cells import Cell, figure, is_missing
from domino_jax.page.sources import RunFiles, Source

# A page is read, not searched: the files have the rest.
WARNINGS = 12
ANSWERS = 3
PIECES = 400
PROMPT_CHARACTERS = 1000
LINES = 16  # of the data that one step was made of

NOT_EVALUATED = "not evaluated: domino evaluate RUN PROMPTS"
OLDER = "evaluated by an older version; run domino evaluate again"
NO_LOG = "no log of a training, as of an imported draft"
_WAYS = {"serving": "", "block": ", all proposals of a block", "head_off": ", head off"}


@dataclass(frozen=True)
class Warnings:
    """What a run's files warn of; `more` were left out."""

    run: int
    lines: tuple[Cell, ...]
    more: int


@dataclass(frozen=True)
class Piece:
    """Tokens of an answer in a row, and whether the draft proposed them."""

    text: str
    drafted: bool


@dataclass(frozen=True)
class Answer:
    """A decoded answer; `more` of its pieces were left out."""

    run: int
    prompts: str
    prompt: str
    pieces: tuple[Piece, ...]
    more: int


def warnings(runs: Sequence[RunFiles]) -> tuple[Warnings, ...]:
    """Skipped steps, spikes, and differences from the target's own output that are no ties."""
    found = []
    for place, run in enumerate(runs):
        lines = [_differs(*difference) for difference in _differences(run)]
        lines += [_skipped(record) for record in run.records("skipped")]
        lines += [_spike(record) for record in run.records("spike")]
        if lines:
            found.append(Warnings(place, tuple(lines[:WARNINGS]), max(len(lines) - WARNINGS, 0)))
    return tuple(found)


def answers(runs: Sequence[RunFiles]) -> tuple[Answer, ...]:
    """The first decoded answers of each set, in pieces that were drafted or not."""
    found = []
    for place, run in enumerate(runs):
        for prompts in run.sets:
            for example in prompts["examples"].entries[:ANSWERS]:
                pieces = [_piece(piece) for piece in example["pieces"].entries]
                if pieces:
                    prompt = (example["prompt"].text or "")[:PROMPT_CHARACTERS]
                    more = max(len(pieces) - PIECES, 0)
                    name = str(prompts.path[-1])
                    found.append(Answer(place, name, prompt, tuple(pieces[:PIECES]), more))
    return tuple(found)


def left_out(runs: Sequence[RunFiles], reason: Callable[[RunFiles], str | None]) -> tuple[str, ...]:
    """Why a part of the page is not there, of each run that lacks it."""
    by_reason: dict[str, list[str]] = {}
    for run in runs:
        why = reason(run)
        if why is not None:
            by_reason.setdefault(why, []).append(run.name)
    # Of a single run it goes without saying whose reason it is.
    several = len(runs) > 1
    return tuple(
        f"{', '.join(names)}: {why}" if several else why for why, names in by_reason.items()
    )


def no_evaluation(run: RunFiles) -> str | None:
    """Why a run has no evaluated sets."""
    if run.sets:
        return None
    return OLDER if run.evaluated_before else NOT_EVALUATED


def no_cycle(run: RunFiles) -> str | None:
    """Why nothing is known of a cycle's time."""
    if run.evaluation["cycle"]["whole"].number is not None:
        return None
    return no_evaluation(run) or "no cycle was timed"


def no_log(run: RunFiles) -> str | None:
    """Why there are no losses."""
    return None if run.records("train") else NO_LOG


def no_heldout(run: RunFiles) -> str | None:
    """Why training measured no acceptance by itself."""
    if run.records("heldout"):
        return None
    return no_log(run) or "no held-out rows (data.eval)"


def no_rollout(run: RunFiles) -> str | None:
    """Why training rolled nothing out."""
    if run.records("rollout"):
        return None
    return no_log(run) or "nothing was rolled out while training"


def no_timing(run: RunFiles) -> str | None:
    """Why there are no speeds of training."""
    if run.timing.entries:
        return None
    return no_log(run) or "no timing.jsonl"


def no_warnings(run: RunFiles) -> str | None:
    """Why nothing could warn of anything."""
    return None if run.records("train") or run.sets else "neither a log nor an evaluation"


def no_answers(run: RunFiles) -> str | None:
    """Why no answers are shown."""
    if any(prompts["examples"].entries for prompts in run.sets):
        return None
    return no_evaluation(run) or "the evaluation kept no answers"


def _differences(run: RunFiles) -> list[tuple[Source, str, str, Source]]:
    found = []
    for prompts in run.sets:
        for kind, words in _WAYS.items():
            way = prompts["ways"][kind]
            tie = way["tie"].number
            for difference in way["differences"].entries:
                gap = difference["logit_gap"].number
                # Without a gap one of the outputs had ended: no tie.
                if gap is None or tie is None or gap >= tie:
                    found.append((difference, str(prompts.path[-1]), words, way["tie"]))
    return found


def _differs(difference: Source, prompts: str, way: str, tie: Source) -> Cell:
    gap = figure(difference["logit_gap"], ".3g")
    line: Cell = (
        *(f"{prompts}{way}: the output for prompt ", *figure(difference["prompt"], ".0f")),
        *(" (from 0) differs at token ", *figure(difference["position"], ".0f")),
        " from that of the target alone",
    )
    if is_missing(gap):
        return (*line, ": one of them had ended")
    return (*line, ": their logits are ", *gap, " apart, a tie would be below ", *figure(tie, "g"))


def _skipped(record: Source) -> Cell:
    reasons = {
        "nonfinite": "its loss or gradient was not finite",
        "no_anchor": "no anchor in its batch",
    }
    reason = record["reason"].text or "no reason was recorded"
    step = figure(record["step"], ",.0f")
    return ("step ", *step, f" was skipped: {reasons.get(reason, reason)}", *_made_of(record))


def _spike(record: Source) -> Cell:
    return (
        *("step ", *figure(record["step"], ",.0f"), ": loss ", *figure(record["loss"], ".3f")),
        *(" where the median of its window was ", *figure(record["median"], ".3f")),
        *_made_of(record),
    )


def _made_of(record: Source) -> Cell:
    """The lines or rows of the data that a step was made of."""
    for unit in ("lines", "rows"):
        numbers = [number.value for number in record[unit].entries if number.number is not None]
        if numbers:
            more = " ..." if len(numbers) > LINES else ""
            shown = ", ".join(str(number) for number in numbers[:LINES])
            return (f"; {unit if len(numbers) > 1 else unit[:-1]} {shown}{more} of the data",)
    return ()


def _piece(piece: Source) -> Piece:
    text = piece[0].value
    return Piece(text if isinstance(text, str) else "", piece[1].value is True)
