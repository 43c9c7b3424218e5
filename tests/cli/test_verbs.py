"""The command as a user meets it: the whole way on a tiny target, and how bad input ends."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import run_config, write_conversations, write_target

from domino_jax import __version__
from domino_jax.base.files import file_sha256
from domino_jax.config.run import RunConfig
from domino_jax.config.schema import described
from domino_jax.training.checkpoint import load_draft

TOP = Path(__file__).parent.parent.parent


@pytest.mark.pitfall(
    "an evaluator that does not say what it measured",
    seen=(
        "cli/measurement.py: no chat_template in evaluation.json; page/terminal.py: no proposals "
        "above the table"
    ),
)
def test_from_prompts_to_an_evaluated_run(domino, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    target = write_target(tmp_path / "target")
    prompts = write_conversations(tmp_path / "prompts.jsonl", 12, answers=False)
    answers = tmp_path / "answers.jsonl"
    words = ("--target", target, "--max-new-tokens", 12, "--batch-size", 8)
    code, out, log = domino("regenerate", prompts, answers, *words)
    assert (code, out) == (0, f"{answers}\n") and "prompts are answered; compiling\n" in log
    cut = sum(not json.loads(line)["finished"] for line in answers.read_text().splitlines())
    share = f"{cut} of 12 answers ({cut / 12:.0%})"
    assert cut and f"{share} were cut at 12 tokens" in log
    config = run_config(tmp_path, target)
    code, out, log = domino("train", config, f"data.train={answers}", "data.eval=null")
    assert (code, out) == (0, f"{tmp_path / 'run'}\n") and "step 6/6" in log
    assert f"{answers}: {share} are unfinished" in log
    code, out, log = domino(
        "evaluate", tmp_path / "run", prompts, "--limit", 2, "--max-new-tokens", 6
    )
    assert code == 0 and "n-gram" in out
    assert "\nprompts: compiling\n" in log and log.endswith(
        f"saving {tmp_path / 'run' / 'evaluation.json'}\n"
    )
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    figures = report["sets"]["prompts"]
    assert figures["prompts"] == 2 and report["training"]["steps"] == 6
    for name in ("serving", "block", "head_off"):
        assert figures["ways"][name]["lossless"] and figures["ways"][name]["tokens_compared"]
    assert figures["file"] == str(prompts) and figures["sha256"] == file_sha256(prompts)
    assert len(figures["examples"]) == 2 and figures["speed"]["prompts"] == 2
    assert report["cycle"]["break_even_tau"] > 0 and report["cycle"]["measured"]["versions"]["jax"]
    # A tau says nothing without these.
    template = load_draft(tmp_path / "run").record.chat_template
    measured = {"target": str(target), "chat_template": template.sha256, "step": 6}
    measured |= {"block_size": 4, "head": "domino", "temperature": 0.0, "max_new_tokens": 6}
    assert measured.items() <= report["evaluator"].items()
    assert "step 6, block 4, head domino, temperature 0.0, 6 new tokens" in " ".join(out.split())


# Words of a command and what its message holds.
Refusals = list[tuple[tuple[object, ...], str]]


def bad_words(trained: Path, elsewhere: Path) -> Refusals:
    return [
        (("learn",), "No such command"),
        (("train\n",), "No such command"),
        (("train",), "Missing argument"),
        (("train", trained / "config.yaml", "x" * 10**5), "expected key=value"),
        (("train", trained / "config.yaml", "\udcff=1"), "is not valid Unicode"),
        (
            ("capture", trained / "config.yaml", "data.batch_size=4"),
            "'data.batch_size=4', which looks like an overri",
        ),
        (("config",), "give a KEY, for example train.steps, or --list"),
        (("config", "steps"), "no key 'steps' in a configuration; did you mean 'train.steps'?"),
    ]


def bad_configurations(trained: Path, elsewhere: Path) -> Refusals:
    return [
        (("train", elsewhere / "none.yaml"), "none.yaml"),
        (("train", elsewhere / "empty.yaml"), "expected a mapping"),
        (("train", elsewhere / "misspelt.yaml"), "did you mean 'steps'?"),
        (
            ("train", trained / "config.yaml", "loss.num_anchors=many"),
            "loss: num_anchors: expected int",
        ),
        (("train", trained / "config.yaml", "seed=-1"), "seed must be at least 0 and below 2**32"),
    ]


def bad_runs_and_prompts(trained: Path, elsewhere: Path) -> Refusals:
    return [
        (("evaluate", elsewhere, trained / "prompts.jsonl"), "not a run directory"),
        (("evaluate", trained / "run", elsewhere / "none.jsonl"), "none.jsonl"),
        (
            ("evaluate", trained / "run", "prompts.jsonl", "--replay", "--temperature", 1),
            "--replay follows greedy answers",
        ),
        (("generate", "nope"), "nope: not a run directory"),
        (("generate", trained / "run", " "), "prompt is empty"),
        (("generate", trained / "run", "\udcff"), "'\\udcff' is not valid Unicode"),
    ]


def bad_decoding_options(trained: Path, elsewhere: Path) -> Refusals:
    words = ("generate", trained / "run", "a")
    endpoint = ("evaluate", trained / "run", trained / "prompts.jsonl", "--endpoint")
    return [
        ((*endpoint, "localhost:30000"), "expected the address of a server, http://HOST:PORT"),
        ((*endpoint, "http://127.0.0.1:1"), "http://127.0.0.1:1/server_info: "),
        ((*endpoint, "http://127.0.0.1:1", "--temperature", 1), "leave --temperature out"),
        ((*words, "--max-new-tokens", 0), "max-new-tokens"),
        ((*words, "--max-new-tokens", 10**11), "max-new-tokens"),
        ((*words, "--max-new-tokens", 129), "has 128 positions; give fewer"),
        ((*words, "--temperature", "nan"), "nan is not a finite number"),
        ((*words, "--temperature", "inf"), "inf is not a finite number"),
        ((*words, "--temperature", "1e-30"), "expected 0, or 0.001 to 1000, found 1e-30"),
        ((*words, "--top-k", 5), "--top-k: nothing is drawn at temperature 0"),
        ((*words, "--top-p", 0.9), "--top-p: nothing is drawn at temperature 0"),
        ((*words, "--top-p", 0.9, "--temperature", 0), "give a --temperature above 0"),
        ((*words, "--top-k", 0, "--temperature", 1), "--top-k"),
        ((*words, "--top-p", 0, "--temperature", 1), "--top-p"),
        ((*words, "--top-p", "nan", "--temperature", 1), "nan is not a finite number"),
        ((*words, "--plain", "--color"), "--plain drafts nothing"),
        ((*words, "--seed", -1), "--seed"),
        ((*words, "--seed", 2**32), "--seed"),
        ((*words, "--chat-template-kwargs", "{a: 1, a: 2}"), "the key 'a' is given twice"),
        ((*words, "--chat-template-kwargs", "{a: 2001-99-99"), "not valid YAML"),
        ((*words, "--dtype", "x" * 10**5), "--dtype"),
    ]


def bad_targets_and_outputs(trained: Path, elsewhere: Path) -> Refusals:
    capture = ("capture", trained / "config.yaml", elsewhere / "s")
    regenerate = ("regenerate", trained / "prompts.jsonl", elsewhere / "a.jsonl")
    take = ("import", trained / "target", elsewhere / "new")
    return [
        ((*capture, "--limit-gb", "nan"), "nan is not a finite number"),
        ((*capture, "--limit-gb", "inf"), "inf is not a finite number"),
        ((*regenerate, "--target", "nobody"), "nobody"),
        ((*regenerate, "--target", "nobody", "--top-k", 5), "nothing is drawn at temperature 0"),
        # Nothing is assumed about whose words a drafter learns.
        (regenerate, "'--target'. Expected a directory or a bui"),
        ((*take, "--target", trained / "target"), "dflash_config"),
        (take, "a built-in name (smollm2-135m-instruct)"),
        (("target", "x.gguf"), "give the directory"),
        (("export", trained / "run", trained), "not an empty directory"),
        (("export", trained / "run", trained / "config.yaml" / "draft"), "config.yaml"),
    ]


@pytest.mark.parametrize(
    "refusals",
    [
        bad_words,
        bad_configurations,
        bad_runs_and_prompts,
        bad_decoding_options,
        bad_targets_and_outputs,
    ],
)
def test_bad_input_is_one_line_and_code_2(
    domino, trained: Path, tmp_path: Path, refusals: Callable[[Path, Path], Refusals]
) -> None:
    (tmp_path / "empty.yaml").write_text("")
    misspelt = (trained / "config.yaml").read_text().replace('"steps"', '"step"')
    (tmp_path / "misspelt.yaml").write_text(misspelt)
    for words, message in refusals(trained, tmp_path):
        code, out, log = domino(*words)
        assert (code, out) == (2, ""), words
        lines = log.strip().splitlines()
        assert (
            lines[-1].startswith("error: ") and message in lines[-1] and "Traceback" not in log
        ), words
        assert len(lines[-1]) <= 500 and lines[-1].isprintable(), words
    assert not (tmp_path / "new").exists() and not (tmp_path / "a.jsonl").exists()


def test_config_explains_every_key(domino) -> None:
    code, out, _ = domino("config", "--list")
    lines = out.splitlines()
    assert code == 0 and len(lines) == len(list(described(RunConfig)))
    assert any(line.split()[:2] == ["train.steps", "null"] for line in lines)
    mesh = domino("config", "mesh")[1].splitlines()
    assert [line.split()[0] for line in mesh] == ["mesh.data", "mesh.fsdp", "mesh.tensor"]
    code, out, _ = domino("config", "loss.logits_mib")
    assert code == 0 and out.splitlines()[1].split() == [
        "takes",
        "number",
        "or",
        "null",
        "(MiB),",
        "above",
        "0",
    ]


def test_domino_alone_teaches_and_tells_its_version(domino) -> None:
    code, out, log = domino()
    assert code == 0 and out.startswith("Usage: domino") and not log
    assert domino("--version") == (0, f"domino {__version__}\n", "")
    command = [sys.executable, "-m", "domino_jax", "--version"]
    path = {**os.environ, "PYTHONPATH": str(TOP)}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=path)
    assert result.stdout == f"domino {__version__}\n"


def test_stages_are_told_and_missing_torch_is_not(trained: Path) -> None:
    """A process of its own: transformers warns once, where it is imported first."""
    code = "import sys; sys.modules['torch'] = None; from domino_jax.cli import main; main()"
    path = {**os.environ, "PYTHONPATH": str(TOP)}

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
        "prompts",
        "regenerate",
        "capture",
        "plan",
        "train",
        "generate",
        "evaluate",
        "report",
        "export",
        "import",
    ],
)
def test_help_teaches(domino, verb: str) -> None:
    code, out, _ = domino(verb, "--help")
    assert code == 0 and "Usage: domino" in out and len(out.splitlines()) > 6


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
