"""The script that makes the committed answers: nested sizes, nothing of what is evaluated on."""

import gzip
import hashlib
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import make_answers
import pytest
from make_prompts import (
    essence,
    leaks,
    numbered_records,
    prompt_record,
    read_records,
    text_of,
    write_records,
)
from tiny import write_target

from domino_jax.data.conversations import load_rows
from domino_jax.data.forms import read_conversations
from domino_jax.data.prompt import encode_prompt
from domino_jax.data.template import tokenizer_record
from domino_jax.target.load import load_tokenizer

RECORD = make_answers.ANSWERS / "record.json"
SIZES = (120, 240, 480)


def letters(number: int, count: int) -> str:
    return " ".join("abcdefghij"[number // 10**place % 10] for place in range(count))


def write_answers(
    path: Path, prompts: list[dict[str, Any]], target: Path, *, first: int = 1
) -> None:
    """As `regenerate`: in another order than the prompts', without their labels."""
    tokenizer = load_tokenizer(target)
    generator = {"target": str(target), "max_new_tokens": 8, "chat_template_kwargs": {}}
    header = {"generator": generator | tokenizer_record(tokenizer)}
    lines = []
    for number, prompt in enumerate(prompts, start=1):
        text = letters(7 * number, 1 + number % 8)
        answer = {"role": "assistant", "content": text}
        line = {"messages": [*prompt["messages"], answer], "prompt_line": first + number - 1}
        line["prompt_ids"] = encode_prompt(prompt["messages"], tokenizer).tolist()
        finished = number % 8 > 0
        line["output_ids"] = tokenizer.encode(text) + [tokenizer.eos_token_id] * finished
        lines.append(line | {"finish_reason": "stop" if finished else "length"})
    lines.sort(key=lambda line: len(line["messages"][1]["content"]))
    write_records(path, [header, *lines])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    target = write_target(tmp_path / "target")
    drawn = {"target": str(target), "count": 60, "language": None, "seed": 0}
    texts = [letters(number, 3) for number in range(60)]
    own = [prompt_record(text) for text in texts]
    # Held out once more in another dress, among the last eight; and one that is evaluated on.
    own[5]["messages"][0]["content"] = f"{letters(55, 3).upper()}!"
    own[6]["messages"][0]["content"] = "What is the capital of Australia ?"
    families = [
        prompt_record(f"k {text}", family="xyz"[number % 3]) for number, text in enumerate(texts)
    ]
    for name, prompts in (("own", own), ("families", families)):
        header = [{"generator": drawn}] if name == "own" else []
        write_records(tmp_path / f"{name}.jsonl", [*header, *prompts])
        write_answers(tmp_path / f"{name}-answers.jsonl", prompts, target, first=1 + len(header))
    return tmp_path


def make(place: Path, *more_own: str, **changed: object) -> Path:
    words: dict[str, Any] = {"heldout": 8, "tokens": SIZES, "out": place / "out", **changed}
    argv = ["make_answers.py"]
    for name in ("own", *more_own, "families"):
        option = "--families" if name == "families" else "--own"
        argv += [option, str(place / f"{name}.jsonl"), str(place / f"{name}-answers.jsonl")]
    for name, value in words.items():
        values = value if isinstance(value, tuple) else (value,)
        argv += [f"--{name.replace('_', '-')}", *map(str, values)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        make_answers.main()
    return Path(words["out"])


def lines(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    return [line for line in found if "messages" in line]


def test_sizes_are_nested_and_hold_every_family_alike(place: Path) -> None:
    out = make(place)
    tokenizer = load_tokenizer(place / "target")
    record = json.loads((out / "record.json").read_text())
    parts = [lines(out / f"train-{size}.jsonl.gz") for size in SIZES]
    for size, part in zip(SIZES, parts, strict=True):
        path = out / f"train-{size}.jsonl.gz"
        rows = load_rows(path, tokenizer, max_length=512)
        counts = [int(row.loss_mask.sum()) for row in rows.rows]
        assert size <= sum(counts) < size + counts[-1]
        said = record["files"][path.name]
        families = Counter(line["family"] for line in part)
        assert said == {
            "lines": len(part),
            "answer_tokens": sum(counts),
            "unfinished": rows.unfinished,
            "retokenised": 0,
            "families": families,
            "unpacked_sha256": hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest(),
        }
        for family, whole in {"own": 50, "x": 20, "y": 20, "z": 20}.items():
            assert families[family] == pytest.approx(len(part) * whole / 110, abs=1)
    assert parts[2][: len(parts[1])] == parts[1] and parts[1][: len(parts[0])] == parts[0]
    kept = {"messages", "prompt_ids", "output_ids", "finish_reason", "family"}
    assert all(set(line) == kept for line in parts[2])
    assert [make_answers.size_name(size) for size in (100_000, 1_500)] == ["100k", "1500"]


def test_what_is_held_out_or_evaluated_on_is_not_trained_on(place: Path) -> None:
    out = make(place)
    heldout = lines(out / "heldout-own.jsonl.gz")
    assert [text_of(line) for line in heldout] == [letters(number, 3) for number in range(52, 60)]
    trained = {essence(line) for line in lines(out / "train-480.jsonl.gz")}
    assert not trained & {essence(line) for line in heldout}
    assert "what is the capital of australia" not in trained
    record = json.loads((out / "record.json").read_text())
    assert record["left_out"] == {"unusable": 0, "evaluated on": 2}


def test_own_prompts_may_come_in_parts(place: Path) -> None:
    more = [prompt_record(letters(number, 3)) for number in range(50, 80)]
    write_records(place / "more.jsonl", more)
    write_answers(place / "more-answers.jsonl", more, place / "target")
    out = make(place, "more")
    heldout = [text_of(line) for line in lines(out / "heldout-own.jsonl.gz")]
    assert heldout == [letters(number, 3) for number in range(72, 80)]
    record = json.loads((out / "record.json").read_text())
    # Drawn in both parts: 50 to 59, and 55 in another dress.
    assert record["left_out"] == {"unusable": 0, "evaluated on": 1, "repeated": 11}
    assert len(record["sources"]) == 3
    assert "--own own.jsonl own-answers.jsonl --own more.jsonl more-ans" in record["command"]


def test_bytes_depend_on_the_answers_alone(place: Path) -> None:
    one = make(place)
    other = make(place, out=place / "other")
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    # The header's flags and time: no name, no date.
    assert (one / "train-120.jsonl.gz").read_bytes()[3:8] == bytes(5)


def test_the_record_tells_sources_and_commands(place: Path) -> None:
    record = json.loads((make(place) / "record.json").read_text())
    target = str(place / "target")
    own, families = record["sources"]
    assert own["commands"] == [
        f"domino prompts own.jsonl --target {target} --count 60 --seed 0",
        f"domino regenerate own.jsonl own-answers.jsonl --target {target} --max-new-tokens 8",
    ]
    assert len(families["commands"]) == 1
    digest = hashlib.sha256((place / "own.jsonl").read_bytes()).hexdigest()
    assert own["sha256"]["own.jsonl"] == digest
    assert record["target"] == target and record["command"].endswith(
        "--heldout 8 --tokens 120 240 480 --max-length 512"
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": (10**6,)}, "--tokens 1000000: the answers to train on have "),
        ({"heldout": 60}, "--heldout 60: there are 60 own prompts"),
        ({"max_length": 4}, "no usable line"),
    ],
)
def test_what_cannot_be_made_is_one_line(
    place: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        make(place, **changed)
    assert not (place / "out").exists()


def test_sources_that_do_not_fit_are_refused(place: Path) -> None:
    prompts, answers = place / "own.jsonl", place / "own-answers.jsonl"
    header, *records = numbered_records(prompts).values()
    write_records(prompts, [header, records[1], records[0], *records[2:]])
    with pytest.raises(SystemExit, match=r"own-answers\.jsonl:\d+: answers another prompt than"):
        make(place)
    write_records(prompts, [header, *records])
    write_records(answers, [*numbered_records(answers).values(), {"generator": {"seed": 1}}])
    with pytest.raises(SystemExit, match=r"own-answers\.jsonl: lines of several settings"):
        make(place)
    write_answers(answers, records, write_target(place / "other"), first=2)
    with pytest.raises(SystemExit, match="expected one target"):
        make(place)


@pytest.mark.skipif(not RECORD.is_file(), reason="no answers are committed")
def test_committed_answers_are_what_their_record_says() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    texts = {}
    for name, said in record["files"].items():
        path = RECORD.parent / name
        texts[name] = gzip.decompress(path.read_bytes())
        assert hashlib.sha256(texts[name]).hexdigest() == said["unpacked_sha256"], name
        found = read_conversations(path)
        assert not found.bad_lines and len(found.conversations) == said["lines"]
        assert Counter(line["family"] for line in lines(path)) == said["families"]
        assert all(each.generator and each.input_ids is not None for each in found.conversations)
    sizes = sorted((text for name, text in texts.items() if name.startswith("train-")), key=len)
    for smaller, larger in itertools.pairwise(sizes):
        assert larger.startswith(smaller)
    evaluated = {"heldout-own": lines(RECORD.parent / "heldout-own.jsonl.gz")}
    for name in make_answers.EVALUATED:
        evaluated[name] = read_records(make_answers.PROMPTS / f"{name}.jsonl")
    largest = [json.loads(line) for line in sizes[-1].splitlines()[1:]]
    assert not leaks({"train": largest}, evaluated)
