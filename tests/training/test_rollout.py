"""A rollout inside training says what the verbs would measure of the same checkpoint."""

import functools
import json
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from documents import fields_of
from saved_bits import final_bits
from tiny import WORDS, Heard, quiet, run_config, with_ends, write_conversations
from whole_run import train

from domino_jax.base.errors import Diverged, InputError, Interrupted
from domino_jax.config.run import load_config
from domino_jax.data.prompt import encode_prompt, stop_token_ids
from domino_jax.datagen.capture import capture
from domino_jax.decoding import speculate
from domino_jax.decoding.decoder import Weights, make_decoder
from domino_jax.decoding.generate import generate
from domino_jax.decoding.speculate import required_cache_len
from domino_jax.draft.backbone import DraftModel
from domino_jax.evaluation.counts import acceptance, tau
from domino_jax.target.decoder import Target
from domino_jax.target.load import load_target, load_tokenizer
from domino_jax.training.checkpoint import load_draft
from domino_jax.training.log import read_metrics
from domino_jax.training.prepare import capture_inputs, prepare
from domino_jax.training.records import read_run_record
from domino_jax.training.rollout import rollout_decoder

PROPOSALS = 3  # K - 1
TOKENS = 12
PROMPTS = 11
ROLLOUTS: dict[str, Any] = {
    "steps": 20,
    "log_every": 10,
    "eval_every": 10,
    "checkpoint_every": 10,
    "rollout_every": 12,
    "rollout_prompts": PROMPTS,
    "rollout_tokens": TOKENS,
}


def write_heldout(place: Path) -> Path:
    """A batch of short prompts, then some of several rounds that fill another bucket."""
    short = write_conversations(place / "short.jsonl", 8, seed=3).read_text()
    long = write_conversations(place / "long.jsonl", 5, seed=4, rounds=4).read_text()
    path = place / "heldout.jsonl"
    path.write_text(short + long)
    return path


def write_answered(place: Path, target: Path, heldout: Path) -> None:
    """Makes the target's own answers to the prompts the training rows: a draft learns to hold."""
    loaded, tokenizer = load_target(target), load_tokenizer(target)
    conversations = map(json.loads, heldout.read_text().splitlines())
    asked = [line["messages"][:-1] for line in conversations]
    prompts = [encode_prompt(messages, tokenizer) for messages in asked]
    decoder = make_decoder(Target(loaded.config))
    answers = generate(decoder, Weights(loaded.params), prompts, max_new_tokens=TOKENS)
    lines = []
    for messages, answer in zip(asked, answers, strict=True):
        words = tokenizer.decode(answer.tokens).replace(tokenizer.eos_token, "a")
        answered = [*messages, {"role": "assistant", "content": words}]
        lines.append(json.dumps({"messages": answered}) + "\n")
    (place / "rows.jsonl").write_text("".join(2 * lines))


def decoded(run: Path, target: Path, heldout: Path, *, step: int) -> dict[str, float | None]:
    """What the verbs decode of a checkpoint: layers apart, one device, one prompt at a time."""
    loaded, tokenizer = load_target(target), load_tokenizer(target)
    draft = load_draft(run, reporter=quiet(), step=step)
    decoder = make_decoder(
        Target(loaded.config),
        DraftModel(draft.record.config),
        proposals="serving",
        stop_ids=stop_token_ids(tokenizer),
    )
    conversations = map(json.loads, heldout.read_text().splitlines()[:PROMPTS])
    prompts = [encode_prompt(line["messages"][:-1], tokenizer) for line in conversations]
    assert min(map(len, prompts)) < speculate.PROMPT_BUCKET < max(map(len, prompts))
    weights = Weights(loaded.params, draft.params)
    cache_len = required_cache_len(decoder, max(map(len, prompts)), TOKENS)
    answers = []
    for prompt in prompts:
        answers += generate(decoder, weights, [prompt], max_new_tokens=TOKENS, cache_len=cache_len)
    held = acceptance(answers, PROPOSALS)
    figures: dict[str, float | None] = {"tau": tau(answers), "prompts": len(answers)}
    figures["tokens"] = sum(len(answer.tokens) for answer in answers)
    for position in range(PROPOSALS):
        figures[f"marginal_{position + 1}"] = held.marginal[position]
        figures[f"conditional_{position + 1}"] = held.conditional[position]
    return figures


