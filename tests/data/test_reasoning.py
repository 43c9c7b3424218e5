"""Reasoning of answers: kept in the row, left out of the loss where asked for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import BRACKETS, CHATML, chat, make_tokenizer

from domino_jax.base.errors import InputError
from domino_jax.data.conversations import BadLine, encode_conversation, load_rows

# In the manner of Qwen3: thoughts come from `reasoning_content` or out of the content, and only
# answers after the last question show theirs, the very last one even when it has none.
THOUGHTS = (
    "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] != 'assistant' %}{{ m['content'] }}{% else %}"
    "{% set thought = m.get('reasoning_content') or '' %}"
    "{% set said = m['content'] %}{% if not thought and '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.asked and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n"
    "{% endif %}{{ said }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# In the manner of DeepSeek-R1: the generation prompt opens the thoughts.
OPENED = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif").replace(
    "{{ message['content'] }}",
    "{% if message['role'] == 'assistant' %}<think>\n{% endif %}{{ message['content'] }}",
)
END = "<|im_end|>"


def answer(content: str, reasoning: str | None = None) -> dict[str, Any]:
    extra = {} if reasoning is None else {"reasoning_content": reasoning}
    return {"role": "assistant", "content": content, **extra}


def marked(messages: list[dict[str, Any]], template: str, *, masked: bool) -> list[str]:
    """Texts of the marked runs, after a check that masking leaves the tokens alone."""
    tokenizer = make_tokenizer(template)
    plain = encode_conversation(messages, tokenizer, max_length=1000)
    row = encode_conversation(messages, tokenizer, max_length=1000, mask_reasoning_content=masked)
    if row is None:
        return []
    assert plain is not None
    np.testing.assert_array_equal(row.input_ids, plain.input_ids)
    runs = np.split(np.arange(len(row.loss_mask)), np.flatnonzero(np.diff(row.loss_mask)) + 1)
    return [tokenizer.decode(row.input_ids[run]) for run in runs if row.loss_mask[run[0]]]


QUESTION, AGAIN = chat("Hi"), chat("3 cats?")
# Per case: the conversation, its template, what is marked, and what is without the reasoning.
CASES: dict[str, tuple[list[dict[str, Any]], str, list[str], list[str]]] = {
    "inline": (
        [*QUESTION, answer("<think>\nThey have\n</think>\n\ntwelve")],
        CHATML,
        [f"<think>\nThey have\n</think>\n\ntwelve{END}"],
        [f"\n\ntwelve{END}"],
    ),
    "inline, several spans": (
        [*QUESTION, answer("one <think>two</think> three <think>four</think>")],
        CHATML,
        [f"one <think>two</think> three <think>four</think>{END}"],
        ["one ", " three ", END],
    ),
    "inline, every turn": (
        [*QUESTION, answer("<think>a</think> one"), *AGAIN, answer("<think>b</think> two")],
        CHATML,
        [f"<think>a</think> one{END}", f"<think>b</think> two{END}"],
        [f" one{END}", f" two{END}"],
    ),
    "never closed": (
        [*QUESTION, answer("one <think>They have")],
        CHATML,
        [f"one <think>They have{END}"],
        ["one "],
    ),
    "no reasoning": ([*QUESTION, answer("twelve")], CHATML, [f"twelve{END}"], [f"twelve{END}"]),
    "a key": (
        [*QUESTION, answer("twelve", "They have")],
        THOUGHTS,
        [f"<think>\nThey have\n</think>\n\ntwelve{END}"],
        [f"\n\ntwelve{END}"],
    ),
    "a key, several turns": (
        [*QUESTION, answer("Hello.", "They say Hi"), *AGAIN, answer("twelve", "3 times 4")],
        THOUGHTS,
        [f"Hello.{END}", f"<think>\n3 times 4\n</think>\n\ntwelve{END}"],
        [f"Hello.{END}", f"\n\ntwelve{END}"],
    ),
    "inline, moved by the template": (
        [
            *QUESTION,
            answer("<think>a</think>Hello."),
            *AGAIN,
            answer("<think>\nb\n</think>\n\ntwelve"),
        ],
        THOUGHTS,
        [f"Hello.{END}", f"<think>\nb\n</think>\n\ntwelve{END}"],
        [f"Hello.{END}", f"\n\ntwelve{END}"],
    ),
    "empty thoughts of the template": (
        [*QUESTION, answer("Hello."), *AGAIN, answer("twelve")],
        THOUGHTS,
        [f"Hello.{END}", f"<think>\n\n</think>\n\ntwelve{END}"],
        [f"Hello.{END}", f"\n\ntwelve{END}"],
    ),
    "a key that the template ignores": (
        [*QUESTION, answer("one", "two")],
        CHATML,
        [f"one{END}"],
        [f"one{END}"],
    ),
    "opened by the generation prompt": (
        [*QUESTION, answer("a\n</think>\n\none"), *AGAIN, answer("b\n</think>\n\ntwo")],
        OPENED,
        [f"a\n</think>\n\none{END}", f"b\n</think>\n\ntwo{END}"],
        [f"\n\none{END}", f"\n\ntwo{END}"],
    ),
    "only reasoning": (
        [*QUESTION, answer("<think>a</think>\n")],
        CHATML,
        [f"<think>a</think>\n{END}"],
        [],
    ),
    "only reasoning, never closed": (
        [*QUESTION, answer("<think>a")],
        CHATML,
        [f"<think>a{END}"],
        [],
    ),
    "only reasoning in one turn": (
        [*QUESTION, answer("<think>a</think>"), *AGAIN, answer("two")],
        CHATML,
        [f"<think>a</think>{END}", f"two{END}"],
        [f"two{END}"],
    ),
}


@pytest.mark.parametrize(
    ("messages", "template", "whole", "without"), CASES.values(), ids=CASES.keys()
)
def test_reasoning_is_masked_where_asked(
    messages: list[dict[str, Any]], template: str, whole: list[str], without: list[str]
) -> None:
    assert marked(messages, template, masked=False) == whole
    assert marked(messages, template, masked=True) == without


def test_reasoning_of_a_template_without_generation_prompt() -> None:
    template = BRACKETS.replace(
        "{{ message['content'] | trim }}",
        "<think>{{ message.reasoning_content }}</think>{{ message['content'] }}",
    )
    tokenizer = make_tokenizer(template, eos="<|endoftext|>")
    row = encode_conversation(
        [*QUESTION, answer("one", "two")], tokenizer, max_length=99, mask_reasoning_content=True
    )
    assert row is not None
    assert tokenizer.decode(row.input_ids[row.loss_mask]).strip() == "one<|endoftext|>"


def test_load_rows_leaves_out_what_is_all_reasoning(tmp_path: Path) -> None:
    lines = [
        {"messages": [*QUESTION, answer("<think>They have</think>")]},
        {"messages": [*QUESTION, answer("<think>They have")], "finished": False},
        {"messages": [*QUESTION, answer("one <think>They have")], "finished": False},
        {"messages": [*QUESTION, {**answer("one"), "reasoning_content": ["two"]}]},
        {"messages": [*QUESTION, answer("one", f"two{END}")]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = make_tokenizer(THOUGHTS.replace("(loop.last or thought)", "thought"))
    rows, bad_lines, _ = load_rows(path, tokenizer, max_length=100, mask_reasoning_content=True)
    assert [tokenizer.decode(row.input_ids[row.loss_mask]) for row in rows] == ["one "]
    reason = "no token of an answer outside its reasoning among the first 100"
    assert bad_lines == [
        BadLine(1, reason),
        BadLine(2, reason),
        BadLine(4, "message 2 (assistant) has a reasoning_content that is not text"),
        BadLine(5, f"message 2 holds the end-of-turn token '{END}' as text"),
    ]
    with pytest.raises(
        InputError, match="no usable line; line 1: no token of an answer outside its reasoning"
    ):
        path.write_text(json.dumps(lines[0]))
        load_rows(path, tokenizer, max_length=100, mask_reasoning_content=True)
