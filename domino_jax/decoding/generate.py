"""Answers to prompts: of a batch, decoded to its end, or of one, passed on as it grows.

prompts -> `start` -> `finish`                         -> an `Answer` each
prompt  -> `start` -> `stream`, every STREAM_CYCLES -> show, ... -> `Answer`
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from domino_jax.base.errors import InputError
from domino_jax.decoding.decoder import Decoder, Weights
from domino_jax.decoding.speculate import DecodeState, finish, required_cache_len, start, stream
from domino_jax.target.tokens import check_vocabulary

STREAM_CYCLES = 8  # cycles between two pieces of streamed text
# Remedies for logits that are not finite, by model.
REMEDIES = {
    "target": "use another copy of its weights, or dtype float32 in place of bfloat16",
    "draft": "use an earlier checkpoint of a run that diverged (--step), or dtype float32 in place "
    "of bfloat16",
}


@dataclass(frozen=True, eq=False)
class Answer:
    """One finished answer: `tokens` int32 [n] without the prompt, how it ended, and what it took.

    `drafted`, bool [n]: the draft proposed the token and the target stood for it; the others are
    the target's own. `stopped`: a stop token ended it, and not the limit.
    """

    tokens: np.ndarray
    drafted: np.ndarray
    stopped: bool
    committed: int
    verifications: int
    seconds: float

    @property
    def tau(self) -> float:
        """Tokens committed per verification by the target, its own token included."""
        return self.committed / max(self.verifications, 1)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the answer per second, reading the prompt included."""
        return len(self.tokens) / self.seconds


def check_prompt(decoder: Decoder, prompt: np.ndarray, tokenizer: Any, *, source: str) -> None:
    """Refuses a prompt that the target has no positions or no embeddings for.

    Args:
        decoder: decodes with the target.
        prompt: token ids, int32 [n].
        tokenizer: gives the text of a token, for the message.
        source: of the prompt, for the message.
    Raises:
        InputError: more tokens than positions, or an id outside the vocabulary.
    """
    longest = decoder.target.cfg.max_position_embeddings
    if len(prompt) > longest:
        raise InputError(
            f"{source}: a prompt of {len(prompt)} tokens, the target has {longest} positions"
        )
    check_vocabulary(prompt, tokenizer, vocab_size=decoder.target.cfg.vocab_size, source=source)


def generate(
    decoder: Decoder,
    weights: Weights,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    size: int = 0,
    cache_len: int | None = None,
    longest: int = 0,
    seed: int = 0,
) -> list[Answer]:
    """Answers a batch of prompts.

    Args:
        prompts: token ids of each.
        max_new_tokens: per answer.
        size: of all batches, which then run through one program: short of prompts, the last one
            fills up; 0 for as many as there are.
        cache_len: cache positions, see `speculate.start`; None for as few as `longest` needs.
        longest: of the prompts of all batches, likewise; 0 for those of this one.
    Returns:
        One `Answer` per prompt; `seconds` is the time of the whole batch.
    Raises:
        InputError: logits of the target or the draft are not finite.
    """
    # A caller of many batches gives one number for all: another one is another program.
    if cache_len is None:
        cache_len = required_cache_len(decoder, max(longest, *map(len, prompts)), max_new_tokens)
    filled = [*prompts, *[prompts[-1]] * (size - len(prompts))]
    began = time.perf_counter()
    state = start(
        decoder,
        weights,
        filled,
        max_new_tokens=max_new_tokens,
        cache_len=cache_len,
        longest=longest,
        seed=seed,
    )
    state = finish(decoder, weights, state)
    np.asarray(state.lengths)  # waits for the device
    return finished_answers(decoder, state, prompts, seconds=time.perf_counter() - began)