def captured(path: Path, states: Path) -> list[str]:
    """Captures the rows of a run, and the words that train it from them."""
    size = {"limit_gb": 1.0, "confirmed": False}
    kind: dict[str, Any] = {"dtype": "float32", "target_states": False}
    read = functools.partial(capture_inputs, load_config(path), reporter=quiet())
    capture(read, states, **kind, **size, reporter=quiet())
    return ["data.train=null", f"data.hidden_states={states}"]


@pytest.mark.parametrize(
    ("mesh", "offline"),
    [({}, False), ({"data": 2, "fsdp": 2, "tensor": 2}, True)],
    ids=["data, online", "all axes, offline"],
)
def test_a_rollout_is_what_the_checkpoint_decodes(
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mesh: dict[str, int],
    offline: bool,
) -> None:
    """To the last figure, through programs that are compiled once for all batches."""
    sections: dict[str, Any] = {"train": {**ROLLOUTS, "tensorboard": True}, "mesh": mesh}
    sections |= {"data": {"max_length": 48}, "loss": {"num_anchors": 16}}
    sections |= {"optimizer": {"learning_rate": 2e-2, "ema_decay": 0.8}}
    path = run_config(tmp_path, target, **sections)
    heldout = write_heldout(tmp_path)
    write_answered(tmp_path, target, heldout)
    words = captured(path, tmp_path / "states") if offline else []
    # Of both programs of decoding: the one that reads prompts, and the loop over cycles.
    traces: list[str] = []
    remember = speculate.remember

    def counted(*arguments: Any) -> Any:
        traces.append("")
        return remember(*arguments)

    jax.clear_caches()
    monkeypatch.setattr(speculate, "remember", counted)
    heard = Heard()
    run = train(load_config(path, words), reporter=heard)
    assert len(traces) == 2
    monkeypatch.undo()

    records = read_metrics(run)
    order = [(line["step"], line["split"]) for line in records]
    assert order == [
        (0, "data"),
        *((10, split) for split in ("train", "heldout")),
        (12, "rollout"),
        *((20, split) for split in ("train", "heldout", "rollout")),
    ]
    last = records[-1]
    assert last.keys() == fields_of("rollout", proposals=PROPOSALS)
    expected = decoded(run, target, heldout, step=20)
    for name, figure in expected.items():
        assert last[name] == pytest.approx(figure, abs=1e-6), name
    # Far from a draft that nothing is kept of, in which other weights would look alike.
    assert last["tau"] > 1.2 and last["prompts"] == PROMPTS
    assert f"step 20/20  rolled out: tau {last['tau']:.2f}  marginal " in heard.text
    (board,) = (run / "tensorboard").iterdir()
    for name in ("tau", "marginal_1"):
        assert f"rollout/{name}".encode() in board.read_bytes()


