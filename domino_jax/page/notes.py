"""What is no figure: warnings, decoded answers, and why a part of the page is not there."""

from collections.abc import Sequence
from dataclasses import dataclass

from domino_jax.page.cells import Cell, cell, sentence
from domino_jax.page.sources import RunFiles, Source

# A page is read, not searched: the files have the rest.
ANSWERS = 3
PROMPT_CHARACTERS = 1000
LINES = 16  # of the data that one step was made of

NOT_EVALUATED = "not evaluated: domino evaluate RUN PROMPTS"
NO_LOG = "no log of a training, as of an imported draft"
_WAYS = {"serving": "", "block": ", all proposals of a block", "head_off": ", head off"}
_SKIPPED = {
    "nonfinite": "its loss or gradient was not finite",
    "no_anchor": "no anchor in its batch",
}


@dataclass(frozen=True)
class Answer:
    """A decoded answer: its tokens in pieces, each with whether the draft proposed it."""

    run: int
    prompts: str
    prompt: str
    pieces: list[tuple[str, bool]]


def warnings(run: RunFiles) -> list[Cell]:
    """Skipped steps, spikes, and differences from the target's own output that are no ties."""
    lines = []
    for name, prompts in run.sets.items():
        for kind, words in _WAYS.items():
            way = prompts["ways"][kind]
            tie = way["tie"].number
            for difference in way["differences"].entries:
                gap = difference["logit_gap"].number
                # Without a gap one of the outputs had ended: no tie.
                if gap is None or tie is None or gap >= tie:
                    lines.append((f"{name}{words}: ", *_difference(difference, way["tie"])))
    for record in run.records("skipped"):
        reason = record["reason"].text or "no reason was recorded"
        why = _SKIPPED.get(reason, reason)
        step = sentence("step {:,.0f} was skipped: ", record["step"])
        lines.append((*step, why, *_made_of(record)))
    for record in run.records("spike"):
        said = "step {:,.0f}: loss {:.3f} where the median of its window was {:.3f}"
        spike = sentence(said, record["step"], record["loss"], record["median"])
        lines.append((*spike, *_made_of(record)))
    return lines


def answers(runs: Sequence[RunFiles]) -> list[Answer]:
    """The first decoded answers of each set, in pieces that were drafted or not."""
    found = []
    for place, run in enumerate(runs):
        for name, prompts in run.sets.items():
            for example in prompts["examples"].entries[:ANSWERS]:
                pairs = example["pieces"].entries
                pieces = [(pair[0].text or "", pair[1].value is True) for pair in pairs]
                prompt = (example["prompt"].text or "")[:PROMPT_CHARACTERS]
                if pieces:
                    found.append(Answer(place, name, prompt, pieces))
    return found


def left_out(runs: Sequence[RunFiles], part: str) -> list[str]:
    """Why a part of the page, one of `lacking`, is not there, of each run that lacks it."""
    by_reason: dict[str, list[str]] = {}
    for run in runs:
        why = lacking(run)[part]
        if why is not None:
            by_reason.setdefault(why, []).append(run.name)
    # Of a single run it goes without saying whose reason it is.
    if len(runs) == 1:
        return list(by_reason)
    return [f"{', '.join(names)}: {why}" for why, names in by_reason.items()]


def lacking(run: RunFiles) -> dict[str, str | None]:
    """Why each part of the page is not there; None for one that is."""
    evaluated, trained = run.sets, run.records("train")
    kept = any(prompts["examples"].entries for prompts in evaluated.values())
    timed = run.evaluation["cycle"]["whole"].number is not None
    unevaluated = None if evaluated else NOT_EVALUATED
    untrained = None if trained else NO_LOG
    return {
        "evaluation": unevaluated,
        "cycle": None if timed else unevaluated or "no cycle was timed",
        "answers": None if kept else unevaluated or "the evaluation kept no answers",
        "training": untrained,
        "heldout": None if run.records("heldout") else untrained or "no held-out rows (data.eval)",
        "rollout": None
        if run.records("rollout")
        else untrained or "nothing was rolled out while training",
        "timing": None if run.timing.entries else untrained or "no timing.jsonl",
        "warnings": None if trained or evaluated else "neither a log nor an evaluation",
    }


def _difference(difference: Source, tie: Source) -> Cell:
    said = "the output for prompt {:.0f} (from 0) differs at token {:.0f} from that of the target"
    line = sentence(f"{said} alone: ", difference["prompt"], difference["position"])
    gap = cell("their logits are {:.3g} apart, ", difference["logit_gap"])
    if not gap:
        return (*line, "one of them had ended")
    return (*line, *gap, *sentence("a tie would be below {:g}", tie))


def _made_of(record: Source) -> Cell:
    """The lines or rows of the data that a step was made of."""
    for unit in ("lines", "rows"):
        numbers = [number.value for number in record[unit].entries if number.number is not None]
        if numbers:
            more = " ..." if len(numbers) > LINES else ""
            shown = ", ".join(str(number) for number in numbers[:LINES])
            return (f"; {unit if len(numbers) > 1 else unit[:-1]} {shown}{more} of the data",)
    return ()
