"""The command as a user meets it: the whole way on a tiny target, and how bad input ends."""

import inspect
import json
from pathlib import Path

import pytest
from tiny import run_config, write_conversations, write_target

from domino_jax.base.files import file_sha256
from domino_jax.cli.verbs import cli
from domino_jax.config.run import RunConfig
from domino_jax.config.schema import described
from domino_jax.training.checkpoint import load_draft


@pytest.mark.pitfall(
    "an evaluator that does not say what it measured",
    seen=(
        "cli/measurement.py: no chat_template in evaluation.json; page/terminal.py: no proposals "
        "above the table"
    ),
)
def test_from_prompts_to_an_evaluated_run(domino, tmp_path: Path) -> None:
    target = write_target(tmp_path / "target")
    prompts = write_conversations(tmp_path / "prompts.jsonl", 12, answers=False)
    answers = tmp_path / "answers.jsonl"
    words = ("--target", target, "--max-new-tokens", 12, "--batch-size", 8)
    code, out, log = domino("regenerate", prompts, answers, *words)
    assert (code, out) == (0, f"{answers}\n") and "answers are there; compiling\n" in log
    cut = answers.read_text().count('"finish_reason": "length"')
    share = f"{cut} of 12 answers ({cut / 12:.0%})"
    assert cut and f"{share} were cut at 12 tokens" in log
    config = run_config(tmp_path, target)
    code, out, log = domino("train", config, f"data.train={answers}", "data.eval=null")
    assert (code, out) == (0, f"{tmp_path / 'run'}\n") and "step 6/6" in log
    assert f"{answers}: {cut} of 12 lines ({cut / 12:.0%}) end with an unfinished answer" in log
    asked, evaluation = prompts.read_bytes(), tmp_path / "run" / "evaluation.json"
    words = ("--limit", 2, "--max-new-tokens", 8)
    code, out, log = domino("evaluate", tmp_path / "run", prompts, *words)
    assert code == 0 and "n-gram" in out and prompts.read_bytes() == asked
    assert "\nprompts: compiling\n" in log and log.endswith(f"saving {evaluation}\n")
    report = json.loads(evaluation.read_text())
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
    measured |= {"block_size": 4, "head": "domino", "temperature": 0.0, "max_new_tokens": 8}
    assert measured.items() <= report["evaluator"].items()
    assert "step 6, block 4, head domino, temperature 0.0, 8 new tokens" in " ".join(out.split())


def test_bad_input_is_one_line_and_code_2(domino, trained: Path, tmp_path: Path) -> None:
    """What is found out once jax is there; `tests/test_imports.py` has the errors of arguments."""
    run, prompts, new = trained / "run", trained / "prompts.jsonl", tmp_path / "new"
    regenerate = ("regenerate", prompts, new, "--target", "nobody")
    evaluate = ("evaluate", run, prompts, "--endpoint")
    for words, message in (
        (("evaluate", tmp_path, prompts), "not a run directory"),
        (("evaluate", run, tmp_path / "none.jsonl"), "none.jsonl"),
        ((*evaluate, "localhost:30000"), "expected the address of a server, http://HOST:PORT"),
        ((*evaluate, "http://127.0.0.1:1"), "http://127.0.0.1:1/server_info: "),
        (("generate", run, "\udcff"), "'\\udcff' is not valid Unicode"),
        (("generate", run, "a", "--max-new-tokens", 129), "has 128 positions; give fewer"),
        (regenerate, "nobody"),
        (("import", trained / "target", new, "--target", trained / "target"), "dflash_config"),
        (("import", new, tmp_path / "a[b]", "--target", trained / "target"), "'[' in the path"),
        (("export", run, trained), "not an empty directory"),
        (("export", run, trained / "config.yaml" / "draft"), "config.yaml"),
    ):
        code, out, log = domino(*words)
        assert (code, out) == (2, "") and "Traceback" not in log, words
        last = log.strip().splitlines()[-1]
        assert last.startswith("error: ") and message in last, (words, last)
        assert len(last) <= 500 and last.isprintable(), words
    assert not new.exists()


def test_config_explains_every_key(domino) -> None:
    code, out, _ = domino("config", "--list")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and len(lines) == len(list(described(RunConfig)))
    defaults = {name: default for name, default, *_ in lines}
    assert (defaults["train.steps"], defaults["train.tensorboard"]) == ("null", "false")
    assert (defaults["optimizer.learning_rate"], defaults["dtype"]) == ("0.0006", "bfloat16")
    mesh = domino("config", "mesh")[1].splitlines()
    assert [line.split()[0] for line in mesh] == ["mesh.data", "mesh.fsdp", "mesh.tensor"]
    code, out, _ = domino("config", "loss.logits_mib")
    assert code == 0 and "\n  takes    number or null (MiB), above 0\n" in out


@pytest.mark.parametrize("verb", cli.commands)
def test_a_verb_takes_its_options_by_their_names(verb: str) -> None:
    """As `click` gives them; what passes through as `**` goes by name into a record."""
    command = cli.commands[verb]
    assert command.callback is not None
    taken = inspect.signature(command.callback).parameters.values()
    if not any(one.kind is one.VAR_KEYWORD for one in taken):
        names = {one.name for one in taken} - {"ctx"}
        assert names == {parameter.name for parameter in command.params}
