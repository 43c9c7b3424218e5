"""The record of an evaluation: added to by the same evaluator alone, and nothing of it lost."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from domino_jax.base.errors import InputError
from domino_jax.base.files import write_json
from domino_jax.data.template import ChatTemplate
from domino_jax.evaluation.record import (
    Evaluator,
    measured,
    read_earlier,
    set_names,
    write_evaluation,
)

EVALUATOR = Evaluator(
    target="tiny",
    target_sha256="ab" * 32,
    chat_template=ChatTemplate("cd" * 32, {"enable_thinking": False}),
    step=6,
    block_size=4,
    head="domino",
    temperature=0.0,
    seed=0,
    max_new_tokens=8,
    dtype="float32",
)
SETS = {"first": {"prompts": 3}, "second": {"prompts": 4}}
CYCLE = {"whole": 26.0, "plain": 13.0}


def test_what_was_written_is_what_is_added_to(tmp_path: Path) -> None:
    place = tmp_path / "evaluation.json"
    assert read_earlier(place, EVALUATOR) == {"sets": {}, "cycle": None}
    record = write_evaluation(place, EVALUATOR, training={"steps": 6}, cycle=CYCLE, sets=SETS)
    stored = json.loads(place.read_text())
    assert list(stored)[-1] == "sha256" and stored == record | {"sha256": stored["sha256"]}
    # The times of a cycle too: another set may be measured without timing anything.
    assert read_earlier(place, EVALUATOR) == {"sets": SETS, "cycle": CYCLE}
    write_evaluation(place, EVALUATOR, training={}, cycle=None, sets=SETS)
    assert read_earlier(place, EVALUATOR) == {"sets": SETS, "cycle": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 7}, "was measured with step 6, this is 7"),
        ({"max_new_tokens": 9}, "max_new_tokens 8, this is 9"),
        ({"target_sha256": "ef" * 32}, 'target_sha256 "abab'),
        (
            {"chat_template": ChatTemplate("cd" * 32, {"enable_thinking": 0})},
            '"enable_thinking": 0',
        ),
    ],
)
def test_another_evaluator_adds_nothing(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    place = tmp_path / "evaluation.json"
    write_evaluation(place, EVALUATOR, training={}, cycle=None, sets=SETS)
    with pytest.raises(InputError, match=message):
        read_earlier(place, replace(EVALUATOR, **change))


@pytest.mark.parametrize("damage", ['{"sets": {}}', '{"evaluator": {}, "sets": []}', "[]", "{"])
def test_what_is_no_evaluation_is_refused(tmp_path: Path, damage: str) -> None:
    place = tmp_path / "evaluation.json"
    place.write_text(damage)
    with pytest.raises(InputError, match=r"evaluation\.json"):
        read_earlier(place, EVALUATOR)
    write_json(place, {"evaluator": EVALUATOR.as_json(), "sets": {}, "cycle": [1]})
    with pytest.raises(InputError, match="not an evaluation"):
        read_earlier(place, EVALUATOR)


@pytest.mark.parametrize(
    "change",
    [
        {"sets": {"first": {"prompts": 2}, "second": {"prompts": 4}}},
        {"sets": {"first": {}}},
        {"sets": []},
        {"cycle": {"whole": 36.0, "plain": 13.0}},
        {"training": {"steps": 7}},
    ],
)
def test_nothing_is_added_to_a_changed_evaluation(tmp_path: Path, change: dict[str, Any]) -> None:
    place = tmp_path / "evaluation.json"
    write_evaluation(place, EVALUATOR, training={"steps": 6}, cycle=CYCLE, sets=SETS)
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    message = r"evaluation\.json: changed .*; run `domino evaluate` again, without --append"
    with pytest.raises(InputError, match=message):
        read_earlier(place, EVALUATOR)
    tree = json.loads(place.read_text())
    del tree["sha256"]
    place.write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"no key 'sha256', .*; run `domino evaluate` again"):
        read_earlier(place, EVALUATOR)


def test_a_set_is_called_as_its_file_is(tmp_path: Path) -> None:
    files = [Path("prompts/everyday.jsonl"), Path("answers/own.jsonl.gz"), Path("more.json")]
    assert set_names(files, tmp_path) == ["everyday", "own", "more.json"]
    message = f"two files of prompts would both be called own in {tmp_path}"
    with pytest.raises(InputError, match=message):
        set_names([*files, Path("own.jsonl")], tmp_path)


def test_a_measurement_says_when_and_where() -> None:
    said = measured("cpu:cpu")
    assert set(said) == {"date", "hardware", "device", "python", "versions"}
    assert said["device"] == "cpu:cpu" and " x " in said["hardware"]
    # The last two decide what tokens a text is.
    packages = {"domino-jax", "jax", "jaxlib", "numpy", "tokenizers", "transformers"}
    assert set(said["versions"]) == packages


def test_a_figure_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    place = tmp_path / "evaluation.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_evaluation(place, EVALUATOR, training={}, cycle={"whole": float("nan")}, sets=SETS)
    assert not place.exists()
