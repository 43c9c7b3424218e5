"""The command as a user meets it: the whole way on a tiny target, and how bad input ends.

Bad input is one line and exit code 2.
"""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import run_config, seal, write_conversations, write_target

from domino_jax import __version__, load_hf_draft
from domino_jax.training.checkpoint import load_draft, save_draft
from domino_jax.training.skips import Diverged


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a target, a finished run and prompts."""
    from rich.console import Console

    from domino_jax.config.run import load_config
    from domino_jax.training.loop import train

    directory = tmp_path_factory.mktemp("trained")
    (directory / "target").mkdir()
    write_target(directory / "target")
    train(load_config(run_config(directory, directory / "target")), console=Console(quiet=True))
    write_conversations(directory / "prompts.jsonl", 3, seed=5, answers=False)
    return directory


def test_from_prompts_to_an_evaluated_run(domino, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    target = write_target(tmp_path / "target")
    prompts = write_conversations(tmp_path / "prompts.jsonl", 12, answers=False)
    answers = tmp_path / "answers.jsonl"
    words = ("--target", target, "--max-new-tokens", 12, "--batch-size", 8)
    code, out, log = domino("regenerate", prompts, answers, *words)
    assert (code, out) == (0, f"{answers}\n") and "\ncompiling\n" in log
    cut = sum(not json.loads(line)["finished"] for line in answers.read_text().splitlines())
    share = f"{cut} of 12 answers ({cut / 12:.0%})"
    assert cut and f"{share} were cut at 12 tokens" in log
    config = run_config(tmp_path, target)
    code, out, log = domino("train", config, f"data.train={answers}", "data.heldout=null")
    assert (code, out) == (0, f"{tmp_path / 'run'}\n") and "step 6/6" in log
    assert f"{answers}: {share} are unfinished" in log
    code, out, log = domino(
        "evaluate", tmp_path / "run", prompts, "--limit", 2, "--max-new-tokens", 6
    )
    assert code == 0 and "tau, head off" in out
    assert "\nprompts: compiling\n" in log and log.endswith(
        f"saving {tmp_path / 'run' / 'evaluation.json'}\n"
    )
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    figures = report["sets"]["prompts"]
    assert figures["prompts"] == 2 and figures["tokens_compared"] == figures["tokens_equal"]
    assert figures["file"] == str(prompts) and report["training"]["steps"] == 6
    # A tau says nothing without these.
    template = load_draft(tmp_path / "run")[0].chat_template
    measured = {"target": str(target), "chat_template": template.sha256, "step": 6}
    measured |= {"block_size": 4, "proposals": 4, "temperature": 0.0, "max_new_tokens": 6}
    assert measured.items() <= report["evaluator"].items()
    assert "step 6, block 4, 4 proposals, temperature 0.0, 6 new tokens" in " ".join(out.split())


@pytest.mark.parametrize(
    "options", [(), ("--plain",), ("--no-head",), ("--temperature", 0.8, "--proposals", "serving")]
)
def test_generate_streams_an_answer(domino, trained: Path, options: tuple[object, ...]) -> None:
    code, out, log = domino("generate", trained / "run", "a b c", "--max-new-tokens", 8, *options)
    assert code == 0 and out.strip() and "tau" in log


def test_export_and_import_give_equal_bits(domino, trained: Path, tmp_path: Path) -> None:
    exported, run = tmp_path / "draft", tmp_path / "imported"
    code, out, log = domino("export", trained / "run", exported, "--dtype", "float32")
    assert (code, out) == (0, f"{exported}\n")
    assert log.startswith(f"loading the draft of {trained / 'run'}\nsaving {exported}\n")
    assert domino("import", exported, run, "--target", trained / "target")[0] == 0
    (before, params, _), (after, imported, step) = load_draft(trained / "run"), load_draft(run)
    assert before.config == after.config and step == 0
    for ours, theirs in zip(*map(jax.tree.leaves, (params, imported)), strict=True):
        assert np.array_equal(ours, theirs)
    again = tmp_path / "again"
    assert domino("export", run, again, "--dtype", "float32")[0] == 0
    code, _, log = domino("export", run, again)
    assert code == 2 and "already there" in log and "loading" not in log
    assert (again / "model.safetensors").read_bytes() == (
        exported / "model.safetensors"
    ).read_bytes()
    assert load_hf_draft(again)[0] == before.config


def test_export_for_an_engine_refuses_what_it_would_misread(
    domino, trained: Path, tmp_path: Path
) -> None:
    code, out, log = domino("export", trained / "run", tmp_path / "draft", "--for", "vllm")
    assert (code, out) == (2, "") and not (tmp_path / "draft").exists()
    assert "not for vllm: projector_type is domino" in log and "; shift_label is true: " in log
    code, out, log = domino("export", trained / "run", tmp_path / "draft", "--for", "sglang")
    assert (code, out) == (
        0,
        f"{tmp_path / 'draft'}\n",
    ) and "sglang proposes 3 tokens per cycle (K - 1)" in log
    assert "proposes" not in domino("export", trained / "run", tmp_path / "other")[2]
    assert domino("export", trained / "run", tmp_path / "third", "--for", "tgi")[0] == 2


def test_bad_input_is_one_line_and_code_2(domino, trained: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text((trained / "config.yaml").read_text().replace('"steps"', '"step"'))
    for words, message in (
        (("train", tmp_path / "none.yaml"), "none.yaml"),
        (("train", empty), "expected a mapping"),
        (("train", misspelt), "did you mean 'steps'?"),
        (
            ("train", trained / "config.yaml", "loss.num_anchors=many"),
            "loss: num_anchors: expected int",
        ),
        (("train",), "Missing argument"),
        (("learn",), "No such command"),
        (("evaluate", tmp_path, trained / "prompts.jsonl"), "not a run directory"),
        (("evaluate", trained / "run", tmp_path / "none.jsonl"), "none.jsonl"),
        (("generate", trained / "run", " "), "prompt is empty"),
        (("generate", trained / "run", "a", "--max-new-tokens", 0), "max-new-tokens"),
        (("generate", trained / "run", "a", "--max-new-tokens", 10**11), "max-new-tokens"),
        (
            ("generate", trained / "run", "a", "--max-new-tokens", 129),
            "has 128 positions; give fewer",
        ),
        (("generate", "nope"), "nope: not a run directory"),
        (("generate", trained / "run", "a", "--temperature", "nan"), "nan is not a finite number"),
        (("generate", trained / "run", "a", "--temperature", "inf"), "inf is not a finite number"),
        (
            ("generate", trained / "run", "a", "--temperature", "1e-30"),
            "expected 0, or 0.001 to 1000, found 1e-30",
        ),
        (("generate", trained / "run", "a", "--seed", -1), "--seed"),
        (("generate", trained / "run", "a", "--seed", 2**32), "--seed"),
        (("generate", trained / "run", "\udcff"), "'\\udcff' is not valid Unicode"),
        (
            ("generate", trained / "run", "a", "--chat-template-kwargs", "{a: 1, a: 2}"),
            "the key 'a' is given twice",
        ),
        (
            ("generate", trained / "run", "a", "--chat-template-kwargs", "{a: 2001-99-99"),
            "not valid YAML",
        ),
        (("generate", trained / "run", "a", "--dtype", "x" * 10**5), "--dtype"),
        (
            ("capture", trained / "config.yaml", tmp_path / "s", "--limit-gb", "nan"),
            "nan is not a finite number",
        ),
        (
            ("capture", trained / "config.yaml", tmp_path / "s", "--limit-gb", "inf"),
            "inf is not a finite number",
        ),
        (("train", trained / "config.yaml", "seed=-1"), "seed must lie in 0..2**32-1, found -1"),
        (("train", trained / "config.yaml", "x" * 10**5), "expected key=value"),
        (("train", trained / "config.yaml", "\udcff=1"), "is not valid Unicode"),
        (("train\n",), "No such command"),
        (("export", trained / "run", trained), "not an empty directory"),
        (
            ("import", trained / "target", tmp_path / "new", "--target", trained / "target"),
            "dflash_config",
        ),
        (
            ("regenerate", trained / "prompts.jsonl", tmp_path / "a.jsonl", "--target", "nobody"),
            "nobody",
        ),
        (("target", "x.gguf"), "give the directory"),
        # Nothing is assumed about whose words a drafter learns.
        (
            ("regenerate", trained / "prompts.jsonl", tmp_path / "a.jsonl"),
            "'--target'. Expected a directory or a bui",
        ),
        (
            ("import", trained / "target", tmp_path / "new"),
            "a built-in name (smollm2-135m-instruct)",
        ),
        (
            ("capture", trained / "config.yaml", "data.batch_size=4"),
            "'data.batch_size=4', which looks like an overri",
        ),
        (("export", trained / "run", trained / "config.yaml" / "draft"), "config.yaml"),
    ):
        code, out, log = domino(*words)
        assert (code, out) == (2, ""), words
        lines = log.strip().splitlines()
        assert (
            lines[-1].startswith("error: ") and message in lines[-1] and "Traceback" not in log
        ), words
        assert len(lines[-1]) <= 500 and lines[-1].isprintable(), words
    assert not (tmp_path / "new").exists() and not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [(b"\xff", "standard input: not UTF-8 text"), (b" \n", "the prompt is empty")],
)
def test_a_prompt_that_cannot_be_read_is_refused(
    domino, trained: Path, monkeypatch: pytest.MonkeyPatch, given: bytes, message: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
    code, out, log = domino("generate", trained / "run")
    assert (code, out) == (2, "") and message in log


def test_capture_then_train_offline(domino, trained: Path, tmp_path: Path) -> None:
    config, states = trained / "config.yaml", tmp_path / "states"
    code, out, log = domino("capture", config, states, "--limit-gb", 1e-6)
    assert (code, out) == (2, "") and "above the limit of 1e-06 GB; --yes" in log.splitlines()[-1]
    assert not states.exists()
    code, out, log = domino(
        "capture", config, states, "--limit-gb", 1e-6, "--yes", "data.max_length=20"
    )
    assert (
        (code, out) == (0, f"{states}\n")
        and "tokens of 24 rows, 69 bytes each" in log
        and "shard 1/1" in log
    )
    words = (
        "train",
        config,
        f"run_dir={tmp_path / 'run'}",
        "data.train=null",
        f"data.features={states}",
    )
    code, out, log = domino(*words)
    assert (code, out) == (2, "") and "max_length is 20, asked for is 24" in log
    assert not (tmp_path / "run").exists()
    code, out, log = domino(*words, "data.max_length=20", "data.packing=true", "data.batch_size=8")
    assert (code, out) == (0, f"{tmp_path / 'run'}\n") and "of their positions are padding" in log


def test_decoding_computes_as_the_run_was_trained(domino, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = (f"run_dir={run}", "dtype=bfloat16", "train.steps=1", "data.heldout=null")
    assert domino("train", trained / "config.yaml", *words)[0] == 0
    short, prompts = ("--max-new-tokens", 4), trained / "prompts.jsonl"
    for place, own in ((run, "bfloat16"), (trained / "run", "float32")):
        code, _, log = domino("generate", place, "a b c", *short)
        assert code == 0 and f"of {place}, computed in {own}, as it was trained\n" in log
        assert f"loading the target {trained / 'target'}, {own}\n" in log
    for option, dtype in (((), "bfloat16"), (("--dtype", "float32"), "float32")):
        code, out, log = domino("evaluate", run, prompts, "--limit", 1, *short, *option)
        assert code == 0 and f"4 new tokens, {dtype}" in " ".join(out.split())
        assert ("as it was trained" in log) == (not option)
        assert json.loads((run / "evaluation.json").read_text())["evaluator"]["dtype"] == dtype


@pytest.fixture
def spoilt(trained: Path) -> Iterator[str]:
    """The name of a tensor of the target that has a NaN for the time of one test."""
    file, name = trained / "target" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    whole = file.read_bytes()
    tensors = load_file(file)
    tensors[name][3, 5] = np.nan
    save_file(tensors, file)
    yield name
    file.write_bytes(whole)


@pytest.mark.parametrize(
    "words",
    [
        (
            "regenerate",
            "{trained}/prompts.jsonl",
            "{new}/answers.jsonl",
            "--target",
            "{trained}/target",
        ),
        (
            "regenerate",
            "{trained}/prompts.jsonl",
            "{new}/a.jsonl",
            "--target",
            "{trained}/target",
            "--dtype",
            "bfloat16",
        ),
        ("capture", "{trained}/config.yaml", "{new}/states"),
        ("train", "{trained}/config.yaml", "run_dir={new}/run"),
        (
            "train",
            "{trained}/config.yaml",
            "run_dir={new}/run",
            "draft.init_layers_from_target=true",
        ),
        ("generate", "{trained}/run", "a b"),
        ("evaluate", "{trained}/run", "{trained}/prompts.jsonl"),
    ],
)
def test_nothing_runs_on_a_target_that_is_not_finite(
    domino, trained: Path, spoilt: str, tmp_path: Path, words: tuple[str, ...]
) -> None:
    code, out, log = domino(*(word.format(trained=trained, new=tmp_path) for word in words))
    last = log.splitlines()[-1]
    assert (code, out) == (2, "") and "Traceback" not in log
    assert (
        last.startswith("error: ")
        and f"tensor {spoilt}: 1 of 512 entries are not finite in " in last
    )
    assert not list(tmp_path.iterdir())


def test_a_draft_that_is_not_finite_is_neither_exported_nor_imported(
    domino, trained: Path, tmp_path: Path
) -> None:
    record, params, _ = load_draft(trained / "run")
    params["norm"]["weight"] = params["norm"]["weight"].at[2].set(np.inf)
    save_draft(tmp_path / "run", params, record)
    code, out, log = domino("export", tmp_path / "run", tmp_path / "draft")
    assert (code, out) == (2, "") and "Traceback" not in log and not (tmp_path / "draft").exists()
    assert (
        "tensor norm.weight: 1 of 16 entries are not finite in bfloat16; " in log.splitlines()[-1]
    )
    assert domino("export", trained / "run", tmp_path / "draft")[0] == 0
    (tmp_path / "draft" / "SHA256SUMS").unlink()
    file = tmp_path / "draft" / "model.safetensors"
    tensors = load_file(file)
    tensors["norm.weight"][2] = np.inf
    save_file(tensors, file)
    code, out, log = domino(
        "import", tmp_path / "draft", tmp_path / "again", "--target", trained / "target"
    )
    assert (code, out) == (2, "") and not (tmp_path / "again").exists()
    assert (
        "tensor norm.weight: 1 of 16 entries are not finite in bfloat16; " in log.splitlines()[-1]
    )


def test_another_chat_template_is_refused(domino, trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    template = copy / "target" / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant ", "model "))
    for record in (copy / "run" / "checkpoints").glob("*/draft/metadata"):
        record.write_text(record.read_text().replace(str(trained / "target"), str(copy / "target")))
        seal(record.parent.parent)
    code, _, log = domino("generate", copy / "run", "a b")
    assert code == 2 and "chat template" in log


def test_import_checks_mask_token_template_and_shape(domino, trained: Path, tmp_path: Path) -> None:
    exported, target, run = tmp_path / "draft", tmp_path / "target", tmp_path / "run"
    assert domino("export", trained / "run", exported)[0] == 0
    shutil.copytree(trained / "target", target)

    def refused(message: str) -> None:
        code, out, log = domino("import", exported, run, "--target", target)
        assert (code, out) == (2, "") and message in log.strip().splitlines()[-1], log
        assert not run.exists()

    template = (target / "chat_template.jinja").read_text()
    (target / "chat_template.jinja").write_text("{# another #}" + template)
    refused("draft: the chat template of")
    (target / "chat_template.jinja").write_text(template)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<mask>"}))
    refused("mask_token_id 2 is an eos, pad or bos token of the target")
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((exported / "config.json").read_text())
    (exported / "SHA256SUMS").unlink()
    (exported / "config.json").write_text(json.dumps(config | {"num_target_layers": 5}))
    refused("the draft reads a target of 5 layers, this one has 4")
    # As other trainers write it: nothing is known of the template.
    assert len(config.pop("chat_template_sha256")) == 64
    (exported / "config.json").write_text(json.dumps(config))
    code, out, log = domino("import", exported, run, "--target", target)
    assert (code, out) == (0, f"{run}\n") and "does not say which chat template" in log


def test_domino_alone_teaches_and_tells_its_version(domino) -> None:
    code, out, log = domino()
    assert code == 0 and out.startswith("Usage: domino") and not log
    assert domino("--version") == (0, f"domino {__version__}\n", "")
    command = [sys.executable, "-m", "domino_jax", "--version"]
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=path)
    assert result.stdout == f"domino {__version__}\n"


def test_stages_are_told_and_missing_torch_is_not(trained: Path, tmp_path: Path) -> None:
    """A process of its own: transformers warns once, where it is imported first."""
    code = "import sys; sys.modules['torch'] = None; from domino_jax.cli import main; main()"
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}

    def lines(*words: object) -> list[str]:
        command = [sys.executable, "-c", code, *map(str, words)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=path)
        return result.stderr.splitlines()

    loading = [
        f"loading the draft of {trained / 'run'}",
        f"step 6 of {trained / 'run'}, computed in float32, as it was trained",
        f"loading the target {trained / 'target'}, float32",
    ]
    *told, last = lines("generate", trained / "run", "a b", "--max-new-tokens", 4)
    assert told == [*loading, "compiling"] and "tau" in last


@pytest.mark.parametrize(
    "verb",
    [
        "target",
        "regenerate",
        "capture",
        "plan",
        "train",
        "generate",
        "evaluate",
        "export",
        "import",
    ],
)
def test_help_teaches(domino, verb: str) -> None:
    code, out, _ = domino(verb, "--help")
    assert code == 0 and "Usage: domino" in out and len(out.splitlines()) > 6


def test_a_full_disk_is_one_line_that_says_what_is_kept(
    domino, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "draft"))

    monkeypatch.setattr("domino_jax.cli.checkpoint.save_hf_draft", full)
    draft = tmp_path / "draft"
    code, out, err = domino("export", trained / "run", draft)
    assert (code, out) == (2, "")
    kept = f"{draft} is whole or was not made; the same command starts over"
    assert err.splitlines()[-1] == f"error: {draft}: No space left on device; {kept}"


def test_help_documents_each_exit_code(domino) -> None:
    _, out, _ = domino("--help")
    codes = (
        ("0", "done"),
        ("1", "plan: "),
        ("2", "bad input"),
        ("3", "train: "),
        ("130", "interrupted"),
        ("141", ""),
    )
    for code, words in codes:
        assert re.search(rf"^ +{code} +{words}", out, re.MULTILINE), code


def test_a_run_that_went_astray_has_an_exit_code_of_its_own(
    domino, monkeypatch: pytest.MonkeyPatch
) -> None:
    def astray(*_: object, **__: object) -> None:
        raise Diverged("stopped: " + "finite " * 40)

    monkeypatch.setattr(
        "domino_jax.cli.train.load_config", lambda *_: SimpleNamespace(run_dir="run")
    )
    monkeypatch.setattr("domino_jax.cli.train.train_run", astray)
    code, out, err = domino("train", "run.yaml")
    assert code == 3 and not out
    assert err.startswith("stopped: ") and len(err.splitlines()) == 1
