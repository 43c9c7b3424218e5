"""What counts as the same chat template, and which names it can be told."""

from typing import Any

import pytest
from chats import CHATML, make_tokenizer

from domino_jax.base.errors import InputError
from domino_jax.data.template import (
    NO_KWARGS,
    ChatTemplate,
    chat_template,
    check_kwargs,
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


def test_text_is_json_that_an_option_takes_back() -> None:
    assert settings_text({"b": "ü", "a": True}) == '{"a": true, "b": "ü"}'
    assert settings_text(NO_KWARGS) == "{}"
