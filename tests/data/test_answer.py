"""Text of answers behind their prompts: spellings of tool calls, reasoning and ends of turns."""

import json
from typing import Any

import pytest
from chat_templates import PUBLISHED
from chats import CHATML, chat, encoded_all, make_tokenizer, marked, write

from domino_jax.base.errors import InputError
from domino_jax.data import conversations
from domino_jax.data.conversations import Encoder, load_rows
from domino_jax.data.forms import Conversation
from domino_jax.data.prompt import stop_token_ids

NOT_SHOWN = "message 2: the chat template does not show the tool calls of the answer as given"
TWICE = "message 2: the answer has reasoning under a key and reasoning tags as well"


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"content": "", "tool_calls": [{"type": "function", "function": function}]}


def thought(reasoning: str, content: str = "4.") -> dict[str, Any]:
    return {"content": content, "reasoning_content": reasoning}


# Template, answer, further keys of the line, and the marked text or why nothing is.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "compact arguments": (
        "Qwen2.5",
        call('{"city":"Oslo"}'),
        {},
        '<tool_call>\n{"name": "f", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
    ),
    "escaped arguments": (
        "Qwen2.5",
        call('{"c":"\\u00e9"}'),
        {},
        '<tool_call>\n{"name": "f", "arguments": {"c": "é"}}\n</tool_call><|im_end|>',
    ),
    "cut arguments": ("Qwen2.5", call('{"city":'), {}, NOT_SHOWN),
    "deep arguments": ("Qwen2.5", call("[" * 100_000), {}, NOT_SHOWN),
    "a legacy call": (
        "Qwen3",
        {"content": "I look.", "function_call": {"name": "f"}},
        {},
        "message 2: function_call is not read; give tool_calls",
    ),
    "reasoning after a prompt that closes it": (
        "Qwen3",
        thought("Add."),
        {"chat_template_kwargs": {"enable_thinking": False}},
        "message 2: the generation prompt closes reasoning, the answer opens it",
    ),
    "reasoning with its own tags": ("Qwen3", thought("<think>\nAdd.\n</think>"), {}, TWICE),
    "reasoning twice": ("Qwen3", thought("Add.", "<think>Add.</think>4"), {}, TWICE),
    "reasoning cut at a word of its tag": (
        "Qwen3",
        thought("think", ""),
        {"finished": False},
        "<think>\nthink",
    ),
    "white space before the tag of the prompt": (
        "DeepSeek-R1-Distill",
        {"content": "\n<think>\nAdd.\n</think>\n\n4"},
        {},
        "\nAdd.\n</think>\n\n4<|end_of_sentence|>",
    ),
    "empty reasoning of the content": (
        "Qwen3",
        {**call({}), "content": "<think>\n\n</think>\n\n hm"},
        {},
        '<think>\n\n</think>\n\n hm\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
        "<|im_end|>",
    ),
}


@pytest.mark.parametrize(("name", "answer", "line", "expected"), CASES.values(), ids=CASES)
def test_an_answer_is_what_the_target_can_have_written(
    name: str, answer: dict[str, Any], line: dict[str, Any], expected: str
) -> None:
    tokenizer = PUBLISHED[name].tokenizer()
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", **answer}]
    found = Encoder(tokenizer, max_length=1000).rows(
        Conversation(line=1, messages=messages, **line)
    )
    if expected.startswith("message 2: "):
        assert not found.rows and found.untrained == [expected]
    else:
        assert [marked(row, tokenizer) for row in found.rows] == [expected]


def test_the_end_of_a_turn_is_a_special_token_behind_the_answer() -> None:
    text = CHATML.replace("<|im_end|>\n{% endfor", "\n\n<|im_end|>{% endfor")
    tokenizer = make_tokenizer(text, eos="<|endoftext|>")
    tokenizer.add_tokens(["\n\n"])  # added, but not special
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert stop_token_ids(tokenizer) == (eos, end)
    # An inner end before the one that the target's files know.
    tokenizer = make_tokenizer(CHATML.replace("<|im_end|>", "<|im_start|><|im_end|>"))
    assert stop_token_ids(tokenizer) == (end,)
    # None printed: the role that follows ends the answer, where the files say so.
    bare = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
    bare += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer = make_tokenizer(bare, eos="<|endoftext|>")
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert stop_token_ids(tokenizer, end_ids=(start,)) == (eos, start)
    row = encoded_all(chat("Hi", "Ho", "3?", "4"), tokenizer, end_ids=(start,)).rows
    assert [marked(one, tokenizer) for one in row] == ["Ho<|im_start|>4<|im_start|>"]


