"""Chat templates in their own process: the text that transformers renders, within the limits."""

import datetime
import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chats import CHATML, chat, make_tokenizer, write
from transformers.utils import chat_template_utils

from domino_jax.base.errors import InputError
from domino_jax.data import rendering
from domino_jax.data.conversations import load_rows
from domino_jax.data.prompt import stop_token_ids
from domino_jax.data.rendering import CostlyTemplate, History, Rendering, names_read, render

HI = [{"role": "user", "content": "Hi"}]
PLAIN = "{{ messages[0].content }}"
JOB = {"spelling": 0, "count": 1, "more": [], "generation_prompt": False}
NAMES = None  # or for the names that the template reads


def conversation(**kwargs: Any) -> dict[str, Any]:
    return {"spellings": [HI], "tools": None, "kwargs": kwargs}


@pytest.fixture(scope="module")
def quick() -> Iterator[rendering._Process]:
    """A process with limits that a test can wait for."""
    process = rendering._Process(seconds=1.0, memory_bytes=2**27)
    yield process
    process.end()


SAME = {
    "chatml": CHATML,
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ messages[0].content }}",
    "filters": "{{ messages | tojson(indent=2) }}{{ messages[0]['content'] | upper | trim }}"
    "{{ '<b>' }}",
    "marked answers": "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}"
    "{{ strftime_now('%Y') }}",
    "a date": "{{ strftime_now('%d %b %Y') }}"
    "{{ strftime_now(format='%A %B %y %H:%M:%S.%f %z%Z') }}",
    "loop controls": "{% for m in messages * 3 %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ loop.length }}"
    "{% endfor %}",
    "blocks": "{%- for m in messages -%}\n  {{ m.content }}\n  "
    "{%- if not loop.last %}\n{% endif %}\n{%- endfor %}\n",
    "a namespace": "{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}",
    "told": "{{ enable_thinking is false }}{{ budget }}{{ messages[0].get('reasoning_content') }}",
}