def stream_answer(
    decoder: Decoder,
    weights: Weights,
    prompt: np.ndarray,
    *,
    max_new_tokens: int,
    show: Callable[[np.ndarray, np.ndarray], None],
    seed: int = 0,
) -> Answer:
    """Answers one prompt and passes on the answer as it grows.

    Args:
        prompt: token ids, int32 [n].
        max_new_tokens: at most.
        show: receives the tokens of the answer so far and whether each was drafted, int32 and
            bool [n], every few cycles.
    Returns:
        The whole `Answer`; its `seconds` hold no compilation.
    Raises:
        InputError: logits of the target or the draft are not finite.
    """
    cache_len = required_cache_len(decoder, len(prompt), max_new_tokens)

    def answered(count: int, show: Callable[[np.ndarray, np.ndarray], None]) -> Answer:
        began = time.perf_counter()
        first = start(
            decoder, weights, [prompt], max_new_tokens=count, cache_len=cache_len, seed=seed
        )
        for state in stream(decoder, weights, first, cycles=STREAM_CYCLES):
            require_finite(state, 1)  # before a token that follows from NaN is shown
            # Read whole: a part of an array on a device is a program for each length.
            written = slice(len(prompt), np.asarray(state.lengths)[0])
            show(np.asarray(state.tokens)[0, written], np.asarray(state.drafted)[0, written])
        (answer,) = finished_answers(decoder, state, [prompt], seconds=time.perf_counter() - began)
        return answer

    # Compiles every program. The pass over the prompt gives one token, so the loop runs for two.
    answered(min(2, max_new_tokens), lambda *_: None)
    return answered(max_new_tokens, show)


class TextStream:
    """Writes the text of an answer that grows, whole characters at a time.

    Args:
        tokenizer: of the target.
        write: receives each piece and whether it was drafted.
        apart: whether drafted text and the target's own are pieces apart; a character of both is
            its last token's. Otherwise all is written as the target's own.
    """

    def __init__(
        self, tokenizer: Any, write: Callable[[str, bool], None], *, apart: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._apart = apart
        self._read = 0
        self._shown = ""

    def show(self, ids: np.ndarray, drafted: np.ndarray) -> None:
        """Writes what is new in the text of an answer so far, of all its tokens [n]."""
        ends = [len(ids)]
        if self._apart:
            ends = [*(np.flatnonzero(drafted[1:] != drafted[:-1]) + 1), len(ids)]
        for end in ends:
            if end > self._read:
                # Half of a character waits for the rest of its bytes.
                whole = self._text(ids[:end]).rstrip("\ufffd")
                self._piece(whole, drafted[:end])
                self._read = end

    def end(self, ids: np.ndarray, drafted: np.ndarray) -> None:
        """Writes what `show` held back: an answer may end within a character."""
        self._piece(self._text(ids), drafted)

    def _piece(self, text: str, drafted: np.ndarray) -> None:
        self._write(text[len(self._shown) :], self._apart and bool(drafted[-1]))
        self._shown = text

    def _text(self, ids: np.ndarray) -> str:
        # All of it each time: the text of a token depends on those before it.
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def pieces(tokenizer: Any, answer: Answer) -> list[tuple[str, bool]]:
    """The text of an answer in pieces that were drafted, or are the target's own, in turns."""
    found: list[tuple[str, bool]] = []
    text = TextStream(tokenizer, lambda piece, drafted: found.append((piece, drafted)), apart=True)
    text.show(answer.tokens, answer.drafted)
    text.end(answer.tokens, answer.drafted)
    return [piece for piece in found if piece[0]]


def finished_answers(
    decoder: Decoder, state: DecodeState, prompts: Sequence[np.ndarray], *, seconds: float
) -> list[Answer]:
    """The answers of a state in which all are finished, to its first prompts.

    Raises:
        InputError: logits of the target or the draft are not finite.
    """
    require_finite(state, len(prompts))
    parts = state.tokens, state.drafted, state.lengths, state.committed, state.verifications
    # A batch that was filled up has more rows than prompts.
    rows = zip(prompts, *map(np.asarray, parts), strict=False)
    answers = []
    for prompt, tokens, drafted, length, committed, verifications in rows:
        own = slice(len(prompt), length)
        stopped = int(tokens[length - 1]) in decoder.stop_ids
        answers.append(
            Answer(tokens[own], drafted[own], stopped, int(committed), int(verifications), seconds)
        )
    return answers


def require_finite(state: DecodeState, count: int) -> None:
    """Raises `InputError` where one of the first `count` answers has logits that are not finite."""
    # The target first: a draft that reads states of such a target has no finite logits either.
    for model, finite in (("target", state.target_finite), ("draft", state.draft_finite)):
        require_finite_logits(model, np.asarray(finite)[:count])


def require_finite_logits(model: str, finite: np.ndarray) -> None:
    """Raises `InputError` with what to do about answers whose logits are not finite.

    Args:
        model: whose logits, a key of `REMEDIES`.
        finite: bool [n], by answer.
    """
    count = np.count_nonzero(~finite)
    if count:
        raise InputError(
            f"the {model}'s logits are not finite in {count} of {finite.size} answers, so no token "
            f"follows from them; {REMEDIES[model]}"
        )
