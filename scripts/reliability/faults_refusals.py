"""What must be refused in one line: drift between starts, non-finite numbers, silent acceptances.

Each of them would train or serve something else than was meant, and nothing would fail.

A row of a table is a fault: what is changed in a copy of a place, the words that then meet it, and
what the refusal must name. The place holds a run that was stopped in its middle, captured states
and an export.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from faults_damage import GENERATE, IMPORT, OFFLINE, STARTED, STEPS, TRAIN, stopped_place
from faults_place import ANSWERS, Case, Place, all_cases, override, restored, run_bits
from faults_verdict import BAD_INPUT, DIVERGED, DONE, crash, refusal
from safetensors.numpy import load_file, save_file

EVALUATE = ("evaluate", "run", "prompts.jsonl", "--limit", "1", "--max-new-tokens", "4")
REGENERATE = (*ANSWERS, "--max-new-tokens", "4")
CAPTURE = ("capture", "config.yaml", "other")
FRESH = (*TRAIN, "run_dir=fresh")
# More steps than train.max_nonfinite_steps.
LONG = ("train", "config.yaml", "run_dir=fresh", override(train__steps=40))


@dataclass(frozen=True)
class Fault:
    """Something that must be refused.

    Attributes:
        name: for the table.
        words: of the command that meets it.
        change: what is done to the place before; None for nothing.
        names: what the refusal must name.
        codes: exit codes that refuse it.
        absent: a path that the refused command must not make.
        told: instead of being refused it may be left out, with a line that says so.
    """

    name: str
    words: tuple[str, ...]
    change: Callable[[Path], object] | None = None
    names: str = ""
    codes: tuple[int, ...] = (BAD_INPUT,)
    absent: str = ""
    told: str = ""


def _lines(name: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        path = directory / name
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return apply


def _json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        path = directory / name
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree))

    return apply


def _weights(
    name: str, change: Callable[[dict[str, np.ndarray]], object]
) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        path = directory / name / "model.safetensors"
        tensors = {key: np.array(value) for key, value in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        (directory / name / "SHA256SUMS").unlink(missing_ok=True)  # whole, as its writer left it

    return apply


def _text(name: str, old: str, new: str) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        text = (directory / name).read_text()
        assert old in text, (name, old)
        (directory / name).write_text(text.replace(old, new, 1))

    return apply


def _one(number: float) -> Callable[[dict[str, np.ndarray]], object]:
    """One number of one tensor is this one."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        name = sorted(name for name in tensors if tensors[name].ndim == 2)[0]
        tensors[name][1, 1] = number

    return change


def _scaled(tensors: dict[str, np.ndarray]) -> None:
    for name in tensors:
        tensors[name] *= np.float32(1.5)


