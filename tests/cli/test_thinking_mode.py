"""One setting of the chat template from the answers to the evaluation; another is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from tiny import SWITCHED_TEMPLATE, run_config, seal, write_conversations, write_target

from domino_jax.cli.verbs import cli
from domino_jax.data import prompt
from domino_jax.data.hidden_states import read_manifest
from domino_jax.data.prompt import encode_prompt
from domino_jax.interop.hf import recorded_template
from domino_jax.training.checkpoint import load_draft

OFF = {"enable_thinking": False}
TOLD = ("--chat-template-kwargs", '{"enable_thinking": false}')
OTHERWISE = ("--chat-template-kwargs", "{enable_thinking: true}")
IN_CONFIG = "data.chat_template_kwargs.enable_thinking=false"
TRAINED_WITH = 'trained with chat_template_kwargs {"enable_thinking": false}, asked for are '


def domino(*words: object) -> None:
    """A verb that succeeds."""
    result = CliRunner().invoke(cli, list(map(str, words)))
    assert result.exit_code == 0, result.output


def refused(*words: object) -> str:
    """The one line of a verb that refuses its input."""
    result = CliRunner().invoke(cli, list(map(str, words)))
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    return result.output.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with a switch, its answers with thinking switched off, and a run trained on them."""
    place = tmp_path_factory.mktemp("place")
    write_target(place / "target", template=SWITCHED_TEMPLATE)
    prompts = write_conversations(place / "prompts.jsonl", 8, answers=False)
    words = ("--target", place / "target", "--max-new-tokens", 8, "--batch-size", 8, *TOLD)
    domino("regenerate", prompts, place / "answers.jsonl", *words)
    rows = {"train": str(place / "answers.jsonl"), "eval": None}
    config = run_config(place, place / "target", data=rows)
    domino("train", config, IN_CONFIG)
    return place


def test_answers_run_and_checkpoint_record_it(place: Path) -> None:
    header = (place / "answers.jsonl").read_text().splitlines()[0]
    assert json.loads(header)["generator"]["chat_template_kwargs"] == OFF
    resolved = yaml.safe_load((place / "run" / "config.yaml").read_text())
    assert resolved["data"]["chat_template_kwargs"] == OFF
    assert load_draft(place / "run").record.chat_template.kwargs == OFF


def test_training_refuses_answers_of_another_setting(place: Path, tmp_path: Path) -> None:
    config, elsewhere = place / "config.yaml", f"run_dir={tmp_path / 'run'}"
    line = refused("train", config, elsewhere)
    assert f"{place / 'answers.jsonl'}:2: answered with chat_template_kwargs " in line
    assert '{"enable_thinking": false}, the run has {}; give the run data.chat' in line
    line = refused("train", config, elsewhere, IN_CONFIG.replace("false", "0"))
    assert 'the run has {"enable_thinking": 0}' in line
    heldout = (f"data.eval={place / 'answers.jsonl'}", f"data.train={place / 'rows.jsonl'}")
    assert "answers.jsonl:2: answered with" in refused("train", config, elsewhere, *heldout)
    line = refused("train", config, elsewhere, "data.chat_template_kwargs={enable_thnking: false}")
    assert line.endswith("does not read 'enable_thnking'; did you mean 'enable_thinking'?")


def test_a_run_is_not_resumed_with_another_setting(place: Path, tmp_path: Path) -> None:
    config, run = place / "config.yaml", tmp_path / "run"
    rows = (f"data.train={place / 'rows.jsonl'}", f"run_dir={run}")
    shutil.copytree(place / "run", run)
    line = refused("train", config, *rows)  # whose answers nobody generated
    assert "(data.chat_template_kwargs.enable_thinking False -> None); use another run_dir" in line
    # A template tells 0 from false, which are equal in Python.
    line = refused("train", config, *rows, IN_CONFIG.replace("false", "0"))
    assert 'chat_template_kwargs {"enable_thinking": false} -> sha256' in line


