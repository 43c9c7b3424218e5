"""Prompts that a target writes: which are kept, and the same file however often it is begun."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import WORDS, Heard, Interrupted, quiet, write_target

from domino_jax.base.errors import InputError
from domino_jax.base.progress import Reporter
from domino_jax.data.template import NO_KWARGS
from domino_jax.datagen.prompts import (
    Drawn,
    PromptSettings,
    _Sieve,
    language_filter,
    user_turn,
    write_prompts,
)
from domino_jax.decoding.decoder import Weights, make_decoder
from domino_jax.decoding.generate import Answer
from domino_jax.target.decoder import Target
from domino_jax.target.load import load_target, load_tokenizer

SETTINGS = PromptSettings(
    target="tiny",
    count=20,
    max_new_tokens=40,
    temperature=1.0,
    top_k=None,
    top_p=None,
    seed=3,
    dtype="float32",
    batch_size=16,
    language=None,
    chat_template_kwargs={},
)
END, START = WORDS.index("<|im_end|>"), WORDS.index("<|im_start|>")


class Tiny:
    def __init__(self, directory: Path) -> None:
        loaded = load_target(write_target(directory))
        self.tokenizer = load_tokenizer(directory)
        self.weights = Weights(loaded.params)
        self.target = Target(loaded.config)

    def write(
        self,
        path: Path,
        settings: PromptSettings = SETTINGS,
        *,
        stops: tuple[int, ...] = (END,),
        reporter: Reporter = quiet(),  # noqa: B008  (it holds nothing)
    ) -> Drawn:
        return write_prompts(
            path,
            decoder=make_decoder(self.target, temperature=1.0, stop_ids=stops),
            weights=self.weights,
            tokenizer=self.tokenizer,
            settings=settings,
            reporter=reporter,
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("target"))


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def row(*words: str, stopped: bool = True) -> Answer:
    ids = np.array([WORDS.index(word) for word in words], np.int32)
    return Answer(ids, np.zeros(len(ids), bool), stopped, 0, 0, 1.0)


def test_the_opening_and_the_end_of_a_users_turn_are_the_templates(tiny: Tiny) -> None:
    turn = user_turn(tiny.tokenizer, NO_KWARGS)
    assert turn.opening.tolist() == [START, WORDS.index("user")] and turn.end == END
    assert turn.opening.dtype == np.int32


def test_prompts_are_requests_that_are_told_apart(tiny: Tiny, tmp_path: Path) -> None:
    drawn = tiny.write(tmp_path / "prompts.jsonl")
    header, *written = records(tmp_path / "prompts.jsonl")
    texts = [record["messages"][0]["content"] for record in written]
    assert len(texts) == len(set(texts)) == 20 and min(map(len, texts)) >= 12
    assert all("<|im" not in text and text == text.strip() for text in texts)
    numbers = [record["draw"] for record in written]
    assert numbers == sorted(set(numbers)) and drawn.drawn >= max(numbers) + 1
    assert header["generator"]["count"] == 20 and written[0]["messages"][0]["role"] == "user"
    assert not (tmp_path / "prompts.jsonl.partial").exists()
    # Another seed draws others.
    tiny.write(tmp_path / "others.jsonl", replace(SETTINGS, seed=90))
    others = {record["messages"][0]["content"] for record in records(tmp_path / "others.jsonl")[1:]}
    assert len(others & set(texts)) < 3


def test_a_cut_off_start_resumes_to_the_same_file(tiny: Tiny, tmp_path: Path) -> None:
    heard = Heard()
    tiny.write(tmp_path / "whole.jsonl", reporter=heard)
    first = next(line for line in heard.lines if line.startswith("prompts ")).split("  ")[0]
    with pytest.raises(KeyboardInterrupt):
        tiny.write(tmp_path / "parts.jsonl", reporter=Interrupted(at=first))
    assert not (tmp_path / "parts.jsonl").exists()
    heard = Heard()
    tiny.write(tmp_path / "parts.jsonl", reporter=heard)
    assert heard.lines[0].startswith(first.removeprefix("prompts "))
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_what_does_not_fit_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("kept\n")
    with pytest.raises(InputError, match="already there"):
        tiny.write(path)
    assert path.read_text() == "kept\n"
    with pytest.raises(KeyboardInterrupt):
        tiny.write(tmp_path / "parts.jsonl", reporter=Interrupted(at="prompts "))
    with pytest.raises(InputError, match="made with"):
        tiny.write(tmp_path / "parts.jsonl", replace(SETTINGS, temperature=0.5))


def test_a_target_that_never_ends_a_turn_ends_the_work(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of the last 128 rows .* 128 without an end"):
        tiny.write(tmp_path / "prompts.jsonl", stops=())  # no token


def usable(rows: list[Answer], tokenizer: Any, sieve: _Sieve) -> list[str]:
    found = sieve.usable(rows, tokenizer, first=0)
    return [record["messages"][0]["content"] for record in found]


def test_each_reason_to_leave_a_row_out(tiny: Tiny) -> None:
    sieve = _Sieve(lambda text: "q" not in text)
    letters = [*"abcdefgh"]
    rows = [
        row(*letters, "<|im_end|>"),
        row(*letters, "<|im_end|>"),
        row(*letters, stopped=False),
        row("a", "b", "<|im_end|>"),
        row(*letters, "<|im_start|>", "assistant", "<|im_end|>"),
        row("q", *letters, "<|im_end|>"),
    ]
    assert sieve.counts() == "none"
    assert usable(rows, tiny.tokenizer, sieve) == [" ".join(letters)]
    assert sieve.counts() == (
        "1 repeated, 1 without an end, 1 too short, 1 with special tokens, 1 in another language"
    )


def test_what_differs_in_case_and_punctuation_is_repeated() -> None:
    sieve = _Sieve(None)
    sieve.read({"messages": [{"content": "Write a poem, please!"}], "draw": 0})
    tokens = np.array([5, 0], np.int32)
    answer = Answer(tokens, np.zeros(2, bool), True, 0, 0, 1.0)

    class Words:
        added_tokens_decoder: dict[int, str] = {}  # noqa: RUF012

        def decode(self, *_: Any, **__: Any) -> str:
            return "write a POEM please"

    assert usable([answer], Words(), sieve) == [] and sieve.counts() == "1 repeated"


def test_the_language_is_asked_for_and_doubt_passes() -> None:
    passes = language_filter("en")  # reads the models of all languages
    for text in (
        "Could you plan a birthday party for twelve children in a small garden?",
        "def f(x): return x + 1",
        "2x + 5 = 17",
    ):
        assert passes(text)
    for text in (
        "¿Podrías planear una fiesta de cumpleaños para doce niños en el jardín?",
        "Könnten Sie mir bitte erklären, wie man einen guten Apfelkuchen backt?",
    ):
        assert not passes(text)


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(InputError, match="--language xx: expected one of af, "):
        language_filter("xx")
