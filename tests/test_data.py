"""docs/data.md: its examples give the rows and reports that it shows, its commands run."""

import gzip
import itertools
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml
from chat_templates import PUBLISHED, covered
from chats import write
from commands import run_commands
from documents import FENCE, blocks, commands, page, section
from tiny import SWITCHED_TEMPLATE, Heard, run_config, write_target

from domino_jax.base.errors import InputError
from domino_jax.base.marks import marked
from domino_jax.data.conversations import RowSet, load_rows
from domino_jax.target.load import load_tokenizer
from domino_jax.training.inputs import RowSettings, read_rows
from domino_jax.training.preview import escaped, supervised_spans

PAGE = page("docs/data.md")
MAX_LENGTH = 1000
USABLE = {"input_ids": [0], "loss_mask": [1]}


class Example(NamedTuple):
    """Lines of a file, and the block after them: `kind`, its first line, and the rest."""

    lines: str
    kind: str
    template: str
    shown: str


def examples() -> Iterator[Example]:
    found = FENCE.findall(PAGE)
    for (language, lines), (kind, after) in itertools.pairwise(found):
        if language == "jsonl" and kind in ("rows", "report"):
            heading, _, shown = after.partition("\n")
            yield Example(lines, kind, heading.removeprefix("# "), shown)


EXAMPLES = list(examples())


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target") / "DIR", template=SWITCHED_TEMPLATE)


def settings_of(heading: str) -> tuple[str, RowSettings, str]:
    """The template, the settings of a row and `special_tokens` that a block's first line names."""
    name, *words = heading.split(" data.")
    data = dict(word.split("=") for word in words)
    masked = yaml.safe_load(data.pop("mask_reasoning_content", "false"))
    special = data.pop("special_tokens_in_text", "allow")
    kwargs = {key.removeprefix("chat_template_kwargs."): value for key, value in data.items()}
    settings = RowSettings(
        max_length=MAX_LENGTH, chat_template_kwargs=kwargs, mask_reasoning_content=masked
    )
    return name, settings, special


def rows_block(found: RowSet, tokenizer: Any) -> str:
    """The rows of a file with their marks, and why others are none, as the page shows them."""
    lines = []
    for row in found.rows:
        spans = supervised_spans(tokenizer, row.input_ids, row.loss_mask)
        text = "".join(
            marked(escaped(text), coloured=False) if supervised else escaped(text)
            for text, supervised in spans
        )
        lines += [f"# line {row.line}", text.removesuffix("\n")]
    lines += [f"# line {bad.line}: {bad.reason}" for bad in found.bad_lines]
    lines += [f"# {name} is not read" for name in sorted(found.reading.unused)]
    return "".join(f"{line}\n" for line in lines)


def report_block(path: str, tokenizer: Any, settings: RowSettings) -> str:
    """The lines that `domino train` prints of a file."""
    heard = Heard()
    sizes = {"vocab_size": 2**20, "max_position_embeddings": MAX_LENGTH, "mask_token_id": 2**20 - 1}
    draft: Any = SimpleNamespace(**sizes)  # as much of it as rows are checked against
    try:
        read_rows(
            path,
            tokenizer,
            settings,
            draft=draft,
            packing=False,
            max_unusable=0.2,
            special_tokens="allow",
            end_ids=(),
            reporter=heard,
        )
    except InputError as error:
        heard.say(f"error: {error}")
    return "".join(f"{line}\n" for line in heard.lines)


def shown(example: Example, target: Path) -> str:
    """The block that belongs behind the lines of an example."""
    name, settings, special = settings_of(example.template)
    tokenizer = load_tokenizer(target) if name == "toy" else PUBLISHED[name].tokenizer()
    path = Path("answers.jsonl")
    lines = [line.encode() for line in example.lines.splitlines()]
    if example.kind == "report":
        return report_block(str(write(path, *lines)), tokenizer, settings)
    # A file without any usable line has no rows to show.
    whole = write(path, *lines, USABLE)
    found = load_rows(whole, tokenizer, special_tokens=special, **vars(settings))
    assert found.rows.pop().line == len(lines) + 1
    return rows_block(found, tokenizer)