def _swap_ids(tree: dict[str, Any]) -> None:
    ids = tree["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]


def _another_word(lines: list[str]) -> list[str]:
    record = json.loads(lines[0])
    # At its beginning: what lies beyond `data.max_length` no row holds.
    record["messages"][-1]["content"] = f"z {record['messages'][-1]['content']}"
    return [json.dumps(record) + "\n", *lines[1:]]


def _finished_as_text(lines: list[str]) -> list[str]:
    return [json.dumps(json.loads(lines[0]) | {"finished": "yes"}) + "\n", *lines[1:]]


def _norm(epsilon: float) -> Callable[[Path], object]:
    return _json("target/config.json", lambda tree: tree.update(rms_norm_eps=epsilon))


_rows, _heldout = "rows.jsonl", "heldout.jsonl"
_template = _text("target/chat_template.jinja", "assistant ", "user ")
_bigger = _weights("target", _scaled)
DRIFT = (
    Fault("a word changed", TRAIN, _lines(_rows, _another_word), "data.train"),
    Fault("lines reversed", TRAIN, _lines(_rows, lambda lines: lines[::-1]), "data.train"),
    Fault("half of the lines gone", TRAIN, _lines(_rows, lambda lines: lines[: len(lines) // 2]),
          "data.train"),
    Fault("lines added", TRAIN, _lines(_rows, lambda lines: [*lines, *lines[:3]]), "data.train"),
    Fault("held-out lines reversed", TRAIN, _lines(_heldout, lambda lines: lines[::-1]),
          "data.eval"),
    Fault("target weights x 1.5", TRAIN, _bigger, "target"),
    Fault("target config", TRAIN, _norm(1e-3), "target"),
    Fault("token ids swapped", TRAIN, _json("target/tokenizer.json", _swap_ids), "tokenizer"),
    Fault("chat template", TRAIN, _template, "template"),
    Fault("the seed", (*TRAIN, "seed=7"), None, "seed"),
    Fault("generate: target weights x 1.5", GENERATE, _bigger, "target"),
    Fault("evaluate: target weights x 1.5", EVALUATE, _bigger, "target"),
    Fault("generate: token ids swapped", GENERATE, _json("target/tokenizer.json", _swap_ids),
          "tokenizer"),
    Fault("generate: chat template", GENERATE, _template, "template"),
    Fault("offline: target weights x 1.5", OFFLINE, _bigger, "target"),
)  # fmt: skip
_nan, _inf = (_weights("target", _one(number)) for number in (np.nan, np.inf))
_draft_nan, _draft_inf = (_weights("draft", _one(number)) for number in (np.nan, np.inf))
_DIVERGE = (DIVERGED, BAD_INPUT)
NUMBERS = (
    Fault("learning rate 1e30", (*LONG, "optimizer.learning_rate=1e30"), codes=_DIVERGE),
    Fault("weight decay 1e300", (*LONG, "optimizer.weight_decay=1e300"), codes=_DIVERGE),
    Fault("train: NaN in the target", FRESH, _nan, "model."),
    Fault("train: infinity in the target", FRESH, _inf, "model."),
    Fault("regenerate: NaN in the target", REGENERATE, _nan, "model.", absent="answers.jsonl"),
    Fault("capture: NaN in the target", CAPTURE, _nan, "model.", absent="other"),
    Fault("generate: NaN in the target", GENERATE, _nan),
    Fault("import: NaN in the draft", IMPORT, _draft_nan, "draft", absent="imported"),
    Fault("init_from: NaN in the draft", STARTED, _draft_nan, "draft"),
    Fault("import: infinity in the draft", IMPORT, _draft_inf, "draft", absent="imported"),
)


def _link(directory: Path) -> None:
    shard = directory / "states" / "shard-00000.arrayrecord"
    shard.rename(directory / "elsewhere.arrayrecord")
    shard.symlink_to("../elsewhere.arrayrecord")


def _empty_step(directory: Path) -> None:
    (directory / "empty" / "checkpoints" / "7").mkdir(parents=True)


def _without_checkpoints(directory: Path) -> None:
    shutil.rmtree(directory / "run" / "checkpoints")


def _draft(key: str, value: float) -> Callable[[Path], object]:
    def change(tree: dict[str, Any]) -> None:
        (tree["dflash_config"] if key in tree["dflash_config"] else tree)[key] = value

    def apply(directory: Path) -> None:
        _json("draft/config.json", change)(directory)
        (directory / "draft" / "SHA256SUMS").unlink(missing_ok=True)  # whole, as its writer left it

    return apply


SILENCE = (
    Fault("--temperature nan", (*GENERATE, "--temperature", "nan"), names="temperature"),
    Fault("--limit-gb nan", (*CAPTURE, "--limit-gb", "nan"), names="limit-gb", absent="other"),
    Fault("a target's rms_norm_eps 0", FRESH, _norm(0), "rms_norm_eps", absent="fresh"),
    Fault("a target's rms_norm_eps -1", FRESH, _norm(-1.0), "rms_norm_eps", absent="fresh"),
    Fault("a draft's rms_norm_eps 0", IMPORT, _draft("rms_norm_eps", 0.0), "rms_norm_eps",
          absent="imported"),
    Fault("an infinite input_embedding_scale", IMPORT, _draft("input_embedding_scale", math.inf),
          absent="imported"),
    Fault("finished is text", FRESH, _lines(_rows, _finished_as_text), told="rows.jsonl:1: "),
    Fault("a shard that is a link", OFFLINE, _link, "shard-00000", absent="offline"),
    Fault("a YAML key twice", FRESH, _text("config.yaml", "{", '{"seed": 1, "seed": 2, '), "seed",
          absent="fresh"),
    Fault("seed -1", (*FRESH, "seed=-1"), names="seed", absent="fresh"),
    Fault("a huge --seed", (*GENERATE, "--seed", str(10**30)), names="seed"),
    Fault("--max-new-tokens 1e11", (*GENERATE[:-1], str(10**11))),
    Fault("an empty step directory", ("train", "config.yaml", STEPS, "run_dir=empty"), _empty_step),
    Fault("export of an empty step", ("export", "empty", "exported"), _empty_step,
          absent="exported"),
    Fault("no checkpoints/ any more", TRAIN, _without_checkpoints),
    Fault("generate: no such run", ("generate", "nope"), names="nope"),
    Fault("export into a run", ("export", "run", "target"), names="target"),
)  # fmt: skip


def drift(place: Place, count: int) -> Iterator[Case]:
    """Runs that are started again with something else; then what may change and changes no bit."""
    yield from _refused("drift", place, DRIFT[:count], free=count > len(DRIFT))


def numbers(place: Place, count: int) -> Iterator[Case]:
    """Numbers that are not finite, in settings, targets and drafts."""
    yield from _refused("numbers", place, NUMBERS[:count])


def silence(place: Place, count: int) -> Iterator[Case]:
    """What was once accepted without a word."""
    yield from _refused("silence", place, SILENCE[:count])


def _refused(
    part: str, place: Place, faults: tuple[Fault, ...], *, free: bool = False
) -> Iterator[Case]:
    base = stopped_place(place)
    works = [(one.name, lambda one=one: [_case(part, place, base, one)]) for one in faults]
    if free:
        works.append(("what may change", lambda: [_free(part, place, base)]))
    yield from all_cases(part, works, len(works))


def _case(part: str, place: Place, base: Path, one: Fault) -> Case:
    directory = place.copy(base)
    if one.change is not None:
        one.change(directory)
    outcome = place.processes().run(directory, *one.words)
    code = outcome.code if outcome.code in one.codes else one.codes[0]
    fault = refusal(outcome, names=one.names, code=code)
    if one.told and outcome.code == DONE and one.told in outcome.log:
        fault = crash(outcome)
    if fault is None and one.absent and (directory / one.absent).exists():
        fault = f"refused, but {one.absent} was made"
    if fault is None and code == DIVERGED and (directory / "fresh" / "checkpoints").exists():
        fault = _not_finite(directory / "fresh")
    shutil.rmtree(directory)
    return Case(part, one.name, fault, "refused" if fault is None else "")


def _not_finite(run: Path) -> str | None:
    steps = [path for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    for step in steps:
        for leaf in restored(step.resolve() / "params"):
            if not np.isfinite(leaf).all():
                return f"checkpoint {step.name} is not finite"
    return None


def _free(part: str, place: Place, base: Path) -> Case:
    """Intervals of logs and saves may change between two starts: the state must not."""
    plain, other = place.copy(base), place.copy(base)
    words = [override(train__log_every=2), override(train__eval_every=5)]
    words.append(override(train__checkpoint_every=3))
    outcomes = [place.processes().run(plain, *TRAIN), place.processes().run(other, *TRAIN, *words)]
    fault = next((found for found in map(crash, outcomes) if found), None)
    if fault is None and [x.code for x in outcomes] != [DONE, DONE]:
        fault = f"exit codes {[x.code for x in outcomes]}, expected 0"
    if fault is None and run_bits(plain / "run").arrays != run_bits(other / "run").arrays:
        fault = "other intervals gave another state"
    name = "log_every, eval_every, checkpoint_every changed"
    return Case(part, name, fault, "equal" if fault is None else "")
