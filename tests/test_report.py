"""The tables of a run at a terminal."""

import copy
import io

from page_runs import evaluation_of
from rich.console import Console

from domino_jax.report import evaluation_table


def printed(evaluation: dict) -> str:
    heard = io.StringIO()
    Console(width=120, file=heard).print(evaluation_table(evaluation))
    return heard.getvalue()


def test_the_table_of_an_evaluation_has_every_way_and_what_it_must_reach() -> None:
    evaluation = evaluation_of(head=True, tau=1.34, break_even=1.73, sets=("everyday", "code"))
    evaluation["sets"]["code"].pop("speed")
    evaluation["training"]["heldout"] = {"accept_len": 2.226, "base_accept_len": 1.866}
    text = printed(evaluation)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    rows = {row[0]: row[1:] for row in cells if row}
    assert rows["prompts"] == ["80", "80"] and rows["proposals"] == ["3", "3"]
    assert rows["tau (95 %)"] == ["1.340 (1.298 to 1.383)", "1.140 (1.098 to 1.183)"]
    assert rows["tau, head off"][0].startswith("1.269 (")
    assert rows["tau, block proposals"][0].startswith("1.361 (")
    assert rows["n-gram floor"][0].startswith("1.123 (")
    assert rows["tokens/s speculative / plain"] == ["50.4 / 45.1", "-"]
    assert rows["tokens compared / equal"] == ["15360 / 15360"] * 2
    words = " ".join(text.split())
    assert "smollm2-135m-instruct, step 160, block 4, head domino, temperature 0.0" in words
    assert "break-even tau 1.73 at batch 1 here; loss 12.950 -> 2.760 in 160 steps" in words
    assert "held-out accept_len (teacher-forced) 2.226, base 1.866" in words


def test_the_table_leaves_out_what_was_not_measured() -> None:
    evaluation = evaluation_of(head=False, tau=1.27, break_even=1.6, sets=("everyday",))
    sampled = copy.deepcopy(evaluation)
    sampled["cycle"] = None
    for key in ("tokens_compared", "tokens_equal"):
        del sampled["sets"]["everyday"]["ways"]["serving"][key]
    text = printed(sampled)
    assert "no head" in text and "n-gram floor" in text
    for absent in ("head off", "block proposals", "compared", "break-even"):
        assert absent not in text
    assert "break-even" in printed(evaluation)
