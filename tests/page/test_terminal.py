"""The tables of a run at a terminal."""

import io
import json
from pathlib import Path

import pytest
from page_runs import evaluation_of
from rich.console import Console

from domino_jax.page.terminal import evaluation_table, training_summary


def printed(evaluation: dict) -> str:
    heard = io.StringIO()
    Console(width=120, file=heard).print(evaluation_table(evaluation))
    return heard.getvalue()


def test_a_summary_of_training_is_of_its_log(tmp_path: Path) -> None:
    assert training_summary(tmp_path) == {}  # an imported draft has none
    last = {"step": 40, "split": "heldout", "loss": 2.5, "accept_len": 2.1}
    lines = [
        {"step": 0, "split": "data", "conversations": 24, "answer_tokens": 300},
        {"step": 10, "split": "train", "loss": None},  # every step of it was skipped
        {"step": 20, "split": "train", "loss": 5.0},
        {"step": 20, "split": "heldout", "loss": 4.0, "accept_len": 1.5},
        {"step": 30, "loss": 3.5},  # somebody else's
        {"step": 40, "split": "train", "loss": 3.0},
        last,
        {"step": 40, "split": "rollout", "tau": 1.2},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert training_summary(tmp_path) == {
        "first_loss": 5.0,
        "last_loss": 3.0,
        "steps": 40,
        "heldout": last,
        "data": {"conversations": 24, "answer_tokens": 300},
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"accept_len"', '"accept_leo"'),
        ('"loss": 2.5', '"loss": "2.5"'),
        ('"loss": 5.0', '"loss": true'),
        ('"accept_len": 2.0', '"accept_len": [2.0]'),
        ('"base_accept_len": 1.5', '"base_accept_len": null'),
    ],
)
def test_a_damaged_log_makes_a_summary(tmp_path: Path, old: str, new: str) -> None:
    heldout = {"step": 9, "split": "heldout", "loss": 2.5, "accept_len": 2.0}
    lines = [{"step": 9, "split": "train", "loss": 5.0}, heldout | {"base_accept_len": 1.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    assert old in text
    (tmp_path / "metrics.jsonl").write_text(text.replace(old, new))
    evaluation = evaluation_of(sets=("everyday",))
    evaluation["training"] = training_summary(tmp_path)
    assert "smollm2" in printed(evaluation)


def test_a_summary_of_a_changed_log_has_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    monkeypatch.setattr("domino_jax.page.terminal.log_notice", lambda run: "metrics.jsonl: changed")
    assert training_summary(tmp_path) == {"notice": f"{tmp_path}/metrics.jsonl: changed"}


def test_the_table_of_an_evaluation_has_every_way_and_what_it_must_reach() -> None:
    evaluation = evaluation_of(sets=("everyday", "code"))
    evaluation["sets"]["code"].pop("speed")
    evaluation["sets"]["code"]["replayed"] = True
    evaluation["training"]["heldout"] = {"accept_len": 2.226, "base_accept_len": 1.866}
    text = printed(evaluation)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    rows = {row[0]: row[1:] for row in cells if row}
    assert rows["prompts"] == ["80", "80"] and rows["proposals"] == ["3", "3"]
    assert rows["tau (95 %)"] == ["1.340 (1.298 to 1.383)", "1.140 (1.098 to 1.183)"]
    assert rows["tau, head off"][0].startswith("1.269 (")
    assert rows["tau, block proposals"][0].startswith("1.361 (")
    assert rows["n-gram floor"][0].startswith("1.123 (")
    assert rows["counted by"] == ["decoding", "replay"]
    assert rows["tokens/s speculative / plain"] == ["50.4 / 45.1", "-"]
    assert rows["tokens compared / equal"] == ["15360 / 15360"] * 2
    words = " ".join(text.split())
    assert "smollm2-135m-instruct, step 160, block 4, head domino, temperature 0.0" in words
    assert (
        "break-even tau 1.73 at batch 1 here; 1.21 where verifying a block costs one step" in words
    )
    assert "costs one step; loss 12.950 -> 2.760 in 160 steps" in words
    assert "held-out accept_len (teacher-forced) 2.226, base 1.866" in words


def test_the_table_leaves_out_what_was_not_measured() -> None:
    evaluation = evaluation_of(head=False, sets=("everyday",))
    assert "break-even" in printed(evaluation)
    evaluation["cycle"] = None
    for key in ("tokens_compared", "tokens_equal"):
        del evaluation["sets"]["everyday"]["ways"]["serving"][key]
    text = printed(evaluation)
    assert "no head" in text and "n-gram floor" in text
    for absent in ("head off", "block proposals", "compared", "break-even"):
        assert absent not in text
