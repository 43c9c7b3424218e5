"""The page of a run or several: every figure is the file's, all text is escaped, nothing fails."""

import functools
import hashlib
import json
import math
import os
import re
import string
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib  # noqa: F401  (a machine without it skips this file)
import pytest
import yaml
from page_runs import edited, evaluation_of, write_evaluation, write_run

from domino_jax.base.files import write_checksums
from domino_jax.page import charts, document, notes, tables
from domino_jax.page.charts import Chart, described
from domino_jax.page.document import write_page
from domino_jax.page.growth import growths
from domino_jax.page.pictures import Picture
from domino_jax.page.sources import RunFiles, read_runs
from domino_jax.page.verdict import verdicts

TOP = Path(__file__).parent.parent.parent
EVIL = '<script>alert("x")</script> & "quoted" $x^$ \ud800 \x00'
SHOWN_EVIL = "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; &#34;quoted&#34; $x^$"
SHA_OF_EVERYDAY = ("sets", "everyday", "sha256")
VOID = {"meta", "link", "path", "use", "br", "img"}


@dataclass
class Element:
    """An element of a page, and the text that is directly in it."""

    tag: str
    attributes: dict[str, str | None]
    text: str = ""


class Parsed(HTMLParser):
    """What a page holds, by a parser that repairs nothing."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self.text = ""
        self._open: list[Element] = [Element("", {})]
        self.feed(page)
        assert len(self._open) == 1
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self._open.pop().tag == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data
        self._open[-1].text += data

    def of(self, tag: str) -> list[Element]:
        return [element for element in self.elements if element.tag == tag]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages whose charts are described but not drawn: matplotlib takes 1.5 s for a page."""

    def drawn(charts: Sequence[Chart], names: Sequence[str]) -> list[Picture]:
        empty = {"keys": [], "box": "0 0 1 1", "body": "", "png": b""}
        return [Picture(chart=chart, alt=described(chart, names), **empty) for chart in charts]

    monkeypatch.setattr(document, "drawn", drawn)


def page_of(*runs: Path) -> Parsed:
    """Writes the page of runs and reads it."""
    out = runs[0] / "report.html"
    write_page(read_runs(runs), out)
    return Parsed(out.read_text(encoding="utf-8"))


def stored(home: Path, file: str, pointer: str) -> Any:
    """What a file of a run holds at a pointer."""
    text = (home / file).read_text()
    if file.endswith(".jsonl"):
        tree: Any = [json.loads(line) for line in text.splitlines()]
    else:
        tree = yaml.safe_load(text) if file.endswith(".yaml") else json.loads(text)
    for step in pointer.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        tree = tree[int(step)] if isinstance(tree, list) else tree[step]
    return tree


def agrees(shown: str, value: float) -> bool:
    """Whether a figure is the value, to the digits that it shows."""
    digits, scale = shown.replace(",", ""), 1.0
    if digits.endswith("%"):
        digits, scale = digits[:-1], 100.0
    elif digits.endswith(" GiB"):
        digits, scale = digits[:-4], 2.0**-30
    decimals = len(digits.partition(".")[2])
    return abs(float(digits) - value * scale) <= 0.5 * 10.0**-decimals + 1e-9


def test_every_figure_is_the_one_of_its_file(undrawn: None, tmp_path: Path) -> None:
    one = write_run(tmp_path / "domino")
    two = write_run(tmp_path / "dflash", head=False, tau=1.27)
    page = page_of(one, two)
    keys = set()
    for figure in page.of("data"):
        named = figure.attributes
        value = stored(tmp_path, named["data-file"], named["data-key"])
        assert agrees(figure.text, value) and float(named["value"]) == value, named
        keys.add((named["data-file"], re.sub(r"\d+", "N", named["data-key"])))
    everyday = "/sets/everyday/ways"
    expected = {
        "domino/evaluation.json": (
            f"{everyday}/serving/tau",
            f"{everyday}/serving/interval/N",
            f"{everyday}/serving/acceptance/conditional/N",
            f"{everyday}/serving/acceptance/marginal/N",
            f"{everyday}/ngram/tau",
            f"{everyday}/head_off/gain/ratio",
            f"{everyday}/block/tau",
            "/sets/humaneval/ways/serving/tau",
            "/sets/everyday/speed/speed_up",
            "/cycle/draft",
            "/cycle/verification",
            "/cycle/break_even_tau",
            "/cycle/break_even_tau_if_one_step",
            "/training/data/answer_tokens",
        ),
        "domino/metrics.jsonl": ("/N/accept_len", "/N/base_accept_len", "/N/tau", "/N/median"),
        "domino/timing.jsonl": ("/N/mfu", "/N/peak_memory_bytes"),
        "domino/config.yaml": ("/optimizer/learning_rate", "/draft/block_size"),
        "dflash/evaluation.json": (f"{everyday}/serving/tau",),
    }
    for file, pointers in expected.items():
        for pointer in pointers:
            assert (file, pointer) in keys, (file, pointer)
    assert not agrees("1.35", 1.3401) and agrees("24%", 0.2449) and not agrees("24%", 0.25)


