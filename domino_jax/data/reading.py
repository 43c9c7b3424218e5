"""The usable conversations of a file one by one, and the report on its lines.

Training, `regenerate` and `evaluate` read conversations here, and print the same report. Counts and
the first lines are kept, never all lines, so a file of ten million bad lines takes no memory:

    answers.jsonl:3 and 7 more lines: message 2 (assistant) has no content
    answers.jsonl: key 'id' is not read, in 20 of 20 lines
    answers.jsonl: a message holds the text of a special token, in 2 of 20 lines, first '<|im_end|>'
    in line 5: it is tokenised as that token
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from domino_jax.base.errors import Scalars, shown
from domino_jax.data.forms import BadLine, BadLines, Conversation, iterate_conversations
from domino_jax.data.prefix_tokens import tokenize
from domino_jax.data.prompt import THINK_BEGIN, THINK_END, probe, reasoning_of, unused_keys

ALLOW, REFUSE = "allow", "refuse"  # of special tokens in text
UNUSED_KEYS = 100  # names that are counted alone


class Reading:
    """The conversations of a file, counted while they are read.

    Attributes:
        bad_lines: lines that are not usable; whoever reads may add to them.
        lines: how many lines were read, bad ones included.
        unused: key that nothing reads -> number of lines.
        special: number of usable lines with the text of a special token in a message.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Any,
        chat_template_kwargs: Scalars,
        *,
        special_tokens: str = ALLOW,
    ) -> None:
        """Reads nothing yet.

        Args:
            path: JSONL, see `data.forms`.
            tokenizer: a transformers fast tokenizer with a chat template.
            chat_template_kwargs: template arguments.
            special_tokens: "refuse": a line with the text of one in a message is not usable.
        """
        self._path, self._tokenizer = path, tokenizer
        self._kwargs, self._refuse = chat_template_kwargs, special_tokens == REFUSE
        self.bad_lines = BadLines()
        self.lines = self.special = 0
        self.unused: Counter[str] = Counter()
        self._first = ""  # of the lines with special tokens

    def conversations(self) -> Iterator[Conversation]:
        """The usable lines.

        Raises:
            InputError: the file cannot be read, or the template refuses a plain exchange.
        """
        pattern = special_text(self._tokenizer, self._kwargs)
        for found in iterate_conversations(self._path):
            self.lines += 1
            if isinstance(found, BadLine):
                self.bad_lines.add(found)
                continue
            special = _first_match(pattern, found)
            if special and self._refuse:
                reason = f"a message holds the text of the special token {shown(special)}"
                self.bad_lines.add(BadLine(found.line, reason))
                continue
            self.special += bool(special)
            if special and not self._first:
                self._first = f"{shown(special)} in line {found.line}"
            for name in unused_keys(found, self._tokenizer.chat_template):
                alone = name in self.unused or len(self.unused) < UNUSED_KEYS
                self.unused[name if alone else "another key"] += 1
            yield found

    def report(self) -> Iterator[str]:
        """What there is to say of the usable lines that were read."""
        for name, count in sorted(self.unused.items()):
            yield f"{self._path}: {name} is not read, in {count} of {self.lines} lines"
        if self.special:
            yield (
                f"{self._path}: a message holds the text of a special token, in {self.special} of "
                f"{self.lines} lines, first {self._first}: it is tokenised as that token"
            )


def special_text(tokenizer: Any, chat_template_kwargs: Scalars) -> re.Pattern[str]:
    """Matches the text of special tokens, and of other added tokens that mark a turn.

    Raises:
        InputError: the template refuses a plain exchange.
    """
    added = tokenizer.added_tokens_decoder
    text, _, _ = probe(tokenizer, chat_template_kwargs)
    marks = {int(id) for id in tokenize(text, tokenizer)}
    # Reasoning is no turn, and an added word is none either.
    plain = {THINK_BEGIN, THINK_END}
    texts = {
        token.content
        for id, token in added.items()
        if token.special
        or (id in marks and token.content not in plain and not token.content[:1].isalnum())
    }
    visible = list(filter(str.strip, texts))
    # Without any token: what matches nothing.
    return re.compile(_alternatives(visible) if visible else r"(?!)")


def _alternatives(texts: Sequence[str], *, levels: int = 32) -> str:
    """A regular expression of several texts, a longer one before its own beginning.

    Texts that begin alike share their beginning, for so many levels. Thousands of alternatives, as
    Gemma has, would be tried one by one at every `<` of a text.
    """
    least, most = min(texts), max(texts)
    differing = (at for at, (a, b) in enumerate(zip(least, most, strict=False)) if a != b)
    shared = least[: next(differing, len(least))]
    tails: dict[str, list[str]] = {}
    for text in texts:
        tail = text[len(shared) :]
        tails.setdefault(tail[:1], []).append(tail)
    if levels == 0 or len(tails) < 2:
        return "|".join(map(re.escape, sorted(texts, reverse=True)))
    # In this order the end of a text comes last.
    parts = [_alternatives(tails[first], levels=levels - 1) for first in sorted(tails)[::-1]]
    return f"{re.escape(shared)}(?:{'|'.join(parts)})"


def _first_match(pattern: re.Pattern[str], conversation: Conversation) -> str:
    """The first special token in the text of a conversation; empty where there is none."""
    for message in conversation.messages:
        # Recorded ids are those that the target generated, tool calls with their tokens included.
        if message["role"] == "assistant" and conversation.input_ids is not None:
            continue
        for text in _texts([message["content"], reasoning_of(message), message.get("tool_calls")]):
            found = pattern.search(text)
            if found:
                return found[0]
    return ""


def _texts(value: Any) -> Iterator[str]:
    """All text inside of a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from chain.from_iterable(map(_texts, value))
    elif isinstance(value, dict):
        yield from chain.from_iterable(map(_texts, chain.from_iterable(value.items())))