@pytest.mark.parametrize("template", SAME.values(), ids=SAME.keys())
def test_render_equals_transformers(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Clock":
            return cls(2026, 12, 1)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    tokenizer = make_tokenizer(template)
    told = {"enable_thinking": False, "budget": 0.5}
    more = {"reasoning_content": None, "n": [1.5, True, {"x": None}]}
    odd = [{"role": "user", "content": "ü\U0001f600\n{{ 1 }}<b>", **more}]
    both = itertools.product((HI, odd, chat("a", "b", "c")), (False, True))
    conversations = [Rendering(*one) for one in both]
    ours = render(tokenizer, conversations, {**told, "strftime_now": "2026-12-01"})
    for found, one in zip(ours, conversations, strict=True):
        theirs = {"tokenize": False, "add_generation_prompt": one.generation_prompt, **told}
        assert found == tokenizer.apply_chat_template(one.messages, **theirs)


def test_a_text_that_ends_earlier_is_not_the_one_before() -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    words, tokenizer = chat("x" * 1100, "y"), make_tokenizer(template)
    history = History(tokenizer, [words], tools=None, kwargs={})
    for count in (1, 2, 1, 2, 1):
        text = "".join(message["content"] for message in words[:count])
        assert history.render(0, count, generation_prompt=False) == text


DATED = "{{ strftime_now('%d %b %Y') }}"


def test_a_rendering_depends_on_its_request_alone(
    quick: rendering._Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(template: str, kwargs: dict[str, Any]) -> str:
        told = conversation(**kwargs)
        text: str = quick.ask(make_tokenizer(template), JOB, problem="refused", conversation=told)
        return text

    assert ask(DATED, {"strftime_now": "2024-02-29"}) == "29 Feb 2024"
    assert ask(DATED, {"strftime_now": "2026-12-01"}) == "01 Dec 2026"
    message = (
        r"^refused: it prints the date; give chat_template_kwargs.strftime_now, for example 20"
    )
    for kwargs in ({}, {"budget": 1}):
        with pytest.raises(InputError, match=message):
            ask(DATED, kwargs)
    # Not every conversation needs it.
    assert ask("{% if tools %}" + DATED + "{% endif %}x", {}) == "x"
    for part in ("{{ strftime_now('%s') }}", "{{ range(99999) | random }}", "{{ lipsum() }}"):
        found = set()
        for zone in ("UTC", "Asia/Tokyo"):
            monkeypatch.setenv("TZ", zone)
            quick.end()
            found |= {ask(part, {"strftime_now": "2026-12-01"}) for _ in range(2)}
        assert len(found) == 1


def test_render_tells_what_a_template_refuses() -> None:
    for template, message in (
        ("{{ raise_exception('only\n  users') }}", "the chat template refuses it: only users"),
        ("{% if %}", "the chat template refuses it: Expected an expression"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ):
        with pytest.raises(InputError, match=message):
            render(make_tokenizer(template), [Rendering(HI)], {})
    assert render(make_tokenizer(PLAIN), [Rendering(HI)], {}) == ["Hi"]


SANDBOXED = [
    *(
        "''.__class__.__mro__",
        "messages[0].__class__",
        "messages[0].items",
        "messages[0].get.__self__",
    ),
    *("'{0.__class__}'.format(1)", "'{0.content}'.format(messages[0])", "'%s' % messages[0].role"),
    *("'a'.format_map({'a': 1})", "'a-b'.split('-') | last", "' x '.strip().upper()"),
    *("messages.append(1)", "messages[0].update(a=1)", "messages[0].pop('role')", "messages[0].no"),
    *(
        "messages[0].no.no",
        "messages[0]._x",
        "messages[0].keys() | list",
        "n.__init__",
        "n.a",
        "n.b",
    ),
    *("n.f(1)", "n._Namespace__attrs", "loop.first", "loop.__class__", "loop._iterator", "m()"),
    *("m(1)", "m(1, 2)", "m.__call__", "messages[0]['role'].join(['a', 'b'])", "loop.cycle(1, 2)"),
    *("'a'.encode", "'x'.startswith('x', 0)", "'x'.nothing()", "('a' | upper).title()"),
]


@pytest.mark.parametrize("expression", SANDBOXED)
def test_the_sandbox_is_that_of_transformers(expression: str) -> None:
    begin = "{% set n = namespace(a='{0.__class__}', f='{0.__class__}'.format) %}"
    begin += "{% macro m(x=3) %}{{ x }}{% endmacro %}{% for one in messages %}"
    tokenizer = make_tokenizer(f"{begin}{{{{ {expression} }}}}{{% endfor %}}")
    try:
        expected = tokenizer.apply_chat_template(HI, tokenize=False)
    except Exception as error:
        with pytest.raises(InputError) as caught:
            render(tokenizer, [Rendering(HI)], {})
        assert str(error)[:60] in str(caught.value)
    else:
        (found,) = render(tokenizer, [Rendering(HI)], {})
        # The text of a function has its place in memory.
        assert re.sub("0x[0-9a-f]+", "", found) == re.sub("0x[0-9a-f]+", "", expected)


COSTLY = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "a multiplied string": "{{ 'x' * 10 ** 10 }}",
    "a doubled string": "{% set ns = namespace(s='x') %}{% for a in range(60) %}"
    "{% set ns.s = ns.s ~ ns.s %}"
    "{% endfor %}",
    "a power": "{{ 9 ** (10 ** 9) }}",
    "text whose JSON is longer": "{{ 'é' * 11000000 }}",
    "much text": "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
}
# To find out what a template reads evaluates its constants.
LIMITED = [(template, JOB) for template in COSTLY.values()] + [(COSTLY["a power"], NAMES)]


@pytest.mark.parametrize(("template", "job"), LIMITED, ids=[*COSTLY, "a constant"])
def test_a_template_beyond_its_limits_is_ended(
    quick: rendering._Process, template: str, job: Any
) -> None:
    began = time.monotonic()
    message = r"the chat template took more than (1 s|128 MiB) for one conversation"
    with pytest.raises(CostlyTemplate, match=message):
        quick.ask(make_tokenizer(template), job, problem="", conversation=conversation())
    assert time.monotonic() - began < 20
    # Another one starts.
    assert quick.ask(make_tokenizer(PLAIN), JOB, problem="", conversation=conversation()) == "Hi"


def test_names_read_are_those_that_a_template_does_not_set() -> None:
    assert names_read(make_tokenizer("{{ budget }}{% set x = 1 %}{{ x }}")) == {"budget"}


def test_a_costly_line_ends_the_reading_of_a_file(tmp_path: Path) -> None:
    """Each of a million lines would take as long."""
    tokenizer: Any = make_tokenizer(
        f"{CHATML}{{% if messages | length > 2 %}}{COSTLY['a multiplied string']}{{% endif %}}"
    )
    assert stop_token_ids(tokenizer)
    path = write(tmp_path / "a.jsonl", *({"messages": chat(*"abcd")} for _ in range(1000)))
    began = time.monotonic()
    with pytest.raises(CostlyTemplate):
        load_rows(path, tokenizer, max_length=100)
    assert time.monotonic() - began < 10


def test_the_process_is_started_again_and_ends_with_its_asker(quick: rendering._Process) -> None:
    tokenizer = make_tokenizer(PLAIN)
    hi = conversation()
    quick.ask(tokenizer, JOB, problem="", conversation=hi)
    running = quick._running
    assert running is not None
    running.kill()
    with pytest.raises(CostlyTemplate):
        quick.ask(tokenizer, JOB, problem="", conversation=hi)
    assert quick.ask(tokenizer, JOB, problem="", conversation=hi) == "Hi"
    running = quick._running
    assert running is not None and running.stdin is not None
    running.stdin.close()
    assert running.wait(5) == 0