def test_a_page_says_first_whether_it_pays_and_needs_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "domino")
    page = page_of(run)
    words = page.text
    assert "everyday does not pay Tau 1.34 (1.30 to 1.38) is below the break-even of 1.73" in words
    assert "costs no verification and is not counted" in words
    assert words.index("Does it pay?") < words.index("Acceptance by position")
    assert not (page.of("script") or page.of("img") or page.of("iframe"))
    drawn = ("clippath", "path")
    ids = [one.attributes.get("id") for one in page.elements if one.tag not in drawn]
    ids = [name for name in ids if name is not None]
    assert len(set(ids)) == len(ids)
    for link in (element.attributes["href"] for element in page.of("a")):
        there = link[1:] in ids if link.startswith("#") else (run / link).is_file()
        assert there, link
    text = (run / "report.html").read_text()
    assert len(text) < 2e6 and not re.search(r"(src|href)=\"(https?:)?//", text)
    pieces = evaluation_of(sets=("a",))["sets"]["a"]
    drafted = [word for word, own in pieces["examples"][0]["pieces"] if own]
    marked = [one.text for one in page.of("span") if one.attributes.get("class") == "drafted"]
    assert marked == [*drafted, *drafted]  # of two sets
    write_page(read_runs([run]), run / "again.html")
    # The same bytes, but for the name of the pictures' folder.
    assert (run / "again.html").read_text() == text.replace('href="report/', 'href="again/')


@pytest.mark.parametrize(
    ("tau", "answer"), [(1.8, "pays"), (1.74, "too close to call"), (1.6, "does not pay")]
)
def test_a_verdict_asks_for_the_whole_interval(tmp_path: Path, tau: float, answer: str) -> None:
    (first, second) = verdicts(read_runs([write_run(tmp_path / "run", tau=tau)]))
    assert (first.answer, first.prompts, second.prompts) == (answer, "everyday", "humaneval")


def test_runs_stand_side_by_side_and_tau_is_drawn_over_data(tmp_path: Path) -> None:
    small = write_run(tmp_path / "a" / "run", answer_tokens=1000)
    large = write_run(tmp_path / "b" / "run", answer_tokens=4000, tau=1.9)
    other = write_run(tmp_path / "c" / "run", answer_tokens=4000, head=False)
    runs = read_runs([small, large, other])
    assert [run.name for run in runs] == [str(small), str(large), str(other)]  # all called `run`
    first, second = charts.data_charts(runs)
    assert first.title == "tau by data, everyday"
    # A single run of its kind is no curve.
    line, beyond = first.lines
    assert line.points == ((1000.0, 1.34), (4000.0, 1.9)) and first.kinds == {0: "domino head"}
    # Tau grew by 0.56 where the tokens grew by a factor of four.
    further = 1.9 + 0.56 * math.log(10) / math.log(4)
    assert beyond.dashed and beyond.points[0] == pytest.approx((4000.0, 1.9))
    assert beyond.points[1] == pytest.approx((40000.0, further))
    cells = tables.data_table(runs)["tau, everyday, extrapolated to 10 times the most"]
    assert cells == ((), (f"{further:.2f}",), ())
    assert second.lines[0].points[1] == (4000.0, 1.9 - 0.2)
    over = [tables.tau_column(run, "everyday", runs[0])[f"gain over {small}"] for run in runs]
    # 90 and 64 tokens in 47 verifications of each prompt.
    assert over[:2] == [(), ("× 1.41 (1.41 to 1.41)",)]  # noqa: RUF001
    page = page_of(small, large, other)
    assert "Tau by data" in page.text and "needs runs of one kind" not in page.text


