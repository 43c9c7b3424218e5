"""The chat template of a run: its text and its arguments, recorded and compared.

A drafter learns conversations as one template renders them under one setting, for example with
`enable_thinking: false`. Rendered otherwise they are other tokens: acceptance falls and nothing
fails. So whatever depends on a rendering (answers, captured states, checkpoints, exports, figures)
records the setting, and `ChatTemplate` and `settings_text` compare them.

Some templates (Llama 3.1 and later) print the current date. It is one of the settings, so that a
run renders the same text on every day:

    dated             fills it in: the recorded date, or today's at the first start
    recorded_date     reads it from a file of answers or prompts
"""

import datetime
import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from domino_jax.base.errors import InputError, Scalars, did_you_mean, require, shown
from domino_jax.base.files import read_lines
from domino_jax.base.parse import parse_json
from domino_jax.data.rendering import names_read

# Their names in every file.
KWARGS, GENERATOR = "chat_template_kwargs", "generator"
NO_KWARGS: Scalars = MappingProxyType({})
# The setting with the date, an ISO date, under the name of the function that templates call.
DATE = "strftime_now"


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """`sha256` of a template's text, in hex, and the template's `kwargs`."""

    sha256: str
    kwargs: Scalars

    # By the settings as text, see `settings_text`: the fields compare 0 and false as equal.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChatTemplate):
            return False
        return settings_text(self.as_json()) == settings_text(other.as_json())

    def __str__(self) -> str:
        return f"sha256 {self.sha256[:12]} with {KWARGS} {settings_text(self.kwargs)}"

    def as_json(self) -> dict[str, Any]:
        """As checkpoints and evaluations record it."""
        return {"chat_template": self.sha256, KWARGS: dict(self.kwargs)}

    def check_trained(self, trained: "ChatTemplate", *, source: str, target: str) -> None:
        """Raises `InputError` for a draft that was trained with another text or other kwargs.

        Args:
            trained: the template of the draft.
            source: the draft, for the message.
            target: whose template this is, for the message.
        """
        # The text first: settings mean nothing beside another template.
        if self.sha256 != trained.sha256:
            raise InputError(
                f"{source}: the chat template of {target} is not the one the draft was trained with"
            )
        if self != trained:
            raise InputError(
                f"{source}: trained with {KWARGS} {settings_text(trained.kwargs)}, asked for are "
                f"{settings_text(self.kwargs)}; leave them out to take the draft's own"
            )


def chat_template(tokenizer: Any, kwargs: Scalars) -> ChatTemplate:
    """The template of a tokenizer with its `kwargs`."""
    digest = hashlib.sha256(tokenizer.chat_template.encode())
    return ChatTemplate(digest.hexdigest(), kwargs)


HASHES = {"vocabulary", "chat_template"}


def tokenizer_record(tokenizer: Any) -> dict[str, str]:
    """sha256, in hex, of what gives token ids their meaning: the vocabulary and the chat template.

    By content: tokenizers of another version may write the same vocabulary into another file.
    """
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    texts = {"vocabulary": vocabulary, "chat_template": tokenizer.chat_template}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def settings_text(settings: Any) -> str:
    """Settings as JSON: the one rule for what is the same setting, and how it is shown.

    Equal for equal ones, and as the command line takes them. In Python 0 and false are equal; to a
    template they are two things:

    >>> settings_text({"enable_thinking": False}) == settings_text({"enable_thinking": 0})
    False
    """
    plain = dict(settings) if isinstance(settings, Mapping) else settings
    return json.dumps(plain, sort_keys=True, ensure_ascii=False)


def dated(tokenizer: Any, kwargs: Scalars, *recorded: Scalars | Path) -> Scalars:
    """The kwargs of a chat template, with a date where the template prints one.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        kwargs: the settings given by the user.
        recorded: settings of earlier starts and of inputs, or files that record them, in
            the order of their precedence.
    Returns:
        `kwargs` as they are for a template without a date. Otherwise with their own date, the first
        recorded one, or today's.
    Raises:
        InputError: the template cannot be read, see `names_read`.
    """
    # The text first: most templates print no date, and `names_read` starts a process.
    if DATE not in tokenizer.get_chat_template() or DATE not in names_read(tokenizer):
        return kwargs
    # In turn: the record of a file may lie behind gigabytes of lines.
    for source in (kwargs, *recorded):
        found = recorded_date(source) if isinstance(source, Path) else source
        if DATE in found:
            return with_date(kwargs, found)
    return {**kwargs, DATE: today()}


def with_date(kwargs: Scalars, *sources: Scalars) -> Scalars:
    """`kwargs` with the date of the first source that has one.

    >>> with_date({"enable_thinking": False}, {}, {"strftime_now": "2026-12-01"})
    {'enable_thinking': False, 'strftime_now': '2026-12-01'}
    """
    dates = [source[DATE] for source in sources if DATE in source]
    return {**kwargs, DATE: dates[0]} if dates else kwargs


def today() -> str:
    """The local date, an ISO date."""
    return datetime.date.today().isoformat()


def recorded_date(path: Path) -> Scalars:
    """The first template kwargs with a date in a file of answers or prompts, not checked.

    A header or an answer has them under the key "generator".

    Args:
        path: JSONL or JSONL.gz of any writer; it may be missing.
    Returns:
        The kwargs; none for a file without such a record.
    Raises:
        InputError: the file cannot be read.
    """
    if path.is_file():
        for _, line in read_lines(path):
            found = _generator_kwargs(line) if GENERATOR.encode() in line else NO_KWARGS
            if DATE in found:
                return found
    return NO_KWARGS


def _generator_kwargs(line: bytes) -> Scalars:
    """The template kwargs of the generator in a line of a file."""
    found: Any
    try:
        found = parse_json(line, source=None, nonfinite=True)
    except InputError:  # reported by the reader of the whole file
        return NO_KWARGS
    for name in (GENERATOR, KWARGS):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else NO_KWARGS


def check_kwargs(tokenizer: Any, kwargs: Scalars) -> None:
    """Refuses names that a tokenizer's chat template never reads, and a date that is not one.

    A misspelt switch would do nothing.

    Raises:
        InputError: each such name, with the nearest one that is read, or all of them; or the date.
    """
    # Nothing to look up, so the process that renders need not be started.
    if not kwargs:
        return
    # transformers fills these, the special tokens and what its own arguments are called.
    filled = {"messages", "raise_exception", *tokenizer.special_tokens_map}
    filled |= set(inspect.signature(tokenizer.apply_chat_template).parameters)
    read = names_read(tokenizer) - filled
    for name in kwargs:
        if name not in read:
            settings = f"it reads {', '.join(sorted(read))}" if read else "it reads no setting"
            remedy = did_you_mean(name, read) or settings
            raise InputError(f"{KWARGS}: the chat template does not read {name!r}; {remedy}")
    date = kwargs.get(DATE)
    require(
        date is None or _is_iso_date(date),
        f"{KWARGS}: {DATE} is {shown(date)}, expected a date as YYYY-MM-DD, for example 2026-12-01",
    )


def _is_iso_date(value: Any) -> bool:
    try:
        return datetime.date.fromisoformat(value).isoformat() == value
    except (TypeError, ValueError):
        return False
