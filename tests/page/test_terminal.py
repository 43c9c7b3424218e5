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


def test_a_summary_of_a_changed_log_has_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    monkeypatch.setattr("domino_jax.page.terminal.log_notice", lambda run: "metrics.jsonl: changed")
    assert training_summary(tmp_path) == {"notice": "metrics.jsonl: changed"}


@pytest.mark.parametrize("figure", ["x", None, [1], {"a": 1}, True, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["loss", "accept_len", "base_accept_len", "split"])
def test_a_summary_leaves_out_what_is_no_figure(tmp_path: Path, name: str, figure: object) -> None:
    records = [
        {"step": 40, "split": split, "loss": 2.5, "accept_len": 2.0, "base_accept_len": 1.5}
        for split in ("data", "train", "heldout")
    ]
    lines = [json.dumps({**record, name: figure, "not_finite": ["x"]}) for record in records]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    evaluation = evaluation_of(sets=("everyday",))
    evaluation["training"] = training_summary(tmp_path)
    json.dumps(evaluation, allow_nan=False)
    text = " ".join(printed(evaluation).split())
    assert ("held-out accept_len" in text) == (name == "base_accept_len")
    assert ("loss 2.500 -> 2.500" in text) == (name not in ("loss", "split"))


def test_a_log_without_a_figure_has_a_table(tmp_path: Path) -> None:
    """One wrong byte in a key."""
    record = {"step": 40, "split": "heldout", "loss": 2.5, "accept_lex": 2.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    evaluation = evaluation_of(sets=("everyday",))
    evaluation["training"] = training_summary(tmp_path)
    assert "held-out" not in printed(evaluation)


@pytest.mark.parametrize(
    "broken",
    [
        [],
        None,
        "x",
        {},
        {"prompts": "x", "ways": {"serving": {"tau": None, "interval": [None]}}, "replayed": []},
        {"ways": [], "speed": [1], "endpoint": {"tau": "x", "tokens_compared": 3}},
        {"ways": {"serving": 3, "block": {"tokens_compared": "3", "tokens_equal": 3}}},
    ],
)
def test_a_set_that_was_changed_leaves_the_table(broken: object) -> None:
    """`evaluate --append` keeps sets that it did not measure."""
    evaluation = evaluation_of(sets=("everyday", "code"))
    evaluation["sets"]["code"] = broken
    rows = [line.split("│") for line in printed(evaluation).splitlines() if "│" in line]
    cells = {name.strip(): rest for _, name, *rest in rows}
    assert cells["tau (95 %)"][0].strip() == "1.340 (1.298 to 1.383)"
    assert cells["tau (95 %)"][1].strip() == "-"


def test_names_are_shown_as_they_are() -> None:
    """Markup of rich, names of emoji, control characters, length."""
    names = ("[red]x", "[/bold]", ":smile:", "\x1b[2J\n\u202e", "x" * 200)
    evaluation = evaluation_of(sets=names)
    evaluation["evaluator"]["target"] = "runs/[/red]:smile:\x9b2J"
    text = printed(evaluation)
    for shown in ("[red]x", "[/bold]", ":smile:", r"\x1b[2J\n", r"runs/[/red]:smile:\x9b2J"):
        assert shown in text
    assert not set(text) & set("\x1b\x9b\u202e")


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
