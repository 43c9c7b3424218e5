"""Rows and prompts that a target cannot read are refused, by line; so is a mask token in use."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny import (
    CONFIG,
    MASK_TOKEN_ID,
    WORDS,
    Heard,
    add_token,
    quiet,
    run_config,
    with_ends,
    write_target,
)
from whole_run import train

from domino_jax.base.errors import InputError, Interrupted
from domino_jax.config.run import load_config
from domino_jax.data.conversations import Row
from domino_jax.data.forms import iterate_conversations
from domino_jax.target.load import load_tokenizer
from domino_jax.training import inputs
from domino_jax.training.checkpoint import load_draft
from domino_jax.training.prepare import capture_inputs, check, read_inputs, read_models


def say(*words: str) -> str:
    """A line of a file in which the target answers with these words."""
    answer = {"role": "assistant", "content": " ".join(words)}
    return json.dumps({"messages": [{"role": "user", "content": "a"}, answer]})


def add_line(path: Path, line: str, *, at: int) -> None:
    lines = path.read_text().splitlines()
    lines.insert(at - 1, line)
    path.write_text("\n".join(lines) + "\n")


OUTSIDE = "token '<new>' (id 32) is outside the target's vocab_size 32; use the tokenizer that"
MASKED = "the row contains token '<mask>' (id 2), the mask token; 2 of "
MANY = ["b"] * 130
READERS = ["train", "eval", "capture"]


@pytest.mark.pitfall(
    "end tokens ignored, ids beyond the embedding, a mask token in use",
    seen="training/inputs.py: ids and mask token of rows not compared",
)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (say("b", "<new>", "c"), OUTSIDE),
        (say("b", "<mask>", "c"), MASKED),
        (say(*MANY), "a row of 137 tokens, the target has 128 positions; set data.max_length to"),
    ],
)
def test_a_row_that_the_target_cannot_read_is_refused(
    tmp_path: Path, reader: str, line: str, message: str
) -> None:
    target = add_token(write_target(tmp_path / "target"))
    path = run_config(tmp_path, target, data={"max_length": 400})
    name = "heldout.jsonl" if reader == "eval" else "rows.jsonl"
    # Two of them: the message names the first.
    for at in (3, 5):
        add_line(tmp_path / name, line, at=at)
    config = load_config(path)
    with pytest.raises(InputError) as caught:
        if reader == "capture":
            capture_inputs(config, {}, reporter=quiet())
        else:
            checked = check(config, reporter=quiet(), set_aside=False)
            read_inputs(checked, target_sha256=str, reporter=quiet())
    assert str(caught.value).startswith(f"{tmp_path / name}:3: {message}")


def test_a_row_is_as_long_as_it_is_cut(target: Path, tmp_path: Path) -> None:
    """A line longer than the positions is a row of `data.max_length` tokens."""
    path = run_config(tmp_path, target, data={"max_length": 128})
    add_line(tmp_path / "rows.jsonl", say(*MANY), at=1)
    checked = check(load_config(path), reporter=quiet(), set_aside=False)
    inputs = read_inputs(checked, target_sha256=str, reporter=quiet())
    assert len(inputs.rows.rows[0].input_ids) == 128


def test_a_prompt_of_a_rollout_with_an_unknown_id_is_refused(tmp_path: Path) -> None:
    """The row ends before the token: its prompt is longer."""
    target = add_token(write_target(tmp_path / "target"))
    path = run_config(tmp_path, target, train={"rollout_every": 2, "rollout_prompts": 9})
    turns = json.loads(say("b"))["messages"]
    question = {"role": "user", "content": " ".join(["b"] * 30 + ["<new>"])}
    answer = {"role": "assistant", "content": "c"}
    add_line(tmp_path / "heldout.jsonl", json.dumps({"messages": [*turns, question, answer]}), at=2)
    checked = check(load_config(path), reporter=quiet(), set_aside=False)
    with pytest.raises(InputError, match=r"heldout\.jsonl:2: token '<new>' "):
        read_inputs(checked, target_sha256=str, reporter=quiet())


def without_mask(directory: Path, target: Path, **sections: Any) -> Path:
    """The configuration of a run that names no mask token."""
    path = run_config(directory, target, **sections)
    tree = json.loads(path.read_text())
    del tree["draft"]["mask_token_id"]
    path.write_text(json.dumps(tree))
    return path


def test_a_mask_token_is_chosen_recorded_and_found_again(target: Path, tmp_path: Path) -> None:
    path = without_mask(tmp_path, target)
    heard, asked = Heard(), []

    def stop() -> bool:
        asked.append(0)
        return len(asked) == 3

    with pytest.raises(Interrupted):
        train(load_config(path), reporter=heard, stop_requested=stop)
    said = "draft.mask_token_id 2: '<mask>', a special token without a role"
    assert said in heard.lines
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["draft"]["mask_token_id"] == MASK_TOKEN_ID
    train(load_config(path), reporter=quiet())
    draft = load_draft(tmp_path / "run")
    assert draft.step == 6 and draft.record.config.mask_token_id == MASK_TOKEN_ID
    # A plan and a capture of the same settings are of the same draft.
    assert read_models(load_config(path), reporter=heard).draft == draft.record.config
    assert heard.lines.count(said) == 2
    capture_inputs(load_config(path), {}, reporter=heard)
    assert heard.lines.count(said) == 3


def test_without_a_tokenizer_a_mask_token_is_asked_for(target: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_bytes((target / "config.json").read_bytes())
    config = load_config(without_mask(tmp_path, tmp_path / "target"))
    with pytest.raises(InputError, match=r"draft\.mask_token_id is missing, and only the target's"):
        read_models(config, reporter=quiet())


def test_a_mask_token_may_not_end_an_answer(target: Path, tmp_path: Path) -> None:
    ends = with_ends(target, tmp_path / "target", 0, MASK_TOKEN_ID)
    config = load_config(run_config(tmp_path, ends))
    for read in (
        functools.partial(capture_inputs, recorded={}),
        read_models,
        functools.partial(check, set_aside=False),
    ):
        with pytest.raises(InputError, match="mask_token_id 2 is the target's stop token"):
            read(config, reporter=quiet())
    # One that is not named is another: no token of this vocabulary is left.
    with pytest.raises(InputError, match="give the id of a token that no row contains"):
        read_models(load_config(without_mask(tmp_path, ends)), reporter=quiet())


def test_a_vocabulary_with_room_gives_its_first_unused_id(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target")
    tree = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(tree | {"vocab_size": len(WORDS) + 4}))
    config = load_config(without_mask(tmp_path, target))
    assert read_models(config, reporter=quiet()).draft.mask_token_id == len(WORDS)


def test_lines_without_a_prompt_take_few_passes_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(write_target(tmp_path / "target"))
    without = json.dumps(json.loads(say("b")) | {"chat_template_kwargs": {"nothing": 1}})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{line}\n" for line in [*[without] * 500, say("c"), say("d")]))
    ids = np.zeros(1, np.int32)
    rows = [Row(ids, ids.astype(bool), line=line) for line in range(1, 503)]
    passes = []

    def counted(path: str) -> Any:
        passes.append(path)
        return iterate_conversations(path)

    monkeypatch.setattr(inputs, "iterate_conversations", counted)
    for count, found in ((1, 1), (2, 2), (3, 2)):
        prompts = inputs.read_prompts(
            str(path),
            rows,
            tokenizer,
            CONFIG,
            chat_template_kwargs={},
            count=count,
            rollout_tokens=4,
        )
        assert len(prompts) == found and len(passes) < 8
        passes.clear()
