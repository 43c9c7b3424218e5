"""Conversations of many turns: rows as each turn gives them alone, in bounded time."""

import os
import random
import time
from typing import Any

import numpy as np
import pytest
from chat_templates import DATE, PUBLISHED, TOOL, rendered
from chats import chat, make_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from domino_jax.data import prompt, rendering
from domino_jax.data.conversations import Encoded, Encoder
from domino_jax.data.forms import Conversation
from domino_jax.data.prefix_tokens import PrefixTokens, tokenize_with_spans
from domino_jax.data.prompt import Prompts

WORDS = [
    *(
        "What is 2 + 2?",
        "It is 4.",
        " ",
        "\n\n",
        "sunny",
        "Is it sunny?",
        "東京 🦊",
        '"a" b',
        "user\n",
    ),
    *("<think>\nAdd.\n</think>\n\n", "</think>", "<think>", "<|im_start|>", "<|im_sta", "[INST]"),
    *("<tool_call>", "assistant", "Okay. " * 30, "x" * 200),
]


def conversation(rng: random.Random) -> Conversation:
    """A conversation of up to seven turns, with anything that a message may have."""

    def words() -> str:
        return "".join(rng.choices(WORDS, k=rng.randint(1, 4))) + rng.choice(["", "?", " end"])

    messages: list[dict[str, Any]] = []
    if rng.random() < 0.4:
        messages += [{"role": rng.choice(["system", "developer"]), "content": words()}]
    for _ in range(rng.randint(1, 7)):
        messages.append({"role": "user", "content": words()})
        if rng.random() < 0.15:
            function = {"name": "weather", "arguments": rng.choice(['{"a": "b"}', {"a": "b"}])}
            call = {"type": "function", "function": function, "id": "123456789"}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "content": words()})
        if rng.random() < 0.1:
            messages.append({"role": "system", "content": words()})
        answer = {"role": "assistant", "content": words()}
        if rng.random() < 0.15:
            answer["reasoning_content"] = words()
        if rng.random() < 0.1:
            answer["weight"] = 0
        messages.append(answer)
    tools = [TOOL] if rng.random() < 0.2 else None
    return Conversation(line=1, messages=messages, tools=tools, finished=rng.random() < 0.8)


def define_plainly(patch: pytest.MonkeyPatch) -> None:
    """Renders and tokenises each turn whole, by transformers itself."""

    def render(self: Any, spelling: int, count: int, more: Any = (), **kind: bool) -> str:
        request = self._request
        messages = [*request["spellings"][spelling][:count], *more]
        told = {key: value for key, value in request["kwargs"].items() if key != "strftime_now"}
        try:
            return rendered(
                self._tokenizer,
                messages,
                prompt=kind["generation_prompt"],
                tools=request["tools"],
                **told,
            )
        except Exception as error:
            words = " ".join(str(error).split())[:200]
            raise prompt.InputError(f"the chat template refuses it: {words}") from error

    def encode(self: Any, text: str) -> Any:
        ids, spans = tokenize_with_spans(text, self._tokenizer)
        return ids, spans[:, 1]

    def hidden(self: Any, count: int, text: str) -> int | None:
        return prompt._first_hidden(self._messages[:count], text)

    patch.setattr(rendering.History, "render", render)
    patch.setattr(PrefixTokens, "encode", encode)
    patch.setattr(prompt._Shown, "first_hidden", hidden)


def plain_rows(encoded: Encoded) -> Any:
    rows = [(row.input_ids.tolist(), row.loss_mask.tolist()) for row in encoded.rows]
    return rows, encoded.untrained


@pytest.mark.parametrize("name", PUBLISHED)
def test_turns_are_those_rendered_and_tokenised_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    published, rng = PUBLISHED[name], random.Random(name)
    kwargs = {"strftime_now": DATE} if published.prints_date else {}
    tokenizer = published.tokenizer()
    encoder = Encoder(tokenizer, max_length=400, chat_template_kwargs=kwargs)
    cases = [conversation(rng) for _ in range(25)]
    found = [plain_rows(encoder.rows(case)) for case in cases]
    define_plainly(monkeypatch)
    for case, rows in zip(cases, found, strict=True):
        assert rows == plain_rows(encoder.rows(case)), case.messages
    assert sum(len(rows) for rows, _ in found) > 2


def test_tokens_follow_a_text_that_changes_anywhere() -> None:
    rng = random.Random(0)
    for tokenizer in (make_tokenizer(), PUBLISHED["Mistral 7B v0.3"].tokenizer()):
        tokenizer.add_tokens(["\nThey", "x<|im"])  # matched in what the normalizer leaves
        tokens, text = PrefixTokens(tokenizer), ""
        for _ in range(150):
            at = max(0, len(text) - rng.choice([0, 1, 9, 40, 200]))
            text = text[:at] + "".join(rng.choices([*WORDS, "<|im_end|>", "\nThey", "x"], k=3))
            ids, ends = tokens.encode(text)
            plain, spans = tokenize_with_spans(text, tokenizer)
            np.testing.assert_array_equal(ids, plain)
            np.testing.assert_array_equal(ends, spans[:, 1])


