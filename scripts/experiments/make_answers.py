"""Makes configs/answers: what a target answered, in nested sizes that a repository can hold.

A drafter's training data are its target's answers, which take a CPU hours to write. Committed, they
cost a demo nothing, and two runs that are compared by how much they saw have seen the same lines.
From prompts and answers in DIR:

    python scripts/experiments/make_prompts.py --more 760 --output DIR           # families.jsonl
    domino prompts DIR/own.jsonl --target TARGET --count 2600 --language en      # its own prompts
    domino regenerate DIR/own.jsonl DIR/own-answers.jsonl --target TARGET
    domino regenerate DIR/families.jsonl DIR/family-answers.jsonl --target TARGET
    python scripts/experiments/make_answers.py --own DIR/own.jsonl DIR/own-answers.jsonl \\
        --families DIR/families.jsonl DIR/family-answers.jsonl --tokens 30000 100000 300000

    own prompts -- the last of them --> heldout-own.jsonl.gz
        | the others
        +-- every family spread evenly --> train-30k.jsonl.gz < train-100k.jsonl.gz < ...
    families                               each begins like the next, all in the same shares

Own prompts that were drawn in several parts are several `--own`, in the order of their seeds. The
committed ones are of seed 0 (1,150 of at most 128 tokens) and seed 1000 (1,400 of at most 64). A
size is the number of tokens that a loss counts (`data.conversations`: the target's own words and
the ends of its turns). No order is drawn: the own prompts are independent draws, the families'
stand spread already. record.json holds what is in each file, and what it was made from and by.
"""

import argparse
import gzip
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from make_prompts import (
    PROMPTS,
    Record,
    essence,
    evaluated_in,
    interleaved,
    numbered_records,
    read_records,
)

from domino_jax.base.errors import InputError
from domino_jax.base.files import file_sha256, whole_file, write_whole
from domino_jax.data.conversations import Encoder, load_rows
from domino_jax.datagen.regenerate import is_retokenised
from domino_jax.target.load import load_tokenizer
from domino_jax.target.resolve import resolve_target

ANSWERS = PROMPTS.parent / "answers"
EVALUATED = ("heldout", "humaneval", "everyday")  # of configs/prompts
OWN = "own"
IDS = ("prompt_ids", "output_ids", "finish_reason")
HASHES = ("vocabulary", "chat_template")  # of a header; no options of a command


@dataclass(frozen=True)
class Source:
    """A file of prompts and the file of answers that `domino regenerate` wrote to them."""

    prompts: Path
    answers: Path


@dataclass(frozen=True)
class Answered:
    """A line to write, its tokens that a loss counts, and whether its text gives other ids."""

    line: Record
    tokens: int
    retokenised: bool


def header_of(path: Path) -> Record:
    """The header that a verb wrote into a file; empty where no verb wrote it."""
    headers = [record for record in numbered_records(path).values() if "messages" not in record]
    if len(headers) > 1:
        raise SystemExit(f"{path}: lines of several settings; give each part its own --own")
    return headers[0] if headers else {"generator": {}}


def answered(source: Source, tokenizer: Any, *, max_length: int) -> list[Answered]:
    """The usable answers in the order of their prompts, labelled as those are.

    `regenerate` sorts by length and keeps no label.
    """
    prompts, answers = numbered_records(source.prompts), numbered_records(source.answers)
    encoder = Encoder(tokenizer, max_length=2**24)  # whole rows
    by_prompt = {}
    for row in load_rows(source.answers, tokenizer, max_length=max_length).rows:
        answer = answers[row.line]
        number = answer["prompt_line"]
        prompt = prompts.get(number)
        if prompt is None or answer["messages"][:-1] != prompt["messages"]:
            raise SystemExit(
                f"{source.answers}:{row.line}: answers another prompt than line {number} of "
                f"{source.prompts}"
            )
        kept = {name: answer[name] for name in ("messages", *IDS)}
        line = kept | {"family": prompt.get("family", OWN)}
        tokens = int(row.loss_mask.sum())
        by_prompt[number] = Answered(line, tokens, is_retokenised(answer, encoder))
    return [by_prompt[number] for number in sorted(by_prompt)]


def trainable(
    candidates: Sequence[Answered], heldout: Sequence[Answered]
) -> tuple[list[Answered], Counter[str]]:
    """What may be trained on, every family spread evenly, and why the rest was left out."""
    evaluated = {name: read_records(PROMPTS / f"{name}.jsonl") for name in EVALUATED}
    evaluated["heldout-own"] = [answer.line for answer in heldout]
    given_away = evaluated_in(evaluated)
    left_out: Counter[str] = Counter()
    seen = set()
    groups: dict[str, list[Answered]] = {}
    for answer in candidates:
        if given_away(answer.line):
            left_out["evaluated on"] += 1
        elif essence(answer.line) in seen:
            left_out["repeated"] += 1
        else:
            seen.add(essence(answer.line))
            groups.setdefault(answer.line["family"], []).append(answer)
    return interleaved(list(groups.values())), left_out


def beginning(answers: Sequence[Answered], tokens: int) -> Sequence[Answered]:
    """The fewest first answers with so many tokens."""
    found = 0
    for end, answer in enumerate(answers, start=1):
        found += answer.tokens
        if found >= tokens:
            return answers[:end]
    raise SystemExit(f"--tokens {tokens}: the answers to train on have {found}")