class Stop:
    """Asks a run to stop, at its n-th question and at all behind it."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __call__(self) -> bool:
        self._left -= 1
        return self._left < 1


def test_a_stop_between_the_passes_of_a_step_is_made_up_for(target: Path, tmp_path: Path) -> None:
    """A stop before, in and behind each of them: the log and the bits are those of one start.

    Nor do rollouts change the draft, though the target's upper layers run for them.
    """
    settings = {**ROLLOUTS, "steps": 5, "eval_every": 2, "rollout_every": 2}
    settings["checkpoint_every"] = 100
    for name in ("whole", "stopped", "without"):
        (tmp_path / name).mkdir()
    without = run_config(tmp_path / "without", target, train={**settings, "rollout_every": None})
    plain = train(load_config(without), reporter=quiet())
    whole = load_config(run_config(tmp_path / "whole", target, train=settings))
    train(whole, reporter=quiet())
    stopped = load_config(run_config(tmp_path / "stopped", target, train=settings))
    directory = tmp_path / "stopped" / "run"
    # Held-out rows and prompts are a batch each: step 1 asks once, step 2 before the held-out pass,
    # before the rollout and behind it.
    stops = [
        (2, 2, "in the held-out pass", (True, True), []),
        (3, 4, "in the rollout", (False, True), ["heldout"]),
        (2, 5, "in the rollout of the last step", (False, True), ["train", "heldout"]),
    ]
    for question, step, place, due, told in stops:
        with pytest.raises(Interrupted):
            train(stopped, reporter=quiet(), stop_requested=Stop(question))
        record = read_run_record(directory / "checkpoints" / str(step))
        assert (record.heldout_due, record.rollout_due) == due, place
        splits = [line["split"] for line in read_metrics(directory) if line["step"] == step]
        assert splits == told, place
    heard = Heard()
    train(stopped, reporter=heard)
    assert "rolled out" in heard.text and "already trained" in heard.text
    bits = final_bits(tmp_path / "whole" / "run", 5)
    chex.assert_trees_all_equal(bits, final_bits(directory, 5))
    chex.assert_trees_all_equal(bits, final_bits(plain, 5))
    logs = [tmp_path / name / "run" / "metrics.jsonl" for name in ("whole", "stopped")]
    assert logs[0].read_bytes() == logs[1].read_bytes()


def test_a_rollout_that_is_due_is_dropped_with_rollouts(target: Path, tmp_path: Path) -> None:
    """How often they are made is free at each start."""
    settings = {**ROLLOUTS, "steps": 2, "rollout_every": 1}
    path = run_config(tmp_path, target, train=settings)
    with pytest.raises(Interrupted):
        train(load_config(path), reporter=quiet(), stop_requested=Stop(1))
    train(load_config(path, ["train.rollout_every=null"]), reporter=quiet())
    splits = [line["split"] for line in read_metrics(tmp_path / "run")]
    assert splits == ["data", "train", "heldout"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train.rollout_tokens=129",), "train.rollout_tokens 129: the target has 128 positions"),
        ((), r"heldout.jsonl:14: a prompt of \d+ tokens, the target has 128 positions"),
    ],
)
def test_what_the_target_has_no_positions_for_is_refused(
    target: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    path = run_config(tmp_path, target, train=ROLLOUTS)
    heldout = write_heldout(tmp_path)
    endless = write_conversations(tmp_path / "endless.jsonl", 1, rounds=9).read_text()
    heldout.write_text(heldout.read_text() + endless)
    with pytest.raises(InputError, match=message):
        train(load_config(path, ["train.rollout_prompts=99", *words]), reporter=quiet())
    assert not (tmp_path / "run").exists()


def test_a_rollout_ends_at_the_end_tokens_of_the_directory(target: Path, tmp_path: Path) -> None:
    ends = with_ends(target, tmp_path / "target", WORDS.index("<unk>"))
    path = run_config(tmp_path, ends, train=ROLLOUTS)
    inputs = prepare(load_config(path), reporter=quiet()).inputs
    assert rollout_decoder(inputs).stop_ids == (0, WORDS.index("<unk>"))


def test_prompts_are_those_of_the_rows(target: Path, tmp_path: Path) -> None:
    """A line that gives no row gives no prompt, and the next one takes its place."""
    path = run_config(tmp_path, target, train={**ROLLOUTS, "rollout_prompts": 3})
    heldout = write_conversations(tmp_path / "heldout.jsonl", 5, seed=1)
    lines = heldout.read_text().splitlines()
    question = {"messages": json.loads(lines[0])["messages"][:1]}
    thanks = json.loads(lines[2])
    thanks["messages"].append({"role": "user", "content": "a b"})
    lines[:3] = [json.dumps(question), "not JSON", json.dumps(thanks)]
    heldout.write_text("\n".join(lines) + "\n")
    settings = load_config(path, ["data.max_unusable=0.4"])
    prompts = prepare(settings, reporter=quiet()).inputs.prompts
    tokenizer = load_tokenizer(target)
    assert len(prompts) == 3
    for index, (prompt, line) in enumerate(zip(prompts, lines[2:], strict=True)):
        # The first ends with a question, which the verbs would ask as it stands.
        question = json.loads(line)["messages"][: 1 if index else 3]
        np.testing.assert_array_equal(prompt, encode_prompt(question, tokenizer))


@pytest.mark.parametrize("learning_rate", [1e19, 1e30])
def test_a_rollout_of_a_draft_that_diverged_ends_the_run(
    target: Path, tmp_path: Path, learning_rate: float
) -> None:
    """Its parameters may still be finite: a figure of such a draft is not one."""
    settings = {**ROLLOUTS, "steps": 3, "rollout_every": 2, "checkpoint_every": 1}
    path = run_config(tmp_path, target, train=settings, optimizer={"learning_rate": learning_rate})
    with pytest.raises(Diverged) as raised:
        train(load_config(path), reporter=quiet())
    said = str(raised.value)
    begin = "stopped: the rollout after step 2 failed: the draft's logits are not finite in "
    assert said.startswith(begin) and "the newest checkpoint, of step 1, is finite" in said
    assert [line for line in read_metrics(tmp_path / "run") if line["split"] == "rollout"] == []
