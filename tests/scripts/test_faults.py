"""The fault harness judges outcomes broken on purpose, and a few real faults go through it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from faults_command import PARTS, table
from faults_damage import WAYS, break_something
from faults_growth import Sample, grown
from faults_place import Bits, Case, Place, all_cases, cleared, difference, in_turn
from faults_process import Outcome
from faults_verdict import completion, crash, damage, interruption, ownership, refusal

DONE = Outcome(code=0, out="run\n", log="step 6/6\n", seconds=3.0)
REFUSED = replace(DONE, code=2, out="", log="loading\nerror: rows.jsonl: 2 rows, expected 3\n")
STOPPED = Outcome(code=130, out="", log="interrupted: all is kept\n", seconds=3.0)


def test_verdicts_pass_what_holds() -> None:
    assert [crash(one) for one in (DONE, REFUSED, STOPPED)] == [None] * 3
    assert refusal(REFUSED, names="rows.jsonl") is None
    assert completion(DONE, start="it") is None
    diverged = replace(REFUSED, code=3, log="stopped: the parameters are not finite\n")
    assert refusal(diverged, code=3) is None
    assert interruption(STOPPED, seconds=1) is None
    saved = "interrupted: stopping after this step\nsaving checkpoint 7\nstopped at step 7 of 9\n"
    assert interruption(replace(STOPPED, log=saved), seconds=1) is None
    assert interruption(DONE, seconds=1) is None
    assert damage(DONE, differences=None, said=False) == ("harmless", None)
    assert damage(DONE, differences=None, said=True) == ("restored", None)
    assert damage(REFUSED, differences=None, said=False) == ("refused", None)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (replace(REFUSED, log="Traceback (most recent call last):\n" + REFUSED.log), "Traceback"),
        (replace(REFUSED, code=-11), "exit code -11"),
        (replace(REFUSED, code=1), "exit code 1, expected 2"),
        (replace(REFUSED, hung=True), "hung for 3 s"),
        (DONE, "accepted without a word"),
        (replace(REFUSED, log=REFUSED.log * 2), "2 lines begin with"),
        (replace(REFUSED, log=REFUSED.log + "and more\n"), "1 lines begin with"),
        (replace(REFUSED, log="error: rows.jsonl " + "x" * 500 + "\n"), "a line of 518 characters"),
        (replace(REFUSED, log="error: a file: 2 rows\n"), "does not name 'rows.jsonl'"),
    ],
)
def test_refusal_tells_what_is_no_refusal(broken: Outcome, said: str) -> None:
    assert said in str(refusal(broken, names="rows.jsonl"))


def test_completion_tells_what_did_not_end_whole() -> None:
    said = completion(STOPPED, start="started again, it")
    assert said == "started again, it ends with code 130: interrupted: all is kept"
    assert "Traceback" in str(completion(replace(DONE, log="Traceback\n"), start="it"))


@pytest.mark.parametrize(
    ("broken", "seconds", "said"),
    [
        (STOPPED, 10.5, "ended 10.5 s after the signal"),
        (replace(STOPPED, code=-15), 1, "exit code -15"),
        (replace(STOPPED, code=2), 1, "exit code 2, expected 130"),
        (replace(STOPPED, log=""), 1, "0 lines on the interruption"),
        (replace(STOPPED, log=STOPPED.log * 2), 1, "2 lines on the interruption"),
        (replace(STOPPED, log=STOPPED.log + "step 7\n"), 1, "the line is not the last one"),
        (replace(STOPPED, log="Fatal Python error: x\n" + STOPPED.log), 1, "Fatal Python error"),
    ],
)
def test_interruption_tells_what_is_no_clean_end(
    broken: Outcome, seconds: float, said: str
) -> None:
    assert said in str(interruption(broken, seconds=seconds))


@pytest.mark.parametrize(
    ("broken", "differences", "kind"),
    [
        (DONE, "3 of 9 arrays", "wrong"),
        (replace(REFUSED, log="Traceback"), None, "crashed"),
        (replace(REFUSED, code=3), None, "failed"),
        (replace(REFUSED, log=REFUSED.log * 2), None, "refused"),
    ],
)
def test_damage_tells_wrong_numbers_from_everything_else(
    broken: Outcome, differences: str | None, kind: str
) -> None:
    found, fault = damage(broken, differences=differences, said=differences is not None)
    assert found == kind and (differences or "") in str(fault) and fault is not None


BITS = Bits(8, {"params['a']": "float32 (2,) 00", "ema['a']": "float32 (2,) 11"}, b"1\n2\n")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"step": 7}, "step 7 instead of 8"),
        ({"arrays": BITS.arrays | {"ema['a']": "float32 (2,) 12"}},
         "1 of 2 arrays of the state, ema['a'] first"),
        ({"arrays": {"params['a']": "float32 (2,) 00"}}, "1 of 2 arrays"),
        ({"metrics": b"1\n3\n"}, "metrics.jsonl from line 2 on (2 lines, expected 2)"),
        ({"metrics": b"1\n"}, "metrics.jsonl from line 2 on (1 lines, expected 2)"),
    ],
)  # fmt: skip
def test_bits_name_what_differs(fields: dict[str, object], said: str) -> None:
    assert difference(BITS, BITS) is None and difference(BITS, "words") == "other files or words"
    assert str(difference(BITS, replace(BITS, **fields))).startswith(said)
    both = str(difference(BITS, replace(BITS, **{"step": 6, **fields})))
    assert both.startswith("step ") and said in both


@pytest.mark.parametrize("way", sorted(WAYS))
def test_each_way_of_breaking_breaks(way: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = bytes(range(1, 200))
    rng = np.random.default_rng(0)
    for _ in range(8):
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)
        WAYS[way](path, rng)
        assert not path.is_file() or path.read_bytes() != content


def test_ownership_takes_one_undisturbed_and_one_refused_process() -> None:
    refused = replace(REFUSED, log="error: run: in use by process 7 since 12:00\n")
    assert ownership({7: DONE, 8: refused}, overlap=True, again=False) is None
    assert "process 9" in str(ownership({9: DONE, 8: refused}, overlap=True, again=False))
    assert "both failed" in str(ownership({7: refused, 8: refused}, overlap=True, again=True))
    assert "both succeeded" in str(ownership({7: DONE, 8: DONE}, overlap=True, again=False))
    assert ownership({7: DONE, 8: DONE}, overlap=True, again=True) is None
    late = replace(REFUSED, log="error: out: already there and not an empty directory\n")
    assert ownership({7: DONE, 8: late}, overlap=True, again=False) is None


def test_break_something_takes_directories_too(tmp_path: Path) -> None:
    (tmp_path / "step" / "params").mkdir(parents=True)
    broken, how = break_something([tmp_path / "step"], np.random.default_rng(0))
    assert how in ("removed", "emptied") and not (broken / "params").exists()


def test_growth_is_told_and_a_short_run_is_none() -> None:
    flat = [Sample(step, 1000, 20, 300) for step in range(0, 3000, 100)]
    assert grown(flat, "memory") == ("1000 -> 1000 (+0.00%)", None)
    growing = [replace(one, memory=1000 + one.step // 50, handles=one.step) for one in flat]
    for what in ("memory", "handles"):
        assert f"{what} grew" in str(grown(growing, what)[1])
    assert "expected at least 15" in str(grown(flat[:10], "memory")[1])


def test_the_table_counts_what_held() -> None:
    cases = [Case("kills", "1", None, "equal"), Case("kills", "2", "another state")]
    rows = table([("kills", cases, [cases[1]], 7.4)]).splitlines()
    assert rows[-1] == "| kills | 2 | 1 | 1 | 1 equal | 7 |"


def test_names_take_turns() -> None:
    works = list(in_turn(("train", "export"), 3, lambda *words: Case("part", str(words), None)))
    assert [name for name, _ in works] == ["train", "export", "train"]
    names = [work()[0].name for _, work in works]
    assert names == ["(0, 'train')", "(1, 'export')", "(2, 'train')"]


def test_a_place_is_kept_where_something_did_not_hold(tmp_path: Path) -> None:
    place = tmp_path / "case-7"
    place.mkdir()
    assert cleared(place, "another state") == "another state (case-7)" and place.is_dir()
    assert cleared(place, None) is None and not place.exists()


def test_a_work_that_fails_did_not_hold() -> None:
    def fails() -> list[Case]:
        raise KeyError("gone")

    (case,) = all_cases("kills", [("run 1", fails)], 1)
    assert case.fault == "the harness failed: KeyError: 'gone'"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "count"),
    [
        ("kills", 3),
        ("saves", 2),
        ("owners", 4),
        ("signals", 5),
        ("damage", 12),
        ("places", 12),
        ("logs", 12),
    ],
)
def test_real_faults_hold(part: str, count: int, tmp_path: Path) -> None:
    place = Place(tmp_path, seed=1)
    try:
        cases = list(PARTS[part][0](place, count))
    finally:
        place.close()
    assert len(cases) == count and [case for case in cases if case.fault is not None] == []