def test_runs_of_one_size_have_no_curve(undrawn: None, tmp_path: Path) -> None:
    same = [write_run(tmp_path / name) for name in "ab"]
    assert "needs runs of one kind" in page_of(*same).text


def test_runs_without_a_curriculum_are_a_kind_of_their_own(tmp_path: Path) -> None:
    places = [write_run(tmp_path / f"{size}", answer_tokens=size) for size in (1, 2, 3, 4)]
    for place in places[2:]:
        config = yaml.safe_load((place / "config.yaml").read_text())
        config["loss"]["lambda_start"] = 0
        (place / "config.yaml").write_text(yaml.safe_dump(config))
    found = growths(read_runs(places), "everyday")
    assert [(one.kind, one.runs) for one in found] == [
        ("domino head", (0, 1)),
        ("domino head, no curriculum", (2, 3)),
    ]


@pytest.mark.parametrize(
    "path", [("evaluator", "max_new_tokens"), ("evaluator", "target_sha256"), SHA_OF_EVERYDAY]
)
def test_runs_asked_otherwise_are_not_compared_by_prompt(
    tmp_path: Path, path: tuple[str, ...]
) -> None:
    *parents, key = path
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two")]

    def gain_over_one() -> object:
        first, other = read_runs(runs)
        return tables.tau_column(other, "everyday", first)["gain over one"]

    assert gain_over_one()
    with edited(runs[1]) as evaluation:
        functools.reduce(dict.__getitem__, parents, evaluation)[key] = "another"
    assert not gain_over_one()


def test_text_of_prompts_answers_and_names_is_escaped(tmp_path: Path) -> None:
    evaluation = evaluation_of(sets=(EVIL,))
    evaluation["evaluator"]["target"] = evaluation["cycle"]["measured"]["hardware"] = EVIL
    evaluation["sets"][EVIL]["examples"] = [{"prompt": EVIL, "pieces": [[EVIL, True]]}]
    run = write_run(tmp_path / "<b>$1_^", steps=40)
    write_evaluation(run, evaluation)
    log = (run / "metrics.jsonl").read_text()
    skipped = {"step": 17, "split": "skipped", "reason": EVIL}
    (run / "metrics.jsonl").write_text(f"{log}{json.dumps(skipped)}\n")
    page = page_of(run)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert not (page.of("script") or page.of("b")) and "<script" not in text
    assert text.count(SHOWN_EVIL) > 10 and "&lt;b&gt;$1_^" in text


def test_control_characters_do_not_reach_the_page(undrawn: None, tmp_path: Path) -> None:
    """An override would show a text in another order than it has."""
    odd = "\x1b[2J\u202egpj.exe\u2066\x9b\0\ud800"
    run = write_run(tmp_path / "run")
    with edited(run) as evaluation:
        evaluation["evaluator"]["target"] = odd
        evaluation["sets"] = {odd: evaluation["sets"]["everyday"]}
        evaluation["sets"][odd]["examples"] = [
            {"prompt": odd, "pieces": [[f"a\n\u200d{odd}", True]]}
        ]
    words = page_of(run).text
    text = (run / "report.html").read_text(encoding="utf-8")
    assert not set(text) & set(odd) - set(string.printable)
    assert r"\x1b[2J\u202egpj.exe\u2066\x9b\x00\ud800" in words and "a\n\u200d" in text


def test_what_a_run_lacks_is_left_out_and_said(undrawn: None, tmp_path: Path) -> None:
    imported = tmp_path / "imported"
    (imported / "checkpoints").mkdir(parents=True)
    words = page_of(imported).text
    assert f"Left out: {notes.NOT_EVALUATED}." in words
    log = "Training, Acceptance while training, Speed and memory of training"
    assert f"{log}: {notes.NO_LOG}" in words
    run = write_run(tmp_path / "run", heldout=False)
    with edited(run) as evaluation:
        evaluation["cycle"] = None
        for prompts in evaluation["sets"].values():
            del prompts["examples"]
    words = page_of(run).text
    for reason in (
        "no cycle was timed, so no break-even is known",
        "Time of a cycle: no cycle was timed",
        "Answers: the evaluation kept no answers",
        "no held-out rows (data.eval)",
        "nothing was rolled out while training",
    ):
        assert reason in words, reason
    (run / "timing.jsonl").unlink()
    words = page_of(run, imported).text
    assert f"imported: {notes.NOT_EVALUATED}" in words
    assert "Speed and memory of training: run: no timing.jsonl" in words