@pytest.mark.pitfall(
    "tools, weight or other keys of a line ignored",
    seen="data/conversations.py: message keys that the template does not read not reported",
)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.template)
def test_an_example_gives_what_is_shown_after_it(
    example: Example, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown(example, target) == example.shown


def test_every_line_of_an_example_is_a_row_or_named() -> None:
    """Other JSONL is the prompts of the commands, which has neither rows nor reports."""
    assert len(EXAMPLES) == len(blocks(PAGE, "jsonl")) - 1
    assert len(EXAMPLES) == len(blocks(PAGE, "rows")) + len(blocks(PAGE, "report"))
    for example in EXAMPLES:
        numbers = {int(number) for number in re.findall(r"^# line (\d+)", example.shown, re.M)}
        lines = [json.loads(line) for line in example.lines.splitlines()]
        of_rows = {n for n, line in enumerate(lines, start=1) if "generator" not in line}
        assert example.kind == "report" or numbers == of_rows, example


def test_a_packed_file_gives_the_same_rows(target: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(target)
    (example,) = [each for each in EXAMPLES if each.template == "toy" and "generator" in each.lines]
    packed = tmp_path / "answers.jsonl.gz"
    packed.write_bytes(gzip.compress(example.lines.encode()))
    found = load_rows(packed, tokenizer, max_length=MAX_LENGTH)
    assert rows_block(found, tokenizer) == example.shown


def test_the_commands_run_and_regenerate_writes_such_a_file(target: Path, tmp_path: Path) -> None:
    shutil.copytree(target, tmp_path / "DIR")
    run_config(tmp_path, tmp_path / "DIR", data={"batch_size": 2}, train={"steps": 1})
    prompts, answers = blocks(section(PAGE, "Answers of the target"), "jsonl")
    (tmp_path / "prompts.jsonl").write_text(prompts)
    first, *others = [
        shlex.split(line.replace("-tokens 3072", "-tokens 24")) for line in commands(PAGE)
    ]
    assert first[1:4] == ["regenerate", "prompts.jsonl", "answers.jsonl"]
    told = run_commands([first], tmp_path)
    assert_alike((tmp_path / "answers.jsonl").read_text(), answers)
    (tmp_path / "answers.jsonl").write_text(answers)
    told += run_commands(others, tmp_path)
    assert [code for code, _, _ in told] == [0] * (1 + len(others)), told
    assert (tmp_path / "run/checkpoints").is_dir()


def assert_alike(written: str, shown: str) -> None:
    """Compares two files of answers in all but what the target generated."""
    (header, *lines), (shown_header, *shown_lines) = (
        [json.loads(line) for line in text.splitlines()] for text in (written, shown)
    )
    assert header["generator"] == shown_header["generator"] | {"max_new_tokens": 24}
    assert header["versions"].keys() == shown_header["versions"].keys()
    for line, shown_line in zip(lines, shown_lines, strict=True):
        assert list(line) == list(shown_line)
        for key in ("chat_template_kwargs", "prompt_line", "prompt_ids"):
            assert line.get(key) == shown_line.get(key)
        assert line["messages"][:-1] == shown_line["messages"][:-1]


def test_ids_of_an_engine_become_rows(target: Path, tmp_path: Path) -> None:
    (body,) = blocks(PAGE, "python")
    space: dict[str, Any] = {}
    exec(body, space)
    prompt, answer = [1, 4, 6, 7, 0, 1, 5], [9, 10, 0]
    outputs = [
        SimpleNamespace(
            prompt_token_ids=prompt,
            outputs=[SimpleNamespace(token_ids=answer[:count], finish_reason=reason)],
        )
        for count, reason in ((3, "stop"), (2, "length"))
    ]
    space["write_answers"](tmp_path / "answers.jsonl", outputs, target="DIR")
    found = load_rows(tmp_path / "answers.jsonl", load_tokenizer(target), max_length=MAX_LENGTH)
    assert [row.input_ids.tolist() for row in found.rows] == [prompt + answer, prompt + answer[:2]]
    assert [row.loss_mask.tolist() for row in found.rows] == [
        [False] * len(prompt) + [True] * count for count in (3, 2)
    ]
    assert found.unfinished == 1 and not found.bad_lines


def test_the_table_has_the_behaviours_of_the_test_templates() -> None:
    table = re.findall(r"^\| (.+) \| .+ \| (.+) \|$", section(PAGE, "Published templates"), re.M)
    shown = {behaviour: names.split(", ") for behaviour, names in table[1:]}
    found: dict[str, list[str]] = {}
    for name, of_template in covered().items():
        for behaviour in of_template:
            found.setdefault(behaviour, []).append(name)
    assert shown == found
