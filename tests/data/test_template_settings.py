"""What a chat template is told reaches rows and prompts; answers told otherwise are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import CHATML, GOOD, THINKING, chat, encoded, encoded_all, make_tokenizer, marked, write

from domino_jax.base.errors import InputError
from domino_jax.data.conversations import load_rows
from domino_jax.data.prompt import encode_prompt, stop_token_ids

# As Qwen3: told not to think, the answer follows empty thoughts.
SWITCHED = THINKING.replace(
    "{% if loop.last and", "{% if enable_thinking is defined and enable_thinking is false and"
).replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}",
)


NO_THINKING = {"enable_thinking": False}


def test_what_the_template_is_told_reaches_rows_and_prompts(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(SWITCHED)
    messages = chat("Hi", "Hello.")
    plain = encoded(messages, tokenizer)
    row = encoded(messages, tokenizer, chat_template_kwargs=NO_THINKING)
    empty = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert empty in tokenizer.decode(row.input_ids)
    assert empty not in tokenizer.decode(plain.input_ids)
    assert marked(row, tokenizer) == "Hello.<|im_end|>"
    prompt = encode_prompt(messages[:1], tokenizer, NO_THINKING)
    np.testing.assert_array_equal(prompt, row.input_ids[: len(prompt)])
    assert row.loss_mask[len(prompt)] and not row.loss_mask[: len(prompt)].any()
    path = write(tmp_path / "a.jsonl", {"messages": messages})
    (read,) = load_rows(path, tokenizer, max_length=100, chat_template_kwargs=NO_THINKING).rows
    np.testing.assert_array_equal(read.input_ids, row.input_ids)
    for refuse in (
        lambda kwargs: stop_token_ids(tokenizer, kwargs),
        lambda kwargs: load_rows(path, tokenizer, max_length=9, chat_template_kwargs=kwargs),
    ):
        with pytest.raises(InputError, match="did you mean 'enable_thinking'"):
            refuse({"enable_thnking": False})


def test_an_earlier_answer_whose_prompt_is_gone_has_a_row_of_its_own() -> None:
    # As Qwen3: the empty thoughts that the first answer followed are not shown once more follows.
    tokenizer = make_tokenizer(SWITCHED.replace("{% if enable", "{% if loop.last and enable", 1))
    for last in ([], ["Thanks"]):
        messages = chat("Hi", "Hello.", "3 cats?", "twelve", *last)
        assert marked(encoded(messages, tokenizer), tokenizer) == "Hello.<|im_end|>twelve<|im_end|>"
        rows = encoded_all(messages, tokenizer, chat_template_kwargs=NO_THINKING).rows
        assert [marked(row, tokenizer) for row in rows] == ["Hello.<|im_end|>", "twelve<|im_end|>"]
        for row, count in zip(rows, (1, 3), strict=True):
            prompt = encode_prompt(messages[:count], tokenizer, NO_THINKING)
            np.testing.assert_array_equal(row.input_ids[: len(prompt)], prompt)
            assert not row.loss_mask[: len(prompt)].any() and row.loss_mask[len(prompt) :].all()


@pytest.mark.parametrize(
    ("generator", "kwargs", "answered"),
    [
        ({"chat_template_kwargs": {}}, {}, None),
        ({"chat_template_kwargs": NO_THINKING}, NO_THINKING, None),
        ("another program", NO_THINKING, None),
        ({"made_with": "another program"}, NO_THINKING, None),
        ({"chat_template_kwargs": NO_THINKING}, {}, '{"enable_thinking": false}'),
        ({"chat_template_kwargs": {"enable_thinking": 0}}, NO_THINKING, '{"enable_thinking": 0}'),
    ],
)
def test_answers_of_another_setting_are_refused(
    generator: Any, kwargs: Any, answered: str | None, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(SWITCHED)
    path = write(tmp_path / "a.jsonl", GOOD, {**GOOD, "generator": generator})
    if answered is None:
        found = load_rows(path, tokenizer, max_length=100, chat_template_kwargs=kwargs)
        assert len(found.rows) == 2
        return
    with pytest.raises(InputError) as caught:
        load_rows(path, tokenizer, max_length=100, chat_template_kwargs=kwargs)
    assert str(caught.value) == (
        f"{path}:2: answered with chat_template_kwargs {answered}, "
        f"the run has {json.dumps(kwargs)}; "
        "give the run data.chat_template_kwargs of its answers, or regenerate the answers"
    )


def test_answers_of_several_days_train_together(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("{{ strftime_now('%d') }}" + CHATML)
    days = [{"strftime_now": f"2026-12-0{number}"} for number in (1, 2)]
    lines = [{**GOOD, "generator": {"chat_template_kwargs": day}} for day in days]
    path = write(tmp_path / "a.jsonl", *lines)
    # What is rendered has the date of the run.
    for row in load_rows(path, tokenizer, max_length=100, chat_template_kwargs=days[1]).rows:
        assert tokenizer.decode(row.input_ids).startswith("02<|im_start|>")


def test_a_line_may_override_the_settings(tmp_path: Path) -> None:
    """So that one draft is trained on reasoning and on plain answers."""
    tokenizer = make_tokenizer(SWITCHED)
    plain = {"messages": chat("Hi", "Hello."), "chat_template_kwargs": NO_THINKING}
    reasoning = {"messages": chat("Hi", "<think>\nHm.\n</think>\n\nHello.")}
    misspelt = {**GOOD, "chat_template_kwargs": {"enable_thnking": False}}
    path = write(tmp_path / "a.jsonl", plain, reasoning, misspelt)
    found = load_rows(path, tokenizer, max_length=100)
    empty = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    texts = [tokenizer.decode(row.input_ids) for row in found.rows]
    assert [empty in text for text in texts] == [True, False]
    assert [marked(row, tokenizer) for row in found.rows] == [
        "Hello.<|im_end|>",
        "<think>\nHm.\n</think>\n\nHello.<|im_end|>",
    ]
    (bad,) = found.bad_lines
    assert bad.line == 3 and "did you mean 'enable_thinking'" in bad.reason


def test_an_answer_that_records_nonsense_is_told_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {**GOOD, "generator": {"chat_template_kwargs": [1]}})
    message = r"a.jsonl:1: generator: chat_template_kwargs: expected a map"
    with pytest.raises(InputError, match=message):
        load_rows(path, make_tokenizer(), max_length=100)
