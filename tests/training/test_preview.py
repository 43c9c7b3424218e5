"""A dry run tells what a run would be, to the first row, and creates nothing."""

import functools
import io
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny import CONFIG, Heard, quiet, run_config

from domino_jax.config.run import load_config
from domino_jax.datagen.capture import capture
from domino_jax.target.fingerprint import target_fingerprint
from domino_jax.target.load import load_target, load_tokenizer
from domino_jax.training import prepare as preparing
from domino_jax.training.prepare import capture_inputs, check, prepare, read_inputs
from domino_jax.training.preview import escaped, print_preview, supervised_spans
from domino_jax.training.run import RunInputs


def inputs_of(path: Path, *overrides: str) -> RunInputs:
    checked = check(load_config(path, overrides), reporter=quiet(), set_aside=False)
    return read_inputs(checked, target_sha256=str, reporter=quiet())


def preview_of(run: RunInputs, *, width: int = 100, colours: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colours, color_system="truecolor"
    )
    print_preview(run, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def elements(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_a_dry_run_tells_what_rollouts_take(target: Path, tmp_path: Path) -> None:
    path = run_config(tmp_path, target)
    assert "rollout" not in preview_of(inputs_of(path)).partition("target's parameters")[2]
    run = inputs_of(path, "train.rollout_every=2", "train.rollout_prompts=4")
    shown = preview_of(run)
    assert re.search(rf"rollout prompts +4 of up to {max(map(len, run.prompts))} tokens", shown)
    # Keys and values of four layers, one head of 8 in float32; 8 prompts, one a device, each with
    # 64 new tokens and a block of 4.
    longest = max(map(len, run.prompts))
    size = 4 * 2 * 8 * 4 * 8 * (longest + 64 + 4) / 1e9
    assert f"8 at once: {size:.3g} GB of keys and values of the target" in shown


def test_a_dry_run_tells_all_and_creates_nothing(
    domino, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_config(tmp_path, target, optimizer={"grad_accumulation": 2, "ema_decay": 0.9})

    def files() -> dict[Path, int]:
        places = (*tmp_path.rglob("*"), *target.rglob("*"))
        return {file: file.stat().st_mtime_ns for file in places}

    before = files()
    with monkeypatch.context() as weightless:
        weightless.setattr(preparing, "load_sharded_target", None)
        weightless.setattr(preparing, "state_at_start", None)
        code, out, log = domino("train", path, "--dry-run", "mesh.data=4", "mesh.tensor=2")
    assert code == 0 and "loading rows" in log and "loading target" not in log
    assert before == files()
    assert all(len(line) <= 100 or line.startswith("  ") for line in out.splitlines())

    heard = Heard()
    run = prepare(load_config(path, ["mesh.data=4", "mesh.tensor=2"]), reporter=heard)
    assert "the target's 1 key-value heads do not divide over mesh.tensor 2" in heard.text
    assert out.startswith((tmp_path / "run" / "config.yaml").read_text())
    figures = dict(re.findall(r"^(\S.*?)  +(\S.*?) *$", out, re.MULTILINE))
    sizes = {name: elements(tree) for name, tree in run.state.params.items()}
    sizes["layers"] = sizes.pop("layers_0")
    sizes["norms"] = sizes.pop("norm") + sizes.pop("hidden_norm")
    draft = elements(run.state.params)
    assert figures["draft's parameters"].startswith(f"{draft:,}: ")
    parts = set(figures["draft's parameters"].split(": ")[1].split(", "))
    assert parts == {f"{name} {size:,}" for name, size in sizes.items()}
    whole = elements(load_target(target).params)
    table = CONFIG.vocab_size * CONFIG.hidden_size
    assert figures["target's parameters"].startswith(f"{whole:,}: ")
    assert f"embed_tokens {table:,}" in figures["target's parameters"]
    assert f"lm_head {table:,}" in figures["target's parameters"]
    assert figures["a checkpoint"].startswith(f"{16 * draft / 1e9:.3g} GB at most")
    assert figures["on disk"].startswith(f"3 at once, {48 * draft / 1e9:.3g} GB; ")
    rows = run.inputs.rows.rows
    tokens = sum(len(row.input_ids) for row in rows)
    supervised = sum(row.loss_mask.sum() for row in rows)
    padding = f"24 rows ({1 - tokens / (24 * 24):.1%} of their positions are padding)"
    assert padding in figures["training rows"]
    assert f"{tokens:,} tokens, {supervised / tokens:.1%} of them supervised" in out
    assert figures["held-out rows"].startswith("5 rows (")
    assert figures["steps"] == "6 of 16 rows: 4 epochs"
    assert figures["mesh"] == "data 4, fsdp 1, tensor 2: 8 x cpu"
    assert figures["batch: input_ids"] == "int32 [2, 8, 24] a step, [2, 2, 24] a device"
    assert figures["batch: loss_mask"] == "bool [2, 8, 24] a step, [2, 2, 24] a device"


def test_the_first_row_is_shown_with_what_the_loss_counts(target: Path, tmp_path: Path) -> None:
    run = inputs_of(run_config(tmp_path, target))
    plain, coloured = preview_of(run), preview_of(run, colours=True)
    line = int(re.findall(r"first row of the first batch, line (\d+) of ", plain)[0])
    (row,) = [row for row in run.rows.rows if row.line == line]
    words = [run.tokenizer.decode([token]) for token in row.input_ids]
    inside, expected = False, ""
    for word, supervised in zip(words, row.loss_mask.tolist(), strict=True):
        # A span begins with the space before its first word.
        expected += ("⟧" if inside else "") * (supervised != inside) + (
            "⟦" if supervised and not inside else ""
        )
        expected += f" {word}" if expected.strip("⟦") else word
        inside = supervised
    expected += "⟧" if inside else ""
    shown = plain.split("⟦⟧\n")[1]
    assert " ".join(shown.split()) == expected and expected.count("⟦") == 1
    assert "⟦" not in coloured and "\x1b[1;32m" in coloured.split("what the loss counts")[1]


def test_captured_and_packed_rows_are_told(target: Path, tmp_path: Path) -> None:
    path = run_config(tmp_path, target, data={"max_length": 48})
    capture(
        functools.partial(capture_inputs, load_config(path), reporter=quiet()),
        tmp_path / "states",
        dtype="float32",
        target_states=False,
        limit_gb=1.0,
        confirmed=False,
        reporter=quiet(),
    )
    words = ("data.train=null", f"data.hidden_states={tmp_path / 'states'}", "data.packing=true")
    checked = check(load_config(path, words), reporter=quiet(), set_aside=False)
    run = read_inputs(checked, target_sha256=lambda: target_fingerprint(target), reporter=quiet())
    said = preview_of(run)
    assert "packed from 24 conversations" in said and "(of the first 24 rows)" in said
    assert re.search(
        r"batch: features +float32 \[1, 8, 48, 32\] a step, \[1, 1, 48, 32\] a device", said
    )
    documents = max(len(pack) for pack in run.rows.packs or [])
    assert re.search(rf"batch: seq_lens +int32 \[1, 8, {documents}\] a step", said)
    place = rf"first row of the first batch, (row|rows \d+,) \d+ of {tmp_path / 'states'}"
    assert re.search(place, said.replace("\n", ""))


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert escaped("a\x1b[31mb\tc\u202ed\n\ne é漢") == "a\\x1b[31mb\\tc\\u202ed\\n\n\\n\ne é漢"


def test_spans_join_to_the_whole_text(target: Path) -> None:
    tokenizer = load_tokenizer(target)
    ids = np.array(tokenizer.encode("<|im_start|> user a b <|im_end|> c d"))
    mask = np.array([False, False, True, True, False, True, True])
    spans = list(supervised_spans(tokenizer, ids, mask))
    assert [span.supervised for span in spans] == [False, True, False, True]
    assert "".join(span.text for span in spans) == tokenizer.decode(ids)
    words = [span.text.split() for span in spans]
    assert words == [["<|im_start|>", "user"], ["a", "b"], ["<|im_end|>"], ["c", "d"]]
