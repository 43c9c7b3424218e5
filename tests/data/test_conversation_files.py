"""Files of conversations: usable lines become rows, the others are told by number."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from chats import GOOD, chat, encoded, make_tokenizer, marked, write

from domino_jax.base.errors import InputError
from domino_jax.base.files import LINE_BYTES
from domino_jax.data.conversations import load_rows
from domino_jax.data.forms import BadLine, Conversation, read_conversations
from domino_jax.data.hidden_states import rows_fingerprint
from domino_jax.data.prompt import unused_keys


def unused(conversations: list[Conversation]) -> list[str]:
    return [name for each in conversations for name in unused_keys(each, "")]


def said(*messages: object, **more: object) -> dict[str, object]:
    return {"messages": messages, **more}


TWICE = b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}'
LONG_NUMBER = b'{"messages": [{"role": "user", "content": "a"}], "n": ' + b"9" * 5000 + b"}"
HALF_A_PAIR = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
BAD_LINES = [
    (b"{", "not valid JSON"),
    (b"[" * 100_000, "more than 64 levels"),
    (TWICE, "the key 'content' is given twice"),
    (LONG_NUMBER, "a number of 5000 characters"),
    (said(*chat("a", "b"), finished="false"), "finished is 'false', expected true or false"),
    (said(*chat("a", "b"), finished=0), "finished is 0, expected true or false"),
    (b'{"messages": "\xff"}', "not UTF-8"),
    ([1], "a JSON list; expected an object with messages"),
    ({"conversations": []}, "no messages"),
    (said(), "no messages"),
    (said("Hi"), "message 1 is not an object"),
    (said({"role": "human"}), "message 1 has unknown role 'human'; known: system, developer"),
    (said({"role": ["user"], "content": "Hi"}), "message 1 has unknown role"),
    (said(*chat("Hi", " \n")), "message 2 (assistant) has no content"),
    (said({"role": "user"}), "message 1 (user) has no content"),
    (said({"role": "user", "content": ["Hi"]}), "message 1 (user) has a part 'Hi', expected parts"),
    (said({"role": "user", "content": 1}), "message 1 (user) has content 1, expected text"),
    (
        said(*chat("Hi"), {"role": "assistant", "content": "a", "weight": 0.5}),
        "has weight 0.5, exp",
    ),
    (said(*chat("Hi"), {"role": "assistant", "tool_calls": [{}]}), "has tool_calls [{}], expected"),
    (
        said(*chat("Hi"), {"role": "assistant", "reasoning": 1}),
        "has a reasoning of 1, expected tex",
    ),
    (
        said(*chat("Hi"), {"role": "assistant", "reasoning": "a", "thinking": "b"}),
        "message 2 (assistant) has two reasonings that differ",
    ),
    (said(*chat("Hi", "Ho"), tools="f"), "tools is 'f', expected a list of objects"),
    (said(*chat("Hi", "Ho"), chat_template_kwargs=[1]), "chat_template_kwargs: expected a mapping"),
    ({"input_ids": [1, 2]}, "loss_mask is None, expected a list of integers from 0"),
    ({"input_ids": [1, 2], "loss_mask": [0]}, "input_ids has 2 entries, loss_mask 1"),
    ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "loss_mask holds a number other than 0 and 1"),
    ({"input_ids": [1, -2], "loss_mask": [0, 1]}, "input_ids is [1, -2], expected a list of int"),
    ({"input_ids": [], "loss_mask": []}, "input_ids is [], expected a list of integers"),
    ({"prompt_ids": [1]}, "output_ids is None, expected a list of integers"),
    ({"prompt_ids": [True], "output_ids": [1]}, "prompt_ids is [True], expected a list of int"),
    (said({"role": "assistant", "content": "Hi"}), "message 1 answers, but no message of a user"),
    (HALF_A_PAIR, "a key or a value is not valid Unicode"),
]


def test_read_conversations_tells_bad_lines_by_number(tmp_path: Path) -> None:
    bad_lines = [line for line, _ in BAD_LINES]
    last = {"messages": chat("Bye")}
    path = write(tmp_path / "a.jsonl", GOOD, *bad_lines, b"", b"  ", last)
    found = read_conversations(path)
    usable = [(each.line, each.messages) for each in found.conversations]
    assert usable == [(1, GOOD["messages"]), (len(BAD_LINES) + 4, chat("Bye"))]
    words = unused(found.conversations)
    assert words == ["key 'family'"]
    assert [bad.line for bad in found.bad_lines] == list(range(2, len(BAD_LINES) + 2))
    for bad, (_, reason) in zip(found.bad_lines, BAD_LINES, strict=True):
        assert reason in bad.reason


def test_read_conversations_refuses_a_line_beyond_its_bound(tmp_path: Path) -> None:
    long = {"messages": chat("x" * LINE_BYTES, "y")}
    path = write(tmp_path / "a.jsonl", long, {**GOOD, "score": float("nan")})
    found = read_conversations(path)
    assert [(each.line, each.messages) for each in found.conversations] == [(2, GOOD["messages"])]
    assert list(found.bad_lines) == [BadLine(1, f"more than {LINE_BYTES} bytes")]
    words = unused(found.conversations)
    assert words == ["key 'family'", "key 'score'"]


def test_read_conversations_skips_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    found = read_conversations(path)
    assert not found.bad_lines and found.conversations[0].messages == GOOD["messages"]


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    for read in (read_conversations, lambda path: load_rows(path, tokenizer, max_length=100)):
        with pytest.raises(InputError, match=r"missing\.jsonl: No such file"):
            read(tmp_path / "missing.jsonl")
        with pytest.raises(InputError, match="Is a directory"):
            read(tmp_path)
        with pytest.raises(InputError, match="empty"):
            read(write(tmp_path / "empty.jsonl", b"", b""))
        with pytest.raises(InputError, match="no usable line; line 2: not valid JSON"):
            read(write(tmp_path / "bad.jsonl", b"", b"{"))
    prompts = write(tmp_path / "prompts.jsonl", {"messages": chat("Hi")})
    with pytest.raises(InputError, match="no usable line; line 1: no assistant message"):
        load_rows(prompts, tokenizer, max_length=100)


def test_a_packed_file_is_the_same_data(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    plain = write(tmp_path / "a.jsonl", GOOD, b"{", {"messages": chat("Bye", "See you.")})
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    messages = [each.messages for each in read_conversations(plain).conversations]
    assert [each.messages for each in read_conversations(packed).conversations] == messages
    of_plain = load_rows(plain, tokenizer, max_length=100)
    of_packed = load_rows(packed, tokenizer, max_length=100)
    # What a run remembers of its data is what it reads: how that is packed is nobody's business.
    assert rows_fingerprint(of_packed.rows) == rows_fingerprint(of_plain.rows)
    assert of_packed.bad_lines == of_plain.bad_lines
    assert [row.line for row in of_packed.rows] == [1, 3]


def test_a_damaged_packed_file_gives_no_rows(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    plain = write(tmp_path / "a.jsonl", *[GOOD] * 50)
    packed = tmp_path / "a.jsonl.gz"
    cut = gzip.compress(plain.read_bytes())[:-20]
    for read in (read_conversations, lambda path: load_rows(path, tokenizer, max_length=100)):
        for content in (cut, plain.read_bytes()):
            packed.write_bytes(content)
            with pytest.raises(InputError, match=r"a\.jsonl\.gz: damaged, or not gzip: "):
                read(packed)


def test_load_rows_joins_rows_and_bad_lines(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    long = {"messages": chat("Hi " * 100, "Hello.")}
    path = write(tmp_path / "a.jsonl", {"messages": chat("Hi")}, GOOD, b"{}", long)
    found = load_rows(path, tokenizer, max_length=60)
    rows, bad_lines = found.rows, list(found.bad_lines)
    assert [row.line for row in rows] == [2] and (found.reading.lines, found.from_text) == (4, 3)
    expected = encoded(chat("Hi", "Hello."), tokenizer, max_length=60)
    np.testing.assert_array_equal(rows[0].input_ids, expected.input_ids)
    np.testing.assert_array_equal(rows[0].loss_mask, expected.loss_mask)
    assert found.unfinished == 0 and bad_lines[0] == BadLine(1, "no assistant message")
    late = BadLine(4, "no token of an answer among the first 60")
    assert bad_lines[1].line == 3 and bad_lines[2] == late


@pytest.mark.pitfall(
    "most answers cut at the token limit, unnoticed",
    seen="data/conversations.py: an answer that was cut encoded like a finished one",
)
def test_load_rows_gives_an_unfinished_answer_no_end(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    messages = chat("Hi", "Hello.", "3 cats?", "They have")
    lines = [{"messages": messages, "finished": finished} for finished in (True, False)]
    path = write(tmp_path / "a.jsonl", *lines)
    found = load_rows(path, tokenizer, max_length=100)
    whole, cut = found.rows
    assert found.unfinished == 1
    end = int(np.flatnonzero(whole.loss_mask)[-1])
    assert marked(cut, tokenizer) == "Hello.<|im_end|>They have"
    assert len(cut.input_ids) == len(cut.loss_mask) == end
    np.testing.assert_array_equal(cut.input_ids, whole.input_ids[:end])