def test_a_longer_token_may_begin_before_a_special_one_and_end_behind_the_shared_text() -> None:
    tokenizer = make_tokenizer()
    added = [AddedToken(text, special=True, normalized=False) for text in ("<a>", "ab<a>q")]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokens, shared = PrefixTokens(tokenizer), "x" * 59 + "ab<a>"
    for text in (f"{shared}z", f"{shared}q"):
        np.testing.assert_array_equal(
            tokens.encode(text)[0], PrefixTokens(tokenizer).encode(text)[0]
        )


@pytest.mark.parametrize(
    ("special", "words", "text"),
    [
        (AddedToken("<unk>", special=True), "12 34 345", "12٤345"),  # an unknown character
        (AddedToken("34", special=True, single_word=True), "34 34 12 23", "534123"),
    ],
)
def test_a_special_id_inside_of_a_word_begins_no_text(
    special: AddedToken, words: str, text: str
) -> None:
    model = Tokenizer(models.BPE(unk_token="<unk>"))
    # Digits in groups of three.
    model.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,3}|\D+"), "isolated")
    trainer = trainers.BpeTrainer(special_tokens=["<unk>"], show_progress=False)
    model.train_from_iterator([words] * 4 + ["5a"], trainer)
    model.add_special_tokens([special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")
    tokens = PrefixTokens(tokenizer)
    for length in (90, 91):
        found, _ = tokens.encode(text + "a" * length)
        expected, _ = tokenize_with_spans(text + "a" * length, tokenizer)
        np.testing.assert_array_equal(found, expected)


def long_chat(turns: int) -> Conversation:
    words = []
    for turn in range(turns):
        words += [f"What is {turn} + {turn}? In a few words.", f"It is {2 * turn}, a plain sum."]
    return Conversation(line=1, messages=chat(*words))


def cpu_seconds() -> float:
    """Of this process and the one that renders."""
    running = rendering._process._running
    ticks = 0
    if running is not None:
        with open(f"/proc/{running.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    "name",
    # Qwen3's is near the bound: it needs a quiet machine.
    ["SmolLM2", pytest.param("Qwen3", marks=pytest.mark.slow)],
)
def test_a_thousand_turns_take_five_seconds(name: str) -> None:
    encoder = Encoder(PUBLISHED[name].tokenizer(), max_length=10**6)
    case = long_chat(1000)
    # Other work on the machine slows a process down as well: one of three may be quick enough.
    for _ in range(3):
        began = cpu_seconds()
        (row,) = encoder.rows(case).rows
        taken = cpu_seconds() - began
        if taken <= 5:
            break
    assert taken <= 5
    assert np.diff(row.loss_mask.astype(int), prepend=0).tolist().count(1) == 1000


def counted_prompts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of messages of each prompt that is rendered from now on."""
    counts: list[int] = []
    before = Prompts.before

    def counted(self: Prompts, count: int) -> Any:
        counts.append(count)
        return before(self, count)

    monkeypatch.setattr(Prompts, "before", counted)
    return counts


def test_turns_beyond_the_longest_row_are_not_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = PUBLISHED["SmolLM2"].tokenizer()
    case = long_chat(300)
    whole = Encoder(tokenizer, max_length=10**6).rows(case).rows[0]
    counts = counted_prompts(monkeypatch)
    (row,) = Encoder(tokenizer, max_length=500).rows(case).rows
    np.testing.assert_array_equal(row.input_ids, whole.input_ids[:500])
    # No more than the tokens of the row: what is cut off is not kept.
    assert len(counts) < 15 and row.input_ids.base is None and row.loss_mask.base is None


@pytest.mark.parametrize("reason", ["holds the end-of-turn token", "does not show message 1"])
def test_turns_beyond_the_longest_row_are_not_rendered_where_none_is_trained(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = long_chat(300)
    if "token" in reason:
        for message in case.messages[1::2]:
            message["content"] = "It is<|im_end|> a sum."
    else:
        case.messages[:0] = [{"role": "tool", "content": "Late."}]
    counts = counted_prompts(monkeypatch)
    encoded = Encoder(PUBLISHED["Phi-4"].tokenizer(), max_length=500).rows(case)
    assert not encoded.rows and reason in encoded.untrained[0] and len(counts) < 20


def test_a_turn_behind_long_reasoning_that_the_template_strips_is_trained() -> None:
    tokenizer = PUBLISHED["Qwen3"].tokenizer()
    messages = chat("Hi", f"<think>\n{'Add. ' * 90}</think>\n\nYes.", "Hi again", "No.")
    encoder = Encoder(tokenizer, max_length=120, mask_reasoning_content=True)
    (row,) = encoder.rows(Conversation(line=1, messages=messages)).rows
    assert tokenizer.decode(row.input_ids[row.loss_mask]) == "No.<|im_end|>"


def test_the_row_of_the_last_answer_is_rendered_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(PUBLISHED["Qwen3"].tokenizer(), max_length=10**6)
    case = long_chat(20)
    (whole,) = encoder.rows(case).rows
    counts = counted_prompts(monkeypatch)
    (row,) = encoder.rows(case, last=True).rows
    np.testing.assert_array_equal(row.input_ids, whole.input_ids)
    assert counts == [39] and row.loss_mask.sum() < whole.loss_mask.sum() / 10