def test_states_captured_under_another_setting_are_refused(place: Path, tmp_path: Path) -> None:
    config, states = place / "config.yaml", tmp_path / "states"
    domino("capture", config, states, IN_CONFIG)
    assert read_manifest(states).chat_template_kwargs == OFF
    offline = ("data.train=null", f"data.hidden_states={states}", f"run_dir={tmp_path / 'run'}")
    line = refused("train", config, *offline)
    told = 'chat_template_kwargs is {"enable_thinking": false}, asked for is '
    assert f"captured otherwise: {told}{{}}" in line
    line = refused("train", config, *offline, IN_CONFIG, "draft.target_layer_ids=[0,1]")
    assert "captured otherwise: target_layer_ids is" in line and told not in line
    rows = f"data.train={place / 'rows.jsonl'}"
    assert f"{told}{{}}" in refused("capture", config, states, rows)


def test_decoding_takes_the_setting_of_the_run(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, prompts = place / "run", place / "prompts.jsonl"
    asked: list[Any] = []

    def spy(messages: Any, tokenizer: Any, kwargs: Any = "forgotten", **more: Any) -> Any:
        asked.append(kwargs)
        return encode_prompt(messages, tokenizer, kwargs, **more)

    monkeypatch.setattr(prompt, "encode_prompt", spy)
    domino("generate", run, "a b", "--max-new-tokens", 4, *TOLD)
    domino("evaluate", run, prompts, "--limit", 2, "--max-new-tokens", 8, "--timed", 0)
    assert asked == [OFF] * 3
    evaluator = json.loads((run / "evaluation.json").read_text())["evaluator"]
    assert evaluator["chat_template_kwargs"] == OFF
    for verb in (("generate", run, "a b"), ("evaluate", run, prompts)):
        assert f"{TRAINED_WITH}{{}}" in refused(*verb, "--chat-template-kwargs", "{}")
        assert f'{TRAINED_WITH}{{"enable_thinking": true}}; leave' in refused(*verb, *OTHERWISE)


def test_exchange_keeps_the_setting(place: Path, tmp_path: Path) -> None:
    exported, target = tmp_path / "draft", ("--target", place / "target")
    domino("export", place / "run", exported)
    recorded = recorded_template(exported)
    assert recorded is not None and recorded.kwargs == OFF
    domino("import", exported, tmp_path / "imported", *target)
    assert load_draft(tmp_path / "imported").record.chat_template == recorded
    domino("import", exported, tmp_path / "told", *target, *TOLD)
    line = refused("import", exported, tmp_path / "other", *target, *OTHERWISE)
    assert line.endswith(
        f'{TRAINED_WITH}{{"enable_thinking": true}}; leave them out to take the draft\'s own'
    )

    # Written by somebody else: what is known is what is said here.
    (exported / "SHA256SUMS").unlink()
    tree = json.loads((exported / "config.json").read_text())
    rest = {key: value for key, value in tree.items() if not key.startswith("chat_template")}
    (exported / "config.json").write_text(json.dumps(rest))
    assert "did you mean" in refused(
        *("import", exported, tmp_path / "other", *target),
        *("--chat-template-kwargs", "{enable_thnking: false}"),
    )
    assert not (tmp_path / "other").exists()
    domino("import", exported, tmp_path / "foreign", *target, *TOLD)
    assert load_draft(tmp_path / "foreign").record.chat_template.kwargs == OFF
    domino("import", exported, tmp_path / "silent", *target)
    assert load_draft(tmp_path / "silent").record.chat_template.kwargs == {}


def test_a_setting_that_the_template_does_not_read_is_refused(place: Path, tmp_path: Path) -> None:
    answers = tmp_path / "a.jsonl"
    words = ("--target", place / "target", "--chat-template-kwargs", "{messages: 1}")
    line = refused("regenerate", place / "prompts.jsonl", answers, *words)
    assert "the chat template does not read 'messages'; it reads enable_thinking" in line
    assert not answers.exists()


def test_a_record_of_something_else_is_told(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    record = tmp_path / "run" / "checkpoints" / "6" / "draft" / "metadata"
    tree = json.loads(record.read_text())
    record.write_text(json.dumps({**tree, "chat_template_kwargs": [1]}))
    seal(record.parent.parent)
    line = refused("generate", tmp_path / "run", "a b")
    assert "draft: chat_template_kwargs: expected a mapping, found [1]" in line
    del tree["chat_template_kwargs"]
    record.write_text(json.dumps(tree))
    seal(record.parent.parent)
    line = refused("generate", tmp_path / "run", "a b")
    assert "draft: 'chat_template_kwargs' is missing" in line
