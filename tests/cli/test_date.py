"""The date that a template prints: that of the first start, in every verb on every later day."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chex
import pytest
import yaml
from click.testing import CliRunner
from saved_bits import final_bits
from tiny import DATED_TEMPLATE, Interrupted, quiet, run_config, write_conversations, write_target
from whole_run import train

from domino_jax.base.errors import Interrupted as Stopped
from domino_jax.cli import data
from domino_jax.cli.verbs import cli
from domino_jax.config.run import load_config
from domino_jax.data import prompt, template
from domino_jax.data.hidden_states import read_manifest
from domino_jax.data.prompt import encode_prompt
from domino_jax.interop.hf import recorded_template
from domino_jax.training.checkpoint import load_draft

DAY, NEXT, LATER = "2026-12-01", "2026-12-02", "2026-12-03"
OF_DAY, OF_LATER = {"strftime_now": DAY}, {"strftime_now": LATER}
IN_CONFIG = "data.chat_template_kwargs.strftime_now="


@contextmanager
def on(day: str) -> Iterator[pytest.MonkeyPatch]:
    """The verbs of a day."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "today", lambda: day)
        yield patch


def domino(*words: object) -> str:
    """The output of a verb that succeeds."""
    result = CliRunner().invoke(cli, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: object) -> str:
    """The one line of a verb that refuses its input."""
    result = CliRunner().invoke(cli, list(map(str, words)))
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    return result.output.strip().splitlines()[-1]


