"""What counts as the same chat template, and which names it can be told."""

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from chats import CHATML, make_tokenizer

from domino_jax.base.errors import InputError
from domino_jax.data import template
from domino_jax.data.template import (
    NO_KWARGS,
    ChatTemplate,
    chat_template,
    check_kwargs,
    dated,
    recorded_date,
    settings_text,
)


def test_a_template_is_its_text_and_what_it_is_told() -> None:
    told = {"enable_thinking": False, "budget": 3}
    ours = chat_template(make_tokenizer(), told)
    assert ours == chat_template(make_tokenizer(), dict(reversed(told.items())))
    assert ours != chat_template(make_tokenizer(CHATML + " "), told)
    assert ours != chat_template(make_tokenizer(), NO_KWARGS) == ChatTemplate(ours.sha256, {})
    # Equal in Python; `is false` in a template tells them apart.
    for other in (0, 0.0):
        assert ours != ChatTemplate(ours.sha256, {**told, "enable_thinking": other})
    assert ours.as_json() == {"chat_template": ours.sha256, "chat_template_kwargs": told}
    assert f"{ours}" == (
        f"sha256 {ours.sha256[:12]} with chat_template_kwargs "
        f'{{"budget": 3, "enable_thinking": false}}'
    )


def test_another_template_than_the_drafts_is_told_by_its_part() -> None:
    def told(ours: ChatTemplate) -> str:
        with pytest.raises(InputError) as caught:
            ours.check_trained(ChatTemplate("a", {"x": 1}), source="run", target="tiny")
        return str(caught.value)

    assert told(ChatTemplate("b", {"x": 1})).startswith("run: the chat template of tiny is not the")
    assert told(ChatTemplate("a", {})) == (
        'run: trained with chat_template_kwargs {"x": 1}, asked for are {}; '
        "leave them out to take the draft's own"
    )
    ChatTemplate("a", {"x": 1}).check_trained(ChatTemplate("a", {"x": 1}), source="", target="")


READS = {
    "a test": "{% if enable_thinking is defined and enable_thinking is false %}x{% endif %}",
    "a default": "{% set enable_thinking = enable_thinking | default(true) %}{{ enable_thinking }}",
    "set where it is not told": (
        "{% if not enable_thinking is defined %}{% set enable_thinking = true %}{% endif %}"
    ),
    "a macro": "{% macro m() %}{{ enable_thinking }}{% endmacro %}{{ m() }}",
    "a namespace": "{% set ns = namespace(on=enable_thinking) %}{{ ns.on }}",
    "marked answers and loop controls": (
        "{%- generation %}{{ enable_thinking }}{% endgeneration -%}"
        "{% for m in messages %}{% break %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("part", READS.values(), ids=READS.keys())
def test_a_name_that_the_template_reads_can_be_told(part: str) -> None:
    tokenizer = make_tokenizer(part + CHATML)
    check_kwargs(tokenizer, {"enable_thinking": False})
    misspelt = r"read 'enable_thnking'; did you mean 'enable_thinking'\?$"
    with pytest.raises(InputError, match=misspelt):
        check_kwargs(tokenizer, {"enable_thnking": False})
    with pytest.raises(InputError, match=r"read 'tools'; it reads enable_thinking$"):
        check_kwargs(tokenizer, {"tools": 1})


FILLED = ["messages", "add_generation_prompt", "tokenize", "chat_template", "eos_token", "range"]


@pytest.mark.parametrize("name", [*FILLED, "enable_thinking", "content", "message"])
def test_a_name_that_is_not_the_users_to_tell_is_refused(name: str) -> None:
    template = CHATML + "{{ eos_token }}{% if none %}{{ raise_exception('no') }}{% endif %}"
    with pytest.raises(InputError, match=f"not read '{name}'; it reads no setting$"):
        check_kwargs(make_tokenizer(template), {name: True})


def test_a_template_that_cannot_be_read_is_told_in_one_line() -> None:
    tokenizer: Any = make_tokenizer("{% if %}")
    check_kwargs(tokenizer, NO_KWARGS)
    message = "the chat template cannot be read: Expected an expression"
    with pytest.raises(InputError, match=message):
        check_kwargs(tokenizer, {"enable_thinking": False})


DAY, NEXT = "2026-12-01", "2026-12-02"
OF_DAY, OF_NEXT = {"strftime_now": DAY}, {"strftime_now": NEXT}
# As Llama 3.2's.
DATED = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}{{ date_string }}"
)