def test_a_line_has_the_surroundings_of_its_own_settings() -> None:
    text = CHATML.replace(
        "{{ message['content'] }}",
        (
            "{% if ch and message['role'] == 'assistant' %}[final]{% endif %}"
            "{{ message['content'] }}"
        ),
    )
    tokenizer = make_tokenizer(text)
    line = Conversation(line=1, messages=chat("Hi", "4"), chat_template_kwargs={"ch": True})
    found = Encoder(tokenizer, max_length=1000).rows(line)
    assert not found.rows and "puts '[final]' between the generation prompt" in found.untrained[0]


def test_an_end_without_text_and_an_empty_answer_are_no_fault() -> None:
    tokenizer = PUBLISHED["Qwen3"].tokenizer()
    encoder = Encoder(tokenizer, max_length=1000, end_ids=(len(tokenizer) + 7,))
    messages = [{"role": "user", "content": "2?"}, {"role": "assistant", **thought("Add.")}]
    assert encoder.rows(Conversation(line=1, messages=messages)).rows
    tokenizer = PUBLISHED["DeepSeek-R1-Distill"].tokenizer()
    cut = Conversation(line=1, messages=chat("2?", "<think>\n"), finished=False)
    masked = Encoder(tokenizer, max_length=1000, mask_reasoning_content=True)
    assert masked.rows(cut).rows == []


def test_a_turn_behind_a_long_one_is_trained() -> None:
    tokenizer = PUBLISHED["Qwen3"].tokenizer()
    long = f"<think>\n{'Add. ' * 60}\n</think>\n\n4."
    messages = chat("2 + 2?", long, "And 3?", "<think>\nS.\n</think>\n\n7.")
    rows = encoded_all(messages, tokenizer, max_length=100).rows
    assert len(rows) == 2 and marked(rows[1], tokenizer).endswith("7.<|im_end|>")


def test_a_message_that_only_another_one_shows_is_missed() -> None:
    tokenizer = PUBLISHED["Phi-4"].tokenizer()
    messages = [
        *chat("Is it sunny?", "I look."),
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is."},
    ]
    found = encoded_all(messages, tokenizer)
    assert found.untrained == ["message 4: the chat template does not show message 3 (tool)"]


def test_arguments_stay_text_where_the_template_joins_text() -> None:
    calls = "{% for c in message.tool_calls or [] %}{{ c.function.name + c.function.arguments }}"
    content = "{{ message['content'] }}"
    tokenizer = make_tokenizer(CHATML.replace(content, content + calls + "{% endfor %}"))
    messages = [*chat("Hi"), {"role": "assistant", **call('{"city":"Oslo"}')}]
    (row,) = encoded_all(messages, tokenizer).rows
    assert marked(row, tokenizer) == 'f{"city":"Oslo"}<|im_end|>'


def test_settings_on_every_line_are_compared_without_hashing(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hashed(_: Any) -> Any:
        raise AssertionError("hashed")

    monkeypatch.setattr(conversations, "tokenizer_record", hashed)
    line = {"messages": chat("Hi", "Ho"), "generator": {"chat_template_kwargs": {}}}
    path = write(tmp_path / "a.jsonl", *[line] * 3)
    assert len(load_rows(path, make_tokenizer(), max_length=100).rows) == 3


LINES = [
    ({"finish_reason": "abort"}, "finish_reason is 'abort', expected 'stop', 'tool_calls' or 'len"),
    ({"finish_reason": "length", "finished": True}, "finished is True, finish_reason is 'length';"),
    ({"note": "\ud800"}, "a key or a value is not valid Unicode"),
]


@pytest.mark.parametrize(("keys", "reason"), LINES)
def test_a_line_that_contradicts_itself_is_refused(
    keys: dict[str, Any], reason: str, tmp_path: Any
) -> None:
    good = {"messages": chat("Hi", "Ho")}
    raw = json.dumps({**good, **keys}).encode()
    path = write(tmp_path / "a.jsonl", good, raw)
    (bad,) = load_rows(path, make_tokenizer(), max_length=100).bad_lines
    assert bad.line == 2 and bad.reason.startswith(reason)


def test_weight_0_beside_ids_is_read(tmp_path: Any) -> None:
    messages = chat("Hi", "Ho")
    messages[-1]["weight"] = 0
    ids = {"prompt_ids": [1, 2], "output_ids": [3]}
    path = write(tmp_path / "a.jsonl", {"messages": messages, **ids})
    with pytest.raises(InputError, match="every answer has weight 0"):
        load_rows(path, make_tokenizer(), max_length=100)
