"""Reasoning of answers: kept in the row, left out of the loss where asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import BRACKETS, CHATML, chat, encoded, encoded_all, make_tokenizer, marked, write

from domino_jax.base.errors import InputError
from domino_jax.data.conversations import Encoder, load_rows
from domino_jax.data.forms import BadLine, Conversation

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


def marked_runs(messages: list[dict[str, Any]], template: str, *, masked: bool) -> list[str]:
    """Texts of the marked runs, after a check that masking leaves the tokens alone."""
    tokenizer = make_tokenizer(template)
    plain = encoded_all(messages, tokenizer).rows
    rows = encoded_all(messages, tokenizer, mask_reasoning_content=masked).rows
    known = [row.input_ids.tolist() for row in plain]
    assert all(row.input_ids.tolist() in known for row in rows)
    texts = []
    for row in rows:
        runs = np.split(np.arange(len(row.loss_mask)), np.flatnonzero(np.diff(row.loss_mask)) + 1)
        texts += [tokenizer.decode(row.input_ids[run]) for run in runs if row.loss_mask[run[0]]]
    return texts


QUESTION = chat("Hi")
# Per case: the answers, their template, what is marked, and what is without the reasoning.
CASES: dict[str, tuple[list[dict[str, Any]], str, list[str], list[str]]] = {
    "inline": (
        [answer("<think>\nThey have\n</think>\n\ntwelve")],
        CHATML,
        [f"<think>\nThey have\n</think>\n\ntwelve{END}"],
        [f"\n\ntwelve{END}"],
    ),
    "inline, several spans": (
        [answer("one <think>two</think> three <think>four</think>")],
        CHATML,
        [f"one <think>two</think> three <think>four</think>{END}"],
        ["one ", " three ", END],
    ),
    "inline, every turn": (
        [answer("<think>a</think> one"), answer("<think>b</think> two")],
        CHATML,
        [f"<think>a</think> one{END}", f"<think>b</think> two{END}"],
        [f" one{END}", f" two{END}"],
    ),
    "never closed": (
        [answer("one <think>They have")],
        CHATML,
        [f"one <think>They have{END}"],
        ["one "],
    ),
    "no reasoning": ([answer("twelve")], CHATML, [f"twelve{END}"], [f"twelve{END}"]),
    "a key": (
        [answer("twelve", "They have")],
        THOUGHTS,
        [f"<think>\nThey have\n</think>\n\ntwelve{END}"],
        [f"\n\ntwelve{END}"],
    ),
    "a key, several turns": (
        [answer("Hello.", "They say Hi"), answer("twelve", "3 times 4")],
        THOUGHTS,
        [
            f"<think>\nThey say Hi\n</think>\n\nHello.{END}",
            f"<think>\n3 times 4\n</think>\n\ntwelve{END}",
        ],
        [f"\n\nHello.{END}", f"\n\ntwelve{END}"],
    ),
    "inline, stripped by the template": (
        [answer("<think>a</think>Hello."), answer("<think>\nb\n</think>\n\ntwelve")],
        THOUGHTS,
        [f"<think>a</think>Hello.{END}", f"<think>\nb\n</think>\n\ntwelve{END}"],
        [f"Hello.{END}", f"\n\ntwelve{END}"],
    ),
    "empty thoughts of the template": (
        [answer("Hello."), answer("twelve")],
        THOUGHTS,
        [f"Hello.{END}", f"twelve{END}"],
        [f"Hello.{END}", f"twelve{END}"],
    ),
    "a key that the template ignores": ([answer("one", "two")], CHATML, [], []),
    "a key under another name": (
        [{"role": "assistant", "content": "one", "thinking": "two"}],
        THOUGHTS,
        [f"<think>\ntwo\n</think>\n\none{END}"],
        [f"\n\none{END}"],
    ),
    "opened by the generation prompt": (
        [answer("a\n</think>\n\none"), answer("b\n</think>\n\ntwo")],
        OPENED,
        [f"a\n</think>\n\none{END}", f"b\n</think>\n\ntwo{END}"],
        [f"\n\none{END}", f"\n\ntwo{END}"],
    ),
    "only reasoning": ([answer("<think>a</think>\n")], CHATML, [f"<think>a</think>\n{END}"], []),
    "only reasoning, never closed": ([answer("<think>a")], CHATML, [f"<think>a{END}"], []),
    "only reasoning in one turn": (
        [answer("<think>a</think>"), answer("two")],
        CHATML,
        [f"<think>a</think>{END}", f"two{END}"],
        [f"two{END}"],
    ),
}


@pytest.mark.parametrize(
    ("answers", "template", "whole", "without"), CASES.values(), ids=CASES.keys()
)
def test_reasoning_is_masked_where_asked(
    answers: list[dict[str, Any]], template: str, whole: list[str], without: list[str]
) -> None:
    messages = [turn for answer in answers for turn in (*QUESTION, answer)]
    assert marked_runs(messages, template, masked=False) == whole
    assert marked_runs(messages, template, masked=True) == without


@pytest.mark.parametrize(("answers", "template"), [case[:2] for case in CASES.values()], ids=CASES)
def test_reasoning_of_recorded_ids_is_masked_alike(
    answers: list[dict[str, Any]], template: str
) -> None:
    messages = [turn for answer in answers for turn in (*QUESTION, answer)]
    tokenizer = make_tokenizer(template)
    masked = encoded_all(messages, tokenizer, mask_reasoning_content=True).rows
    expected = {row.input_ids.tobytes(): row.loss_mask.tolist() for row in masked}
    encoder = Encoder(tokenizer, max_length=1000, mask_reasoning_content=True)
    for row in encoded_all(messages, tokenizer).rows:
        recorded = Conversation(line=1, input_ids=row.input_ids, loss_mask=row.loss_mask)
        found = encoder.rows(recorded).rows
        marks = expected.get(row.input_ids.tobytes())
        assert [row.loss_mask.tolist() for row in found] == ([marks] if marks else [])


def test_reasoning_of_a_template_without_generation_prompt() -> None:
    template = BRACKETS.replace(
        "{{ message['content'] | trim }}",
        "<think>{{ message.reasoning_content }}</think>{{ message['content'] }}",
    )
    tokenizer = make_tokenizer(template, eos="<|endoftext|>")
    row = encoded([*QUESTION, answer("one", "two")], tokenizer, mask_reasoning_content=True)
    assert marked(row, tokenizer).strip() == "one<|endoftext|>"


def test_load_rows_leaves_out_what_is_all_reasoning(tmp_path: Path) -> None:
    lines = [
        {"messages": [*QUESTION, answer("<think>They have</think>")]},
        {"messages": [*QUESTION, answer("<think>They have")], "finished": False},
        {"messages": [*QUESTION, answer("one <think>They have")], "finished": False},
        {"messages": [*QUESTION, {**answer("one"), "reasoning_content": ["two"]}]},
        {"messages": [*QUESTION, answer("one", f"two{END}")]},
    ]
    path = write(tmp_path / "a.jsonl", *lines)
    tokenizer = make_tokenizer(THOUGHTS.replace("(loop.last or thought)", "thought"))
    found = load_rows(path, tokenizer, max_length=100, mask_reasoning_content=True)
    assert [marked(row, tokenizer) for row in found.rows] == ["one "]
    reason = "no token of an answer outside its reasoning among the first 100"
    assert list(found.bad_lines) == [
        BadLine(1, reason),
        BadLine(2, reason),
        BadLine(4, "message 2 (assistant) has a reasoning of ['two'], expected text"),
        BadLine(5, f"message 2: the answer holds the end-of-turn token '{END}' as text"),
    ]
    with pytest.raises(
        InputError, match="no usable line; line 1: no token of an answer outside its reasoning"
    ):
        load_rows(write(path, lines[0]), tokenizer, max_length=100, mask_reasoning_content=True)
