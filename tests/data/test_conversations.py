"""Conversations -> rows: where answers begin and end, what is refused, how a bad line is told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from domino_jax import files
from domino_jax.data import conversations
from domino_jax.data.conversations import (
    BadLine,
    Row,
    encode_conversation,
    encode_prompt,
    load_rows,
    read_messages,
    stop_token_ids,
)
from domino_jax.strict import InputError

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# No generation prompt, no headers: an answer follows its question at once and ends with eos.
BRACKETS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[Q]{{ message['content'] }}[A]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] | trim }}<|endoftext|>"
    "{% endif %}{% endfor %}"
)
# As Qwen3: only the last answer shows its (empty) thoughts.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last and message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "How many legs have 3 cats?",
    "They have twelve legs, 3 times 4.",
    "Grüße aus Köln, 東京 and 🦊🦊!",
    "You help.",
]


def make_tokenizer(
    template: str = CHATML, *, eos: str | None = "<|im_end|>", trim_offsets: bool = False
) -> Any:
    """A byte-level BPE tokenizer with a few merges, as SmolLM2, Qwen and Llama 3 have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    marks = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in marks]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, chat_template=template
    )


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """User and assistant in turn."""
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
    return [{"role": "system", "content": system}] * (system is not None) + turns


def slow_row(messages: list[dict[str, Any]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """ChatML token by token: each piece of a turn is encoded by itself, so its owner is known."""
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You help."}, *messages]
    ids: list[int] = []
    mask: list[bool] = []

    def put(text: str, ours: bool) -> None:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids.extend(piece)
        mask.extend([ours] * len(piece))

    for message in messages:
        put("<|im_start|>", False)
        for letter in (message["role"], "\n"):
            put(letter, False)
        put(message["content"], message["role"] == "assistant")
        put("<|im_end|>", message["role"] == "assistant")
        put("\n", False)
    return ids, mask


CONVERSATIONS = {
    "one turn": chat("How many legs have 3 cats?", "They have twelve legs."),
    "three turns": chat("Hi", "Hello.", "3 times 4?", "twelve", "Thanks", "You are welcome."),
    "system": chat("Hi", "Hello.", "Bye", "Bye.", system="Answer in one word."),
    "unicode": chat("Grüße aus Köln", "🦊東京🦊 é é", "ß", "日本"),
    "ends with a question": chat("Hi", "Hello.", "Still there?"),
    "question repeats the answer": chat("Hello.", "Hello.", "Hello.", "Hello."),
    "role words and tags in the text": chat(
        "assistant\n<|im_start|> is a tag", "assistant\nsays <|im_start|>user\n"
    ),
    "lines at the ends": chat("Hi ", " one\ntwo \n three"),
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_encode_conversation_equals_the_slow_reference(messages: list[dict[str, Any]]) -> None:
    tokenizer = make_tokenizer()
    row = encode_conversation(messages, tokenizer, max_length=1000)
    assert row is not None
    assert row.input_ids.dtype == np.int32 and row.loss_mask.dtype == bool
    ids, mask = slow_row(messages, tokenizer)
    assert row.input_ids.tolist() == ids
    assert row.loss_mask.tolist() == mask


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_encode_conversation_marks_answer_and_end_of_turn(messages: list[dict[str, Any]]) -> None:
    tokenizer = make_tokenizer()
    row = encode_conversation(messages, tokenizer, max_length=1000)
    assert row is not None
    answers = [
        message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"
    ]
    runs = np.split(np.arange(len(row.loss_mask)), np.flatnonzero(np.diff(row.loss_mask)) + 1)
    marked = [tokenizer.decode(row.input_ids[run]) for run in runs if row.loss_mask[run[0]]]
    assert marked == answers


def test_encode_conversation_with_trimmed_offsets() -> None:
    messages = chat("How many legs have 3 cats?", " twelve legs , 3 times")
    expected = encode_conversation(messages, make_tokenizer(), max_length=1000)
    row = encode_conversation(messages, make_tokenizer(trim_offsets=True), max_length=1000)
    assert row is not None and expected is not None
    np.testing.assert_array_equal(row.loss_mask, expected.loss_mask)


def test_encode_conversation_truncates_in_the_middle_of_an_answer() -> None:
    tokenizer = make_tokenizer()
    messages = chat("Hi", "They have twelve legs, 3 times 4.")
    whole = encode_conversation(messages, tokenizer, max_length=1000)
    assert whole is not None
    first = int(np.argmax(whole.loss_mask))
    for length in (first + 1, first + 4):
        row = encode_conversation(messages, tokenizer, max_length=length)
        assert row is not None
        np.testing.assert_array_equal(row.input_ids, whole.input_ids[:length])
        np.testing.assert_array_equal(row.loss_mask, whole.loss_mask[:length])
    assert encode_conversation(messages, tokenizer, max_length=first) is None


def test_encode_conversation_follows_a_template_without_generation_prompt() -> None:
    tokenizer = make_tokenizer(BRACKETS, eos="<|endoftext|>")
    row = encode_conversation(
        chat("Hi", "Hello.", "3 cats?", "twelve\n"), tokenizer, max_length=1000
    )
    assert row is not None
    assert (
        tokenizer.decode(row.input_ids)
        == "[Q]Hi[A] Hello.<|endoftext|>[Q]3 cats?[A] twelve<|endoftext|>"
    )
    assert (
        tokenizer.decode(row.input_ids[row.loss_mask]) == " Hello.<|endoftext|> twelve<|endoftext|>"
    )


def test_encode_conversation_follows_a_template_that_shows_the_last_turn_otherwise() -> None:
    tokenizer = make_tokenizer(THINKING)
    row = encode_conversation(chat("Hi", "Hello.", "3 cats?", "twelve"), tokenizer, max_length=1000)
    assert row is not None
    assert (
        tokenizer.decode(row.input_ids[row.loss_mask])
        == "Hello.<|im_end|><think>\n\n</think>\n\ntwelve<|im_end|>"
    )


def test_encode_conversation_leaves_out_a_token_across_the_start_of_an_answer() -> None:
    template = BRACKETS.replace("[A]", "\n").replace(
        " {{ message['content'] | trim }}", "{{ message['content'] }}"
    )
    tokenizer = make_tokenizer(template, eos="<|endoftext|>")
    tokenizer.add_tokens(
        ["\nThey"]
    )  # one token over the end of the prompt and the beginning of the answer
    row = encode_conversation(chat("Hi", "They have"), tokenizer, max_length=1000)
    assert row is not None
    assert tokenizer.decode(row.input_ids[row.loss_mask]) == " have<|endoftext|>"


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (CHATML, chat("Hi"), "no assistant message"),
        (
            CHATML,
            chat("Hi", "a <|im_end|> b"),
            "message 2 holds the end-of-turn token '<|im_end|>' as text",
        ),
        (CHATML, chat("Hi", "a <|endoftext|> b"), None),  # not a stop token here
        (
            "{{ messages | length }}" + CHATML,
            chat("Hi", "Hello."),
            "renders what precedes message 2 otherwise",
        ),
        (
            CHATML.partition("{% if add_gen")[0],
            chat("Hi", "Hello."),
            "ignores add_generation_prompt",
        ),
        (
            CHATML.replace("<|im_end|>", ""),
            chat("Hi", "Hello."),
            "no end-of-turn token after an answer",
        ),
        (
            # Only the last answer is ended.
            CHATML.replace(
                "<|im_end|>\n{% endfor", "{% if loop.index == 4 %}<|im_end|>{% endif %}\n{% endfor"
            ),
            chat("Hi", "Hello.", "Hi", "Hello."),
            "no end-of-turn token after an answer",
        ),
        (
            "{{ raise_exception('roles must alternate') }}",
            chat("Hi", "Hello."),
            "refuses it: roles must alternate",
        ),
        ("{{ messages[0]['content'] + 1 }}", chat("Hi", "Hello."), "the chat template refuses it"),
        ("Hello", chat("Hi", "Hello."), "does not show the text of an answer"),
    ],
)
def test_encode_conversation_says_what_it_refuses(
    template: str, messages: Any, reason: str | None
) -> None:
    tokenizer = make_tokenizer(template)
    if reason is None:
        assert encode_conversation(messages, tokenizer, max_length=100) is not None
    else:
        with pytest.raises(InputError, match=reason.replace("|", r"\|")):
            encode_conversation(messages, tokenizer, max_length=100)


def test_encode_prompt_is_what_precedes_the_answer() -> None:
    tokenizer = make_tokenizer()
    messages = chat("Grüße 🦊", "Hello.", "3 times 4?", "twelve")
    row = encode_conversation(messages, tokenizer, max_length=1000)
    assert row is not None
    begins = np.flatnonzero(np.diff(row.loss_mask.astype(int)) == 1) + 1
    for count, begin in zip((1, 3), begins, strict=True):
        prompt = encode_prompt(messages[:count], tokenizer)
        assert prompt.dtype == np.int32
        np.testing.assert_array_equal(prompt, row.input_ids[:begin])
    with pytest.raises(InputError, match="the last message is an answer"):
        encode_prompt(messages, tokenizer)


def test_stop_token_ids_are_eos_and_end_of_turn() -> None:
    tokenizer = make_tokenizer()
    end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert stop_token_ids(tokenizer) == (end_of_turn,)
    assert stop_token_ids(make_tokenizer(eos="<|endoftext|>")) == (end_of_text, end_of_turn)
    assert stop_token_ids(make_tokenizer(eos=None)) == (end_of_turn,)
    bare = make_tokenizer(
        "{% for message in messages %}{{ message['content'] }}\n{% endfor %}", eos=None
    )
    with pytest.raises(
        InputError, match="no eos token and its chat template no token that ends a turn"
    ):
        stop_token_ids(bare)


def test_stop_token_ids_of_smollm2(smollm2: Path) -> None:
    from domino_jax.target.load import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    assert stop_token_ids(tokenizer) == (2,)
    messages = chat(
        "How many legs have 3 cats?", "They have twelve.", "And 🦊?", "Vier, grüße 東京."
    )
    row = encode_conversation(messages, tokenizer, max_length=1000)
    assert row is not None
    marked = tokenizer.decode(row.input_ids[row.loss_mask])
    assert marked == "They have twelve.<|im_end|>Vier, grüße 東京.<|im_end|>"


def write(path: Path, *lines: Any) -> Path:
    """Lines as they are, or as JSON."""
    raw = [
        line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


GOOD = {"messages": chat("Hi", "Hello."), "family": "greeting"}
BAD_LINES = [
    (b"{", "not valid JSON"),
    (b"[" * 100_000, "more than 64 levels"),
    (
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        "the key 'content' is given twice",
    ),
    (
        b'{"messages": [{"role": "user", "content": "a"}], "n": ' + b"9" * 5000 + b"}",
        "a number of 5000 characters",
    ),
    (
        {"messages": chat("Hi", "Hello."), "finished": "false"},
        "finished is 'false', expected true or false",
    ),
    ({"messages": chat("Hi", "Hello."), "finished": 0}, "finished is 0, expected true or false"),
    (b'{"messages": "\xff"}', "not UTF-8"),
    ([1], "no messages"),
    ({"conversations": []}, "no messages"),
    ({"messages": []}, "no messages"),
    ({"messages": ["Hi"]}, "message 1 is not an object"),
    (
        {"messages": [{"role": "human", "content": "Hi"}]},
        "message 1 has unknown role 'human'; known: system, user",
    ),
    ({"messages": [{"role": ["user"], "content": "Hi"}]}, "message 1 has unknown role"),
    ({"messages": chat("Hi", " \n")}, "message 2 (assistant) has no content"),
    ({"messages": [{"role": "user"}]}, "message 1 (user) has no content"),
    ({"messages": [{"role": "user", "content": ["Hi"]}]}, "message 1 (user) has no content"),
    (
        {"messages": [{"role": "assistant", "content": "Hi"}]},
        "message 1 answers, but no message of a user",
    ),
    (
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "message 1 (user) is not valid Unicode",
    ),
]


def test_read_messages_tells_bad_lines_by_number(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        GOOD,
        *[line for line, _ in BAD_LINES],
        b"",
        b"  ",
        {"messages": chat("Bye")},
    )
    found = read_messages(path)
    assert found.conversations == [(1, GOOD["messages"]), (len(BAD_LINES) + 4, chat("Bye"))]
    assert [bad.line for bad in found.bad_lines] == list(range(2, len(BAD_LINES) + 2))
    for bad, (_, reason) in zip(found.bad_lines, BAD_LINES, strict=True):
        assert reason in bad.reason


def test_read_messages_refuses_a_line_beyond_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (files, conversations):
        monkeypatch.setattr(module, "LINE_BYTES", 2000)
    path = write(
        tmp_path / "a.jsonl", {"messages": chat("x" * 9000, "y")}, {**GOOD, "score": float("nan")}
    )
    found = read_messages(path)
    assert found == ([(2, GOOD["messages"])], [BadLine(1, "more than 2000 bytes")])


def test_read_messages_skips_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert read_messages(path) == ([(1, GOOD["messages"])], [])


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    for read in (read_messages, lambda path: load_rows(path, tokenizer, max_length=100)):
        with pytest.raises(InputError, match=r"missing\.jsonl: No such file"):
            read(tmp_path / "missing.jsonl")
        with pytest.raises(InputError, match="Is a directory"):
            read(tmp_path)
        with pytest.raises(InputError, match="empty"):
            read(write(tmp_path / "empty.jsonl", b"", b""))
        with pytest.raises(InputError, match="no usable line; line 2: not valid JSON"):
            read(write(tmp_path / "bad.jsonl", b"", b"{"))
    with pytest.raises(InputError, match="no usable line; line 1: no assistant message"):
        load_rows(
            write(tmp_path / "prompts.jsonl", {"messages": chat("Hi")}), tokenizer, max_length=100
        )


def test_load_rows_joins_rows_and_bad_lines(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    long = {"messages": chat("Hi " * 100, "Hello.")}
    path = write(tmp_path / "a.jsonl", {"messages": chat("Hi")}, GOOD, b"{}", long)
    rows, bad_lines, unfinished = load_rows(path, tokenizer, max_length=60)
    assert [row.line for row in rows] == [2]
    expected = encode_conversation(chat("Hi", "Hello."), tokenizer, max_length=60)
    assert expected is not None
    np.testing.assert_array_equal(rows[0].input_ids, expected.input_ids)
    np.testing.assert_array_equal(rows[0].loss_mask, expected.loss_mask)
    assert unfinished == 0 and bad_lines[0] == BadLine(1, "no assistant message")
    assert bad_lines[1].line == 3 and bad_lines[2] == BadLine(
        4, "no token of an answer among the first 60"
    )


def test_load_rows_gives_an_unfinished_answer_no_end(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    messages = chat("Hi", "Hello.", "3 cats?", "They have")
    path = write(
        tmp_path / "a.jsonl",
        {"messages": messages, "finished": True},
        {"messages": messages, "finished": False},
    )
    (whole, cut), _, unfinished = load_rows(path, tokenizer, max_length=100)
    assert unfinished == 1
    end = int(np.flatnonzero(whole.loss_mask)[-1])
    assert tokenizer.decode(cut.input_ids[cut.loss_mask]) == "Hello.<|im_end|>They have"
    assert isinstance(cut, Row) and len(cut.input_ids) == len(cut.loss_mask) == end
    np.testing.assert_array_equal(cut.input_ids, whole.input_ids[:end])


# As Qwen3: told not to think, the answer follows empty thoughts.
SWITCHED = THINKING.replace(
    "{% if loop.last and",
    "{% if enable_thinking is defined and enable_thinking is false and",
).replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
NO_THINKING = {"enable_thinking": False}


def test_what_the_template_is_told_reaches_rows_and_prompts(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(SWITCHED)
    messages = chat("Hi", "Hello.")
    plain = encode_conversation(messages, tokenizer, max_length=100)
    row = encode_conversation(messages, tokenizer, max_length=100, chat_template_kwargs=NO_THINKING)
    assert plain is not None and row is not None
    empty = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert empty in tokenizer.decode(row.input_ids)
    assert empty not in tokenizer.decode(plain.input_ids)
    assert tokenizer.decode(row.input_ids[row.loss_mask]) == "Hello.<|im_end|>"
    prompt = encode_prompt(messages[:1], tokenizer, NO_THINKING)
    np.testing.assert_array_equal(prompt, row.input_ids[: len(prompt)])
    assert row.loss_mask[len(prompt)] and not row.loss_mask[: len(prompt)].any()
    path = write(tmp_path / "a.jsonl", {"messages": messages})
    (read,), _, _ = load_rows(path, tokenizer, max_length=100, chat_template_kwargs=NO_THINKING)
    np.testing.assert_array_equal(read.input_ids, row.input_ids)
    for refuse in (
        lambda kwargs: stop_token_ids(tokenizer, kwargs),
        lambda kwargs: load_rows(path, tokenizer, max_length=9, chat_template_kwargs=kwargs),
    ):
        with pytest.raises(InputError, match="did you mean 'enable_thinking'"):
            refuse({"enable_thnking": False})


def test_an_earlier_answer_whose_prompt_is_gone_is_not_marked() -> None:
    # As Qwen3: the empty thoughts that the first answer followed are not shown once more follows.
    tokenizer = make_tokenizer(SWITCHED.replace("{% if enable", "{% if loop.last and enable", 1))
    for last in ([], ["Thanks"]):
        messages = chat("Hi", "Hello.", "3 cats?", "twelve", *last)
        row = encode_conversation(messages, tokenizer, max_length=100)
        assert row is not None
        marked = tokenizer.decode(row.input_ids[row.loss_mask])
        assert marked == "Hello.<|im_end|>twelve<|im_end|>"
    row = encode_conversation(
        messages[:4], tokenizer, max_length=100, chat_template_kwargs=NO_THINKING
    )
    assert row is not None
    assert "Hello." in tokenizer.decode(row.input_ids)
    assert tokenizer.decode(row.input_ids[row.loss_mask]) == "twelve<|im_end|>"
    with pytest.raises(InputError, match="renders what precedes message 4 otherwise without it"):
        encode_conversation(messages, tokenizer, max_length=100, chat_template_kwargs=NO_THINKING)


@pytest.mark.parametrize(
    ("generator", "kwargs", "answered"),
    [
        ({"target": "x"}, {}, None),  # as answers were written before there was a setting
        ({"chat_template_kwargs": {}}, {}, None),
        ({"chat_template_kwargs": NO_THINKING}, NO_THINKING, None),
        ("another program", NO_THINKING, None),
        ({"target": "x"}, NO_THINKING, "{}"),
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
        rows, *_ = load_rows(path, tokenizer, max_length=100, chat_template_kwargs=kwargs)
        assert len(rows) == 2
        return
    with pytest.raises(InputError) as caught:
        load_rows(path, tokenizer, max_length=100, chat_template_kwargs=kwargs)
    assert str(caught.value) == (
        f"{path}:2: answered with chat_template_kwargs {answered}, "
        f"the run has {json.dumps(kwargs)}; "
        "give the run data.chat_template_kwargs of its answers, or make the answers again"
    )


def test_an_answer_that_records_nonsense_is_told_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {**GOOD, "generator": {"chat_template_kwargs": [1]}})
    with pytest.raises(
        InputError, match=r"a.jsonl:1: generator: chat_template_kwargs: expected a map"
    ):
        load_rows(path, make_tokenizer(), max_length=100)
