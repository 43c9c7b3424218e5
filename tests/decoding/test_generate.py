"""An answer that streams: its text in whole characters, its seconds without compilation."""

from typing import Any

import jax
import numpy as np
import pytest
from toy_models import PROMPTS, TARGET, draft_config, models

from domino_jax.base.errors import InputError
from domino_jax.decoding import generate
from domino_jax.decoding.decoder import make_decoder
from domino_jax.decoding.generate import TextStream, stream_answer
from domino_jax.target.decoder import Target


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: np.ndarray, *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(ids.tolist()).decode("utf-8", "replace")


# Characters of one, two and three bytes, the first byte of another, and who wrote each byte.
TEXT = "a\u00e9\u20acb\u00fc"
IDS = np.frombuffer(TEXT.encode()[:-1], np.uint8).astype(np.int32)
DRAFTED = np.array([1, 0, 1, 1, 1, 0, 0, 1], bool)
OF_LAST_TOKEN = [("a", True), ("\u00e9", True), ("\u20ac", False), ("b", False), ("\ufffd", True)]


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("shown", [range(1, 9), (1, 3, 8), (2, 5, 8), (8,)])
def test_a_character_is_written_whole_and_as_its_last_token(shown: Any, apart: bool) -> None:
    found: list[tuple[str, bool]] = []

    def write(piece: str, drafted: bool) -> None:
        found.extend((character, drafted) for character in piece)

    text = TextStream(Bytes(), write, apart=apart)
    for count in shown:
        text.show(IDS[:count], DRAFTED[:count])
    assert found == [(one, kind and apart) for one, kind in OF_LAST_TOKEN[:-1]]
    text.end(IDS, DRAFTED)
    assert found == [(one, kind and apart) for one, kind in OF_LAST_TOKEN]


def test_a_stop_token_outside_the_vocabulary_is_refused() -> None:
    size = TARGET.vocab_size
    assert make_decoder(Target(TARGET), stop_ids=(0, size - 1)).stop_ids == (0, size - 1)
    for token in (size, -1):
        message = f"stop token id {token} is outside the target's vocab_size {size}; use the"
        with pytest.raises(InputError, match=message):
            make_decoder(Target(TARGET), stop_ids=(0, token))


def test_pieces_of_an_answer_are_its_drafted_and_own_tokens(target_params: Any) -> None:
    draft, weights = models(target_params, draft_config())
    decoder = make_decoder(Target(TARGET), draft)
    found: list[tuple[int, bool]] = []

    def write(piece: str, drafted: bool) -> None:
        found.extend((ord(one), drafted) for one in piece)

    text = TextStream(Bytes(), write, apart=True)
    answer = stream_answer(decoder, weights, PROMPTS[0], max_new_tokens=20, show=text.show)
    text.end(answer.tokens, answer.drafted)
    assert answer.drafted.any() and not answer.drafted.all()
    assert found == list(zip(answer.tokens.tolist(), answer.drafted.tolist(), strict=True))


def test_a_last_batch_is_filled_up_and_answers_its_own_prompts(target_params: Any) -> None:
    draft, weights = models(target_params, draft_config())
    decoder = make_decoder(Target(TARGET), draft)
    alone = generate.generate(decoder, weights, PROMPTS[:2], max_new_tokens=6)
    filled = generate.generate(decoder, weights, PROMPTS[:2], max_new_tokens=6, size=5)
    assert len(filled) == 2
    for one, other in zip(alone, filled, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert (one.committed, one.verifications) == (other.committed, other.verifications)


@pytest.mark.parametrize("count", [1, 20])
def test_no_second_of_a_streamed_answer_is_a_compilation(
    target_params: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    draft, weights = models(target_params, draft_config())
    decoder = make_decoder(Target(TARGET), draft, temperature=0.9, top_p=0.9)
    compiled: list[str] = []
    at_start: list[int] = []
    begin = generate.start

    def listener(event: str, _: float, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    def start(*args: Any, **options: Any) -> Any:
        at_start.append(len(compiled))
        return begin(*args, **options)

    monkeypatch.setattr(generate, "start", start)
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        answer = stream_answer(
            decoder, weights, PROMPTS[1], max_new_tokens=count, show=lambda *_: None
        )
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert len(answer.tokens) == count
    first, timed = at_start
    assert first < timed == len(compiled)