def test_a_template_that_prints_the_date_gets_the_first_recorded_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer, told = make_tokenizer(DATED + CHATML), {"date_string": "x"}
    monkeypatch.setattr(template, "today", lambda: NEXT)
    assert dated(tokenizer, told, {}, {"y": 1}) == told | OF_NEXT
    assert dated(tokenizer, told, {}, OF_DAY, OF_NEXT) == told | OF_DAY
    assert dated(tokenizer, OF_NEXT, OF_DAY) == OF_NEXT
    assert settings_text(dated(tokenizer, NO_KWARGS)) == f'{{"strftime_now": "{NEXT}"}}'
    # The name alone is no use of it.
    for text in (CHATML, CHATML + "{# strftime_now #}", CHATML + "strftime_now"):
        assert dated(make_tokenizer(text), told, OF_DAY) == told


def test_a_template_without_a_date_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "names_read", None)
    assert dated(make_tokenizer("{% if %}"), {"x": 1}, OF_DAY) == {"x": 1}


def test_today_is_a_date_of_this_time_zone() -> None:
    before, found, after = datetime.date.today(), template.today(), datetime.date.today()
    assert before <= datetime.date.fromisoformat(found) <= after


def test_a_date_is_checked() -> None:
    tokenizer: Any = make_tokenizer(DATED + CHATML)
    check_kwargs(tokenizer, OF_DAY | {"date_string": "x"})
    for value in (
        "today",
        "",
        "20261201",
        "2026-02-30",
        "2026-12-01T10:00",
        20261201,
        False,
        2026.0,
    ):
        with pytest.raises(InputError) as caught:
            check_kwargs(tokenizer, {"strftime_now": value})
        assert str(caught.value) == (
            f"chat_template_kwargs: strftime_now is {value!r}, expected a date as YYYY-MM-DD, "
            "for example 2026-12-01"
        )
    with pytest.raises(InputError, match=r"does not read 'strftime_now'; it reads no setting$"):
        check_kwargs(make_tokenizer(), OF_DAY)
    with pytest.raises(InputError, match=r"'strftime_nw'; did you mean 'strftime_now'\?$"):
        check_kwargs(tokenizer, {"strftime_nw": DAY})


OTHERS = b'{"messages": []}\n'
HEADER = json.dumps({"generator": {"chat_template_kwargs": OF_DAY}}).encode() + b"\n"
LINE = json.dumps({"messages": [], "generator": {"chat_template_kwargs": OF_DAY}}).encode()
RECORDS = {
    "a header": (HEADER + OTHERS, OF_DAY),
    "a line": (LINE, OF_DAY),
    "blank lines": (b"\n \n" + LINE, OF_DAY),
    "an unfinished file": (b'{"sha256": "00"}\n' + HEADER + OTHERS, OF_DAY),
    "nothing attested": (b'{"sha256": "00"}\n', {}),
    "a later line": (OTHERS + LINE, OF_DAY),
    "a header without a date": (b'{"generator": {}}\n' + HEADER, OF_DAY),
    "half a line": (LINE[:-5], {}),
    "no UTF-8": (b"\xff\n", {}),
    "a list": (b"[1]", {}),
    "another program": (b'{"generator": "x"}', {}),
    "a later date": (b'{"generator": {"chat_template_kwargs": {"x": 1}}}\n' + HEADER, OF_DAY),
    "no mapping": (b'{"generator": {"chat_template_kwargs": [1]}}', {}),
    "empty": (b"", {}),
}


@pytest.mark.parametrize(("content", "expected"), RECORDS.values(), ids=RECORDS.keys())
def test_settings_of_a_file(content: bytes, expected: dict[str, Any], tmp_path: Path) -> None:
    path, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    assert recorded_date(path) == {}
    path.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    assert recorded_date(path) == expected == recorded_date(packed)


def test_text_is_json_that_an_option_takes_back() -> None:
    assert settings_text({"b": "ü", "a": True}) == '{"a": true, "b": "ü"}'
    assert settings_text(NO_KWARGS) == "{}"