def test_warnings_name_differences_that_are_no_ties(undrawn: None, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    tie = {"prompt": 3, "position": 7, "plain_token": 1, "speculative_token": 2}
    with edited(run) as evaluation:
        evaluation["sets"]["everyday"]["ways"]["head_off"]["differences"] = [
            tie | {"logit_gap": 0.0001},
            tie | {"logit_gap": 0.5, "prompt": 12},
            tie | {"logit_gap": None, "prompt": 13},
            tie | {"logit_gap": 0.001, "prompt": 14},  # no tie: those are closer
        ]
    text = page_of(run).text
    assert "step 17 was skipped: no anchor in its batch; lines 3, 9 of the data" in text
    assert "step 19: loss 27.125 where the median of its window was 9.871; line 5" in text
    assert "everyday, head off: the output for prompt 12 (from 0) differs at token 7" in text
    assert "logits are 0.5 apart, a tie would be below 0.001" in text
    assert "for prompt 13" in text and "for prompt 14" in text and "for prompt 3 " not in text


def places(tree: Any) -> Iterator[tuple[Any, str | int]]:
    """All that stands in a tree, by what holds it and its key there; two entries of a list."""
    keys = range(len(tree[:2])) if isinstance(tree, list) else list(tree)
    for key in keys:
        yield tree, key
        if isinstance(tree[key], list | dict):
            yield from places(tree[key])


def test_whatever_stands_in_an_evaluation_makes_a_page(tmp_path: Path) -> None:
    """Contents are made for every damage; drawing, which takes longer, for some of them."""
    run = write_run(tmp_path / "run", sets=("everyday",), steps=40)
    (files,) = read_runs([run])
    damaged = 0
    for inside, key in list(places(files.evaluation.value)):
        whole = inside[key]
        for odd in (None, "x", [], {}, [1], {"a": 1}, -1, 10**60, True):
            inside[key] = odd
            contents_of(files)
            damaged += 1
            if damaged % 300 == 0:
                assert document._evaluated([files])
        inside[key] = whole
    assert damaged > 900


def contents_of(run: RunFiles) -> None:
    """Makes all of a page that an evaluation goes into."""
    runs = [run]
    verdicts(runs), notes.warnings(run), notes.answers(runs), notes.lacking(run)
    tables.tau_column(run, "everyday", run), tables.position_table(runs, "everyday")
    tables.cycle_column(run), tables.evaluator_column(run), tables.training_column(run)
    drawn = (*charts.tau_charts(runs), *charts.position_charts(runs), *charts.cycle_charts(runs))
    for chart in drawn:
        assert described(chart, ["run"])


@pytest.mark.parametrize("odd", [1e300, -1.0, 0.0, 1e-300, 10**60, -1e29])
def test_numbers_that_nobody_measured_are_drawn_or_left_out(tmp_path: Path, odd: float) -> None:
    run = write_run(tmp_path / "run", sets=("everyday",), steps=40)
    with edited(run) as evaluation:
        serving = evaluation["sets"]["everyday"]["ways"]["serving"]
        serving["tau"], serving["interval"] = odd, [1e308, -odd]
        serving["acceptance"]["marginal"] = [odd, -odd, 1e29]
        evaluation["cycle"] |= {"break_even_tau": odd, "draft": odd, "plain": -odd}
    lines = [{"step": 10**9, "split": "train", "loss": odd}, {"step": 1, "split": "train"}]
    text = "".join(json.dumps(line | {"lambda_base": -odd}) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text)
    assert "Does it pay?" in page_of(run).text


def test_a_page_is_made_without_jax(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", sets=("everyday",), steps=40, heldout=False)
    program = (
        "import sys; sys.modules['jax'] = None; from pathlib import Path\n"
        "from domino_jax.page.sources import read_runs\n"
        "from domino_jax.page.document import write_page\n"
        "write_page(read_runs([Path(sys.argv[1])]), Path(sys.argv[1]) / 'report.html')\n"
    )
    command = [sys.executable, "-c", program, str(run)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    assert (run / "report" / "tau-1.png").read_bytes().startswith(b"\x89PNG")


def test_report_writes_beside_the_first_run_or_where_it_is_told(
    domino, undrawn: None, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", steps=40)
    code, out, log = domino("report", run)
    assert (code, out) == (0, f"{run / 'report.html'}\n") and "drawing" in log
    assert (run / "report.html").is_file() and (run / "report" / "loss.png").is_file()
    assert domino("report", run, "--out", tmp_path / "x.html")[0] == 0
    assert (tmp_path / "x" / "loss.png").is_file()
    assert not list(tmp_path.rglob(".*"))


def test_a_changed_evaluation_is_refused(domino, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=40)
    path = run / "evaluation.json"
    whole = path.read_text()
    for old, new in (("1.34", "1.94"), ('"ways"', '"wayz"'), ('"prompts": 80', '"prompts": 90')):
        assert old in whole
        path.write_text(whole.replace(old, new, 1))
        code, out, log = domino("report", run)
        assert (code, out) == (2, ""), log
        message = "evaluation.json: changed after it was written: its values have sha256"
        assert message in log and "run `domino evaluate` again" in log
    assert not (run / "report.html").exists() and not (run / "report").exists()


def test_what_could_not_be_verified_is_on_the_page(domino, undrawn: None, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=40)
    assert domino("report", run)[0] == 0
    assert "Not verified" not in (run / "report.html").read_text()
    path = run / "evaluation.json"
    evaluation = json.loads(path.read_text())
    del evaluation["sha256"]
    evaluation["training"]["notice"] = "metrics.jsonl: the file has changed"
    path.write_text(json.dumps(evaluation))
    log = (run / "metrics.jsonl").read_bytes()
    checkpoint = run / "checkpoints" / "40"
    mark = {"bytes": len(log), "sha256": hashlib.sha256(log).hexdigest()}
    for item, record in (("draft", {"step": 40}), ("run", {"log": mark})):
        (checkpoint / item).mkdir(parents=True)
        (checkpoint / item / "metadata").write_text(json.dumps(record))
    write_checksums(checkpoint)
    (run / "metrics.jsonl").write_bytes(log.replace(b"2.5", b"2.6", 1) + b"{")
    code, _, said = domino("report", run)
    page = (run / "report.html").read_text()
    assert code == 0
    for words in (
        "run/evaluation.json: no sha256, as earlier versions wrote it: its figures are not",
        "run/metrics.jsonl: its first",
        "run/metrics.jsonl: the file has changed",
    ):
        assert f"Not verified: {words}" in page and words in " ".join(said.split())


@pytest.mark.parametrize(
    ("pattern", "new"), [('"accept_len"', '"accept_leo"'), ('"loss": ([0-9.]+)', r'"loss": "\1"')]
)
def test_a_damaged_log_makes_a_page(
    domino, undrawn: None, tmp_path: Path, pattern: str, new: str
) -> None:
    path = write_run(tmp_path / "run", steps=40) / "metrics.jsonl"
    text, count = re.subn(pattern, new, path.read_text())
    path.write_text(text)
    assert count and domino("report", tmp_path / "run")[0] == 0


def test_pictures_are_not_written_through_a_link(domino, undrawn: None, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=40)
    (tmp_path / "other").mkdir()
    (run / "report").symlink_to(tmp_path / "other")
    code, _, log = domino("report", run)
    assert code == 2 and "report: a symbolic link, expected a directory; remove the link" in log
    assert not list((tmp_path / "other").iterdir()) and not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Missing argument"),
        (("nowhere",), "nowhere: not a run directory (none of checkpoints, config.yaml"),
        (("run", "empty"), "empty: not a run directory"),
        (("run", "--out", "page"), "expected a name that ends in .html"),
        (("run", "--out", "gone/x.html"), "no directory gone; make it first"),
        (("damaged",), "damaged/evaluation.json: not valid JSON"),
    ],
)
def test_bad_words_of_report_are_one_line(
    domino, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", steps=40)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "evaluation.json").write_text("{")
    code, out, log = domino("report", *words)
    assert (code, out) == (2, "") and message in log.splitlines()[-1], log
    assert not list(tmp_path.rglob("report.html"))