def settings_of(run: Path) -> Any:
    return yaml.safe_load((run / "config.yaml").read_text())["data"]["chat_template_kwargs"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that prints the date, answers of a day, held-out ones of the next, a later run."""
    place = tmp_path_factory.mktemp("place")
    write_target(place / "target", template=DATED_TEMPLATE)
    prompts = write_conversations(place / "prompts.jsonl", 10, answers=False)
    words = ("--target", place / "target", "--max-new-tokens", 8, "--batch-size", 4)
    for day, name in ((DAY, "answers.jsonl"), (NEXT, "other_day.jsonl")):
        with on(day):
            domino("regenerate", prompts, place / name, *words)
    rows = {"train": str(place / "answers.jsonl"), "eval": str(place / "other_day.jsonl")}
    with on(LATER):
        domino("train", run_config(place, place / "target", data=rows))
    return place


@pytest.mark.parametrize("verb", ["regenerate", "prompts"])
def test_a_file_that_is_resumed_keeps_the_date(verb: str, place: Path, tmp_path: Path) -> None:
    begin: list[object] = ["regenerate", place / "prompts.jsonl"]
    words: list[object] = ["--target", place / "target", "--max-new-tokens", 24]
    words += ["--batch-size", 4, "--temperature", 1.0]
    line = "answers 4/10"
    if verb == "prompts":
        begin, line = ["prompts"], "prompts 1/"
        words += ["--count", 10]
    with on(DAY):
        domino(*begin, tmp_path / "whole.jsonl", *words)
    other_day = tmp_path / "other.jsonl"
    with on(NEXT):
        domino(*begin, other_day, *words)
    with on(DAY) as patch:
        patch.setattr(data, "reporter", Interrupted(at=line))
        parts = [*begin, tmp_path / "parts.jsonl", *words]
        assert CliRunner().invoke(cli, list(map(str, parts))).exit_code == 1
    with on(NEXT):
        domino(*parts)
    whole = (tmp_path / "whole.jsonl").read_text()
    assert (tmp_path / "parts.jsonl").read_text() == whole != other_day.read_text()
    assert DAY in whole.splitlines()[0] and len(whole.splitlines()) == 11


def test_a_run_takes_the_date_of_its_answers(place: Path, tmp_path: Path) -> None:
    run = place / "run"
    assert settings_of(run) == OF_DAY == load_draft(run).record.chat_template.kwargs
    begin = ("train", place / "config.yaml", f"run_dir={tmp_path / 'run'}")
    # Generated ids are those of their day, whatever the date of the run.
    domino(*begin, IN_CONFIG + NEXT)
    assert settings_of(tmp_path / "run") == {"strftime_now": NEXT}
    line = refused(*begin, IN_CONFIG + "today")
    assert line.endswith(
        "strftime_now is 'today', expected a date as YYYY-MM-DD, for example 2026-12-01"
    )


@pytest.mark.pitfall(
    "a template prints the date: prompts and fingerprints change at midnight",
    seen="training/prepare.py: the recorded date not taken",
)
def test_a_run_that_crosses_midnight_resumes_with_the_same_bits(
    place: Path, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    steps = {"steps": 4, "checkpoint_every": 2, "rollout_every": 2, "rollout_prompts": 2}
    with on(DAY):
        whole = train(
            load_config(run_config(tmp_path / "whole", place / "target", train=steps)),
            reporter=quiet(),
        )
    path = run_config(tmp_path, place / "target", train=steps)
    asked = itertools.count()
    with on(DAY), pytest.raises(Stopped):
        train(load_config(path), reporter=quiet(), stop_requested=lambda: next(asked) >= 1)
    with on(NEXT):
        assert f"strftime_now: '{DAY}'" in domino("train", path, "--dry-run")
        assert f"strftime_now '{DAY}' -> '{NEXT}')" in refused("train", path, IN_CONFIG + NEXT)
        domino("train", path)
    chex.assert_trees_all_equal(final_bits(tmp_path / "run", 4), final_bits(whole, 4))
    assert settings_of(tmp_path / "run") == OF_DAY


def test_captured_states_keep_the_date(place: Path, tmp_path: Path) -> None:
    path, states = run_config(tmp_path, place / "target"), tmp_path / "states"
    with on(DAY):
        domino("capture", path, states)
    with on(NEXT):
        domino("capture", path, states)
        assert read_manifest(states).chat_template_kwargs == OF_DAY
        offline = ("data.train=null", f"data.hidden_states={states}")
        domino("train", path, *offline)
        assert settings_of(tmp_path / "run") == OF_DAY
        assert "captured otherwise: chat_template_kwargs is" in refused(
            *("train", path, *offline, IN_CONFIG + NEXT), f"run_dir={tmp_path / 'other'}"
        )
        answers = (f"data.train={place / 'answers.jsonl'}", "data.eval=null")
        domino("capture", path, tmp_path / "answered", *answers)
    assert read_manifest(tmp_path / "answered").chat_template_kwargs == OF_DAY


def test_decoding_takes_the_date_of_the_run(place: Path, tmp_path: Path) -> None:
    asked: list[Any] = []

    def spy(messages: Any, tokenizer: Any, kwargs: Any = "forgotten", **more: Any) -> Any:
        asked.append(kwargs)
        return encode_prompt(messages, tokenizer, kwargs, **more)

    run, prompts = place / "run", place / "prompts.jsonl"
    with on(LATER) as patch:
        patch.setattr(prompt, "encode_prompt", spy)
        words = ("--max-new-tokens", 4)
        domino("generate", run, "a b", *words)
        domino("generate", run, "a b", *words, "--chat-template-kwargs", "{}")
        domino("evaluate", run, prompts, "--limit", 2, *words, "--timed", 0)
        assert asked == [OF_DAY] * 4
        evaluator = json.loads((run / "evaluation.json").read_text())["evaluator"]
        assert evaluator["chat_template_kwargs"] == OF_DAY
        line = refused("generate", run, "a", "--chat-template-kwargs", json.dumps(OF_LATER))
        assert f'"{DAY}"}}, asked for are {{"strftime_now": "{LATER}"}}; leave them out' in line


def test_exchange_keeps_the_date(place: Path, tmp_path: Path) -> None:
    exported, target = tmp_path / "draft", ("--target", place / "target")

    def imported(name: str) -> Any:
        domino("import", exported, tmp_path / name, *target)
        return load_draft(tmp_path / name).record.chat_template.kwargs

    with on(LATER):
        domino("export", place / "run", exported)
        recorded = recorded_template(exported)
        assert recorded is not None and recorded.kwargs == OF_DAY == imported("ours")
        (exported / "SHA256SUMS").unlink()
        config = exported / "config.json"
        tree = json.loads(config.read_text())
        rest = {key: value for key, value in tree.items() if not key.startswith("chat_template")}
        config.write_text(json.dumps(rest))
        assert imported("of somebody else") == OF_LATER