def size_name(tokens: int) -> str:
    """100000 -> 100k."""
    return str(tokens) if tokens % 1000 else f"{tokens // 1000}k"


def write_packed(path: Path, header: Record, answers: Sequence[Answered]) -> dict[str, Any]:
    """Writes a JSONL.gz whose bytes depend on its lines alone; returns what the record says."""
    records = [header, *(answer.line for answer in answers)]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    text = "".join(lines).encode()
    # Neither a time nor a name in the header.
    with (
        whole_file(path) as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,
    ):
        packed.write(text)
    return {
        "lines": len(answers),
        "answer_tokens": sum(answer.tokens for answer in answers),
        "unfinished": sum(answer.line["finish_reason"] == "length" for answer in answers),
        "retokenised": sum(answer.retokenised for answer in answers),
        "families": dict(Counter(answer.line["family"] for answer in answers)),
        # Of the lines: another zlib packs the same ones into other bytes.
        "unpacked_sha256": hashlib.sha256(text).hexdigest(),
    }


def command(verb: str, *paths: Path, settings: dict[str, Any]) -> str:
    """The command that wrote a file, from the settings that its lines record."""
    words = ["domino", verb, *(path.name for path in paths)]
    for name, value in settings.items():
        if value not in (None, {}) and name not in HASHES:
            option = f"--{name.replace('_', '-')}"
            words += [option, json.dumps(value) if isinstance(value, dict) else str(value)]
    return shlex.join(words)


def source_record(source: Source) -> dict[str, Any]:
    """The hashes of a source and, where they are told, the commands that wrote it."""
    commands = []
    if settings := header_of(source.prompts)["generator"]:
        commands.append(command("prompts", source.prompts, settings=settings))
    settings = header_of(source.answers)["generator"]
    commands.append(command("regenerate", source.prompts, source.answers, settings=settings))
    hashes = {path.name: file_sha256(path) for path in (source.prompts, source.answers)}
    return {"sha256": hashes, "commands": commands}


def make(
    own: Sequence[Source],
    families: Source,
    out: Path,
    *,
    heldout: int,
    sizes: Sequence[int],
    max_length: int,
) -> dict[str, Any]:
    """Writes all files of `out` but the record; returns what the record says of them."""
    sources = [*own, families]
    headers = [header_of(source.answers) for source in sources]
    # The settings that all of them share: whose tokens they are, and how they were chosen.
    common = {
        name: value
        for name, value in headers[0]["generator"].items()
        if all(header["generator"].get(name) == value for header in headers)
    }
    target = common.get("target")
    if target is None:
        raise SystemExit("answers of several targets, or of an unknown one; expected one target")
    header = headers[0] | {"generator": common}
    tokenizer = load_tokenizer(resolve_target(target))
    usable = [answered(source, tokenizer, max_length=max_length) for source in sources]
    own_answers = [answer for part in usable[:-1] for answer in part]
    if len(own_answers) <= heldout:
        raise SystemExit(f"--heldout {heldout}: there are {len(own_answers)} own prompts")
    cut = len(own_answers) - heldout
    kept_back = own_answers[cut:]
    answers, left_out = trainable([*own_answers[:cut], *usable[-1]], kept_back)
    lines = sum(len(read_records(source.answers)) for source in sources)
    left_out["unusable"] = lines - sum(map(len, usable))

    parts = {f"train-{size_name(size)}": beginning(answers, size) for size in sorted(sizes)}
    parts["heldout-own"] = kept_back
    out.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, part in parts.items():
        files[f"{name}.jsonl.gz"] = write_packed(out / f"{name}.jsonl.gz", header, part)
    return {
        "target": target,
        "sources": [source_record(source) for source in sources],
        "left_out": dict(left_out),
        "files": files,
    }


def own_command(options: argparse.Namespace) -> str:
    """The command of this script, files by their names alone: where they lay says nothing."""
    words = ["python", "scripts/experiments/make_answers.py"]
    for paths in options.own:
        words += ["--own", *(path.name for path in paths)]
    words += ["--families", *(path.name for path in options.families)]
    words += ["--heldout", str(options.heldout), "--tokens", *map(str, options.tokens)]
    return shlex.join([*words, "--max-length", str(options.max_length)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    pair: dict[str, Any] = {
        "nargs": 2,
        "type": Path,
        "required": True,
        "metavar": ("PROMPTS", "ANSWERS"),
    }
    parser.add_argument(
        "--own", action="append", help="the target's own prompts and its answers", **pair
    )
    parser.add_argument("--families", help="make_prompts.py's, and the answers to them", **pair)
    parser.add_argument("--heldout", type=int, default=64, help="own prompts that are held out")
    parser.add_argument("--tokens", type=int, nargs="+", required=True, help="sizes to write")
    parser.add_argument(
        "--max-length", type=int, default=512, help="data.max_length that tokens are counted under"
    )
    parser.add_argument("--out", type=Path, default=ANSWERS)
    options = parser.parse_args()
    try:
        made = make(
            [Source(*paths) for paths in options.own],
            Source(*options.families),
            options.out,
            heldout=options.heldout,
            sizes=options.tokens,
            max_length=options.max_length,
        )
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    record = {"command": own_command(options), **made}
    write_whole(options.out / "record.json", json.dumps(record, indent=2) + "\n")
    for name, entry in made["files"].items():
        path = options.out / name
        print(f"{path}: {entry['lines']} answers, {entry['answer_tokens']} tokens of them")


if __name__ == "__main__":
    main()
