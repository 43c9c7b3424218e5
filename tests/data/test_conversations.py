"""Conversations -> rows: where answers begin and end, and which conversations are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import BRACKETS, CHATML, THINKING, chat, encoded, encoded_all, make_tokenizer, marked

from domino_jax.base.errors import InputError
from domino_jax.data.conversations import Encoder
from domino_jax.data.forms import Conversation
from domino_jax.data.prompt import encode_prompt, stop_token_ids


def slow_row(messages: list[dict[str, Any]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """ChatML up to the last answer, each piece of a turn encoded by itself: its owner is known."""
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
    end = len(mask) - mask[::-1].index(True)
    return ids[:end], mask[:end]


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
def test_encoder_equals_the_slow_reference(messages: list[dict[str, Any]]) -> None:
    tokenizer = make_tokenizer()
    row = encoded(messages, tokenizer)
    assert row is not None
    assert row.input_ids.dtype == np.int32 and row.loss_mask.dtype == bool
    ids, mask = slow_row(messages, tokenizer)
    assert row.input_ids.tolist() == ids
    assert row.loss_mask.tolist() == mask


def test_encoder_truncates_in_the_middle_of_an_answer() -> None:
    tokenizer = make_tokenizer()
    messages = chat("Hi", "They have twelve legs, 3 times 4.")
    whole = encoded(messages, tokenizer)
    first = int(np.argmax(whole.loss_mask))
    for length in (first + 1, first + 4):
        row = encoded(messages, tokenizer, max_length=length)
        np.testing.assert_array_equal(row.input_ids, whole.input_ids[:length])
        np.testing.assert_array_equal(row.loss_mask, whole.loss_mask[:length])
    assert encoded(messages, tokenizer, max_length=first) is None


def test_encoder_follows_a_template_without_generation_prompt() -> None:
    tokenizer = make_tokenizer(BRACKETS, eos="<|endoftext|>")
    row = encoded(chat("Hi", "Hello.", "3 cats?", "twelve\n"), tokenizer)
    text = "[Q]Hi[A] Hello.<|endoftext|>[Q]3 cats?[A] twelve\n<|endoftext|>"
    assert tokenizer.decode(row.input_ids) == text
    assert marked(row, tokenizer) == " Hello.<|endoftext|> twelve\n<|endoftext|>"


def test_encoder_leaves_out_what_the_template_inserts_before_the_last_answer() -> None:
    tokenizer = make_tokenizer(THINKING)
    row = encoded(chat("Hi", "Hello.", "3 cats?", "twelve"), tokenizer)
    assert marked(row, tokenizer) == "Hello.<|im_end|>twelve<|im_end|>"
    assert "think" not in tokenizer.decode(row.input_ids)


def test_encoder_splits_a_token_across_the_start_of_an_answer() -> None:
    template = BRACKETS.replace("[A]", "\n").replace(
        " {{ message['content'] | trim }}", "{{ message['content'] }}"
    )
    tokenizer = make_tokenizer(template, eos="<|endoftext|>")
    tokenizer.add_tokens(["\nThey"])  # over the end of the prompt and the start of the answer
    row = encoded(chat("Hi", "They have"), tokenizer)
    assert marked(row, tokenizer) == "They have<|endoftext|>"
    prompt = encode_prompt(chat("Hi"), tokenizer)
    np.testing.assert_array_equal(row.input_ids[: len(prompt)], prompt)


NO_PROMPT = CHATML.partition("{% if add_gen")[0]
OF_A_LINE = [
    (CHATML, ["Hi"], "no assistant message"),
    (CHATML, ["Hi", "a <|im_end|> b"], "message 2: the answer holds the end-of-turn token '<|im_e"),
    (
        NO_PROMPT,
        ["Hi", "Hello."],
        "the chat template ignores add_generation_prompt, which marks wh",
    ),
]
OF_A_TEMPLATE = [
    (CHATML.replace("message['content']", "'x'"), "does not show the text of an answer"),
    ("{{ raise_exception('must alternate') }}", "refuses it: must alternate"),
    ("{{ messages[0]['content'] + 1 }}", "the chat template refuses it"),
    ("Hello", "does not show the text of an answer"),
]


@pytest.mark.parametrize(("template", "contents", "reason"), OF_A_LINE)
def test_encoder_names_why_an_answer_is_not_trained(
    template: str, contents: list[str], reason: str
) -> None:
    found = encoded_all(chat(*contents), make_tokenizer(template))
    assert not found.rows and found.untrained[0].startswith(reason)


@pytest.mark.parametrize(("template", "reason"), OF_A_TEMPLATE)
def test_encoder_refuses_a_template_without_answers(template: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        encoded_all(chat("Hi", "Hello."), make_tokenizer(template))


def test_recorded_ids_need_no_generation_prompt() -> None:
    encoder = Encoder(make_tokenizer(NO_PROMPT), max_length=10)
    ids, mask = np.arange(4, dtype=np.int32), np.array([False, False, True, True])
    (row,) = encoder.rows(Conversation(line=1, input_ids=ids, loss_mask=mask)).rows
    assert row.input_ids.tolist() == ids.tolist() and row.loss_mask.tolist() == mask.tolist()


def test_a_template_without_an_end_of_turn_ends_with_eos() -> None:
    tokenizer = make_tokenizer(CHATML.replace("<|im_end|>", ""), eos="<|endoftext|>")
    row = encoded(chat("Hi", "Hello."), tokenizer)
    assert marked(row, tokenizer) == "Hello.<|endoftext|>"


def test_a_message_that_the_template_does_not_show_is_named() -> None:
    shown = "{% if message['role'] != 'system' %}{{ message['content'] }}{% endif %}"
    tokenizer = make_tokenizer(CHATML.replace("{{ message['content'] }}", shown))
    found = encoded_all(chat("Hi", "Hello.", system="Be brief."), tokenizer)
    assert found.untrained == ["message 3: the chat template does not show message 1 (system)"]


def test_text_that_is_no_stop_token_may_be_said() -> None:
    assert encoded(chat("Hi", "a <|endoftext|> b"), make_tokenizer()) is not None


def test_encode_prompt_is_what_precedes_the_answer() -> None:
    tokenizer = make_tokenizer()
    messages = chat("Grüße 🦊", "Hello.", "3 times 4?", "twelve")
    row = encoded(messages, tokenizer)
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
    ends = (7, end_of_turn, 3)
    assert stop_token_ids(make_tokenizer(eos=None), end_ids=ends) == (end_of_turn, 7, 3)
    bare = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    message = "no eos token and its chat template no token that ends a turn"
    with pytest.raises(InputError, match=message):
        stop_token_ids(make_tokenizer(bare, eos=None))


def test_stop_token_ids_of_smollm2(smollm2: Path) -> None:
    from domino_jax.target.load import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    assert stop_token_ids(tokenizer) == (2,)
    row = encoded(chat("How many?", "They have twelve.", "🦊?", "Vier, grüße 東京."), tokenizer)
    expected = "They have twelve.<|im_end|>Vier, grüße 東京.<|im_end|>"
    assert marked(row, tokenizer) == expected
