"""Who has no prompts asks the target: left at the opening of a user's turn, it writes a request.

So anybody has prompts in the target's own distribution (Magpie, arXiv:2406.08464), and answers to
them are training data:

    opening of a user's turn -> rows drawn in batches -> usable ones -> OUT.partial -> OUT
    <|im_start|>user\n          until the turn ends      no repeats     a `BatchLog`
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domino_jax.base.errors import InputError, Scalars
from domino_jax.base.progress import Reporter
from domino_jax.config.run import SEED_LIMIT
from domino_jax.data.rendering import Rendering, render
from domino_jax.datagen.batch_log import BatchLog, log_of
from domino_jax.decoding.decoder import Decoder, Weights
from domino_jax.decoding.generate import Answer, check_prompt, generate
from domino_jax.decoding.speculate import required_cache_len

SHORTEST = 12  # characters; what is shorter asks for nothing
FRUITLESS = 8  # batches without a usable prompt that end the work


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """What prompts depend on; each line of them records it.

    A row depends on the batch that it is drawn in, so the size of a batch is one of them. With
    `language`, an ISO 639-1 code, prompts that are told to be in another one are left out.
    """

    target: str
    count: int
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    dtype: str
    batch_size: int
    language: str | None
    chat_template_kwargs: Scalars


@dataclass(frozen=True)
class UserTurn:
    """What comes before a user's words, int32 [n], and the first token after them."""

    opening: np.ndarray
    end: int


@dataclass(frozen=True)
class Drawn:
    """Rows `drawn` by this start, and how many were `left_out` for which reasons, formatted."""

    drawn: int
    left_out: str


def user_turn(tokenizer: Any, chat_template_kwargs: Scalars) -> UserTurn:
    """How a tokenizer's chat template opens and ends the first turn of a user.

    Args:
        tokenizer: a transformers fast tokenizer with a chat template.
        chat_template_kwargs: what the template is told besides the messages.
    Raises:
        InputError: the template does not show it.
    """
    words = "What is the time?"
    exchange = [{"role": "user", "content": words}]
    (text,) = render(tokenizer, [Rendering(exchange)], chat_template_kwargs)
    opening, found, closing = text.partition(words)
    # By the tokenizer's own split: a token that ends a turn is an added one.
    after = tokenizer(closing, add_special_tokens=False)["input_ids"]
    ends = [token for token in after if token in tokenizer.added_tokens_decoder]
    if not found or not opening or not ends:
        raise InputError(
            "the chat template does not show where a user's turn begins and ends; this target "
            "cannot write prompts"
        )
    ids = tokenizer(opening, add_special_tokens=False)["input_ids"]
    return UserTurn(np.array(ids, np.int32), ends[0])


def language_filter(language: str) -> Callable[[str], bool]:
    """Whether a text is not told to be in another language than the one of an ISO 639-1 code.

    What is in doubt, as code and formulas are, passes.

    Raises:
        InputError: the detector is not installed, or does not know the code.
    """
    try:
        import lingua
    except ImportError as error:
        raise InputError("--language needs lingua: pip install 'domino-jax[language]'") from error
    known = {one.iso_code_639_1.name.lower(): one for one in lingua.Language.all()}
    if language not in known:
        raise InputError(f"--language {language}: expected one of {', '.join(sorted(known))}")
    builder = lingua.LanguageDetectorBuilder.from_all_languages()
    detector = builder.with_minimum_relative_distance(0.25).build()
    return lambda text: detector.detect_language_of(text) in (None, known[language])


