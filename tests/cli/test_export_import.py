"""`domino export` and `domino import`: equal bits, and drafts that are refused."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from disk import files_end_at
from safetensors.numpy import load_file, save_file

from domino_jax import load_hf_draft
from domino_jax.training.checkpoint import load_draft, save_draft


def test_export_and_import_give_equal_bits(domino, trained: Path, tmp_path: Path) -> None:
    exported, run = tmp_path / "draft", tmp_path / "imported"
    code, out, log = domino("export", trained / "run", exported, "--dtype", "float32")
    assert (code, out) == (0, f"{exported}\n")
    assert log.startswith(f"loading the draft of {trained / 'run'}\nsaving {exported}\n")
    assert domino("import", exported, run, "--target", trained / "target")[0] == 0
    before, after = load_draft(trained / "run"), load_draft(run)
    assert before.record.config == after.record.config and after.step == 0
    for ours, theirs in zip(*map(jax.tree.leaves, (before.params, after.params)), strict=True):
        assert np.array_equal(ours, theirs)
    again = tmp_path / "again"
    assert domino("export", run, again, "--dtype", "float32")[0] == 0
    code, _, log = domino("export", run, again)
    assert code == 2 and "already there" in log and "loading" not in log
    bits = [(place / "model.safetensors").read_bytes() for place in (exported, again)]
    assert bits[0] == bits[1]
    assert load_hf_draft(again)[0] == before.record.config


def test_export_for_an_engine_refuses_what_it_would_misread(
    domino, trained: Path, tmp_path: Path
) -> None:
    draft = tmp_path / "draft"
    code, out, log = domino("export", trained / "run", draft, "--for", "vllm")
    assert (code, out) == (2, "") and not draft.exists()
    assert "not for vllm: projector_type is domino" in log and "; shift_label is true: " in log
    code, out, log = domino("export", trained / "run", draft, "--for", "sglang")
    assert (code, out) == (0, f"{draft}\n") and "sglang proposes 3 tokens per cycle (K - 1)" in log
    assert "proposes" not in domino("export", trained / "run", tmp_path / "other")[2]


def test_a_draft_that_is_not_finite_is_neither_exported_nor_imported(
    domino, trained: Path, tmp_path: Path
) -> None:
    stored, draft, again = load_draft(trained / "run"), tmp_path / "draft", tmp_path / "again"
    norm = stored.params["norm"]
    norm["weight"] = norm["weight"].at[2].set(np.inf)
    save_draft(tmp_path / "run", stored.params, stored.record)

    def refused(*words: object) -> None:
        code, out, log = domino(*words)
        assert (code, out) == (2, "") and "Traceback" not in log and not Path(words[2]).exists()
        told = "tensor norm.weight: 1 of 16 entries are not finite in bfloat16; "
        assert told in log.splitlines()[-1]

    refused("export", tmp_path / "run", draft)
    assert domino("export", trained / "run", draft)[0] == 0
    (draft / "SHA256SUMS").unlink()
    tensors = load_file(draft / "model.safetensors")
    tensors["norm.weight"][2] = np.inf
    save_file(tensors, draft / "model.safetensors")
    refused("import", draft, again, "--target", trained / "target")


@pytest.mark.pitfall(
    "mask token aliases eos, pad or bos, or changes on resume or import",
    seen="cli/loading.py: special tokens not compared",
)
def test_import_checks_mask_token_template_and_shape(domino, trained: Path, tmp_path: Path) -> None:
    exported, target, run = tmp_path / "draft", tmp_path / "target", tmp_path / "run"
    assert domino("export", trained / "run", exported)[0] == 0
    shutil.copytree(trained / "target", target)

    def refused(message: str) -> None:
        code, out, log = domino("import", exported, run, "--target", target)
        assert (code, out) == (2, "") and message in log.strip().splitlines()[-1], log
        assert not run.exists()

    template, tokenizer = target / "chat_template.jinja", target / "tokenizer_config.json"
    text, settings = template.read_text(), json.loads(tokenizer.read_text())
    template.write_text("{# another #}" + text)
    refused("draft: the chat template of")
    template.write_text(text)
    tokenizer.write_text(json.dumps(settings | {"pad_token": "<mask>"}))
    refused("mask_token_id 2 is the target's pad token")
    tokenizer.write_text(json.dumps(settings))
    (target / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    refused("mask_token_id 2 is the target's stop token")
    (target / "generation_config.json").unlink()
    config = json.loads((exported / "config.json").read_text())
    (exported / "SHA256SUMS").unlink()
    (exported / "config.json").write_text(json.dumps(config | {"num_target_layers": 5}))
    refused("the draft reads a target of 5 layers, this one has 4")
    # As other trainers write it: nothing is known of the template.
    assert len(config.pop("chat_template_sha256")) == 64
    (exported / "config.json").write_text(json.dumps(config))
    code, out, log = domino("import", exported, run, "--target", target)
    assert (code, out) == (0, f"{run}\n") and "does not say which chat template" in log


def test_a_full_disk_is_one_line_that_says_what_is_kept(
    domino, trained: Path, tmp_path: Path
) -> None:
    draft = tmp_path / "draft"
    with files_end_at(4000):
        code, out, err = domino("export", trained / "run", draft)
    assert (code, out) == (2, "")
    kept = f"{draft} is whole or was not made; the same command starts over"
    assert err.splitlines()[-1] == f"error: {draft}: File too large; {kept}"