def write_prompts(
    path: Path,
    *,
    decoder: Decoder,
    weights: Weights,
    tokenizer: Any,
    settings: PromptSettings,
    reporter: Reporter,
) -> Drawn:
    """Writes prompts that the target draws itself.

    A second start resumes after the last whole batch and ends with the same file.

    Args:
        path: the JSONL to write, a header, then {"messages": [user's turn], "draw"} a line; a
            `BatchLog`, `.partial`, until it is complete.
        decoder: the plain target as it samples; `stop_ids` hold the end of a user's turn.
        weights: its parameters.
        tokenizer: its tokenizer.
        settings: how they are drawn.
        reporter: receives each batch.
    Raises:
        InputError: the place is taken or called packed, a partial file of another start does not
            fit, the target has no embedding for a token of the opening, or it writes no usable
            prompt.
        OSError: they cannot be written; those of earlier batches are kept.
    """
    partial = log_of(path)
    opening = user_turn(tokenizer, settings.chat_template_kwargs).opening
    check_prompt(decoder, opening, tokenizer, source="the opening of a user's turn")
    cache_len = required_cache_len(decoder, len(opening), settings.max_new_tokens)
    sieve = _Sieve(language_filter(settings.language) if settings.language else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn, fruitless = 0, 0
    kind, generator = "a prompt of `domino prompts`", asdict(settings)
    with BatchLog(partial, sieve.read, kind=kind, generator=generator) as log:
        written = len(log.finished)
        # A batch without a usable row leaves no trace: it is drawn again, to the same end.
        batch = max(log.finished, default=-1) // settings.batch_size + 1
        reporter.say(f"{written}/{settings.count} prompts are written; compiling")
        with reporter.bar("prompts", total=settings.count, done=written) as bar:
            while written < settings.count:
                rows = generate(
                    decoder,
                    weights,
                    [opening] * settings.batch_size,
                    max_new_tokens=settings.max_new_tokens,
                    cache_len=cache_len,
                    # By the number of a batch: those that are left keep their seeds.
                    seed=(settings.seed + batch) % SEED_LIMIT,
                )
                usable = sieve.usable(rows, tokenizer, first=batch * settings.batch_size)
                kept = usable[: settings.count - written]
                if kept:
                    log.add(kept)
                written += len(kept)
                drawn += settings.batch_size
                fruitless = 0 if kept else fruitless + 1
                left_out = sieve.counts()
                if fruitless == FRUITLESS:
                    raise InputError(
                        f"none of the last {FRUITLESS * settings.batch_size} rows is a usable "
                        f"prompt: {left_out}; try another --temperature, or more --max-new-tokens"
                    )
                bar.tell(written, f"kept of {drawn} drawn; left out: {left_out}")
                batch += 1
        log.publish(path)
    return Drawn(drawn, sieve.counts())


class _Sieve:
    """Lets prompts pass that ask for something and were not there before.

    Attributes:
        left_out: why others did not pass -> how many.
    """

    def __init__(self, in_language: Callable[[str], bool] | None) -> None:
        self.left_out: Counter[str] = Counter()
        self._in_language = in_language
        self._known: set[str] = set()

    def read(self, record: dict[str, Any]) -> tuple[int, bool] | None:
        """Takes note of a prompt that an earlier start kept; the number of its row."""
        try:
            text, number = record["messages"][0]["content"], record["draw"]
        except (KeyError, IndexError, TypeError):
            return None
        if not isinstance(text, str) or type(number) is not int:
            return None
        self._known.add(_essence(text))
        return number, True

    def counts(self) -> str:
        """The reasons with their counts, formatted."""
        return ", ".join(f"{count} {reason}" for reason, count in self.left_out.items()) or "none"

    def usable(self, rows: list[Answer], tokenizer: Any, *, first: int) -> list[dict[str, Any]]:
        """The records of a batch's usable rows; `first` is the number of its first row."""
        records = []
        for number, row in enumerate(rows, start=first):
            text = tokenizer.decode(row.tokens, skip_special_tokens=True).strip()
            reason = self._reason(row, text, tokenizer)
            if reason:
                self.left_out[reason] += 1
                continue
            self._known.add(_essence(text))
            records.append({"messages": [{"role": "user", "content": text}], "draw": number})
        return records

    def _reason(self, row: Answer, text: str, tokenizer: Any) -> str:
        """Why a row is no prompt; empty where it is one."""
        if not row.stopped:
            return "without an end"
        # Another role's header within the turn, for example.
        if any(int(token) in tokenizer.added_tokens_decoder for token in row.tokens[:-1]):
            return "with special tokens"
        if len(text) < SHORTEST or "\ufffd" in text:
            return "too short"
        if _essence(text) in self._known:
            return "repeated"
        if self._in_language is not None and not self._in_language(text):
            return "in another language"
        return ""


def _essence(text: str) -> str:
    """What two prompts share that differ in case, spaces and punctuation alone."""
    return re.sub(r"\W+", " ", text.casefold()).strip()
