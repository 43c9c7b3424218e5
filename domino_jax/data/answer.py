"""Text of an answer as the target wrote it behind its prompt.

A finished conversation as its template renders it need not hold the answer as it was written: the
template may insert empty reasoning, trim, or move reasoning. So plain content is taken as it is,
and the template's rendering only where it shows all parts of an answer:

    content                     as it is                              It is 4.
    reasoning, tool calls       rendered, where every part shows      <think>\\nAdd.\\n</think> ...
    contradicts its prompt      refused, with the reason
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from domino_jax.base.errors import InputError, Scalars, require, shown
from domino_jax.data.prompt import (
    QUESTION,
    THINK_BEGIN,
    THINK_END,
    Prompt,
    probe,
    reasoning_of,
    spellings,
    stop_token_ids,
    turn_end,
)
from domino_jax.data.rendering import CostlyTemplate, Rendering, render

_EMPTY = re.compile(rf"\A\s*{THINK_BEGIN}\s*{THINK_END}\n*")
# A generation prompt that opens reasoning, or closes it at once (Qwen3 without thinking).
_OPENING = re.compile(rf"{THINK_BEGIN}\s*({THINK_END}\s*)?\Z")


class AnswerFormat:
    """Answers under one chat template and its arguments.

    Attributes:
        stop_ids: ids that end an answer.
        end: the id that ends a turn in the template's rendering; the eos where it prints none.
    """

    def __init__(
        self, tokenizer: Any, chat_template_kwargs: Scalars, *, end_ids: Sequence[int]
    ) -> None:
        """Probes the template for what surrounds an answer.

        Args:
            tokenizer: a transformers fast tokenizer with a chat template.
            chat_template_kwargs: template arguments.
            end_ids: end tokens of the target, see `stop_token_ids`.
        Raises:
            InputError: as `stop_token_ids`, or the template ignores add_generation_prompt although
                it prints something before an answer.
        """
        self._tokenizer, self._kwargs = tokenizer, chat_template_kwargs
        self.stop_ids = stop_token_ids(tokenizer, chat_template_kwargs, end_ids=end_ids)
        end = turn_end(tokenizer, chat_template_kwargs, end_ids=end_ids)
        self.end = self.stop_ids[0] if end is None else end
        self._ends_turns = end is not None
        text, begin, _ = probe(tokenizer, chat_template_kwargs)
        asked = [Rendering([QUESTION], generation_prompt=True), Rendering([QUESTION])]
        prompt, without = render(tokenizer, asked, chat_template_kwargs)
        before = _behind(text[:begin], prompt)
        opening = _OPENING.search(prompt)
        # Empty reasoning, which Qwen3's templates insert; the prompt may open it already.
        if opening is not None and _EMPTY.fullmatch(opening[0] + before):
            before = ""
        inserted = _EMPTY.sub("", before).strip()
        if prompt == without and inserted:
            raise InputError(
                "the chat template ignores add_generation_prompt, which marks where an answer "
                "begins"
            )
        self._space = "" if before.strip() else before
        self._inserted = before if inserted else ""

    def written(self, prompt: Prompt, message: dict[str, Any], *, finished: bool) -> str:
        """The text that the target generated for an answer, with its end of turn where rendered.

        Args:
            prompt: of the answer.
            message: the answer.
            finished: False: the answer was cut at a token limit.
        Raises:
            InputError: the target cannot have written the answer there, or the template does not
                show all of it.
        """
        require("function_call" not in message, "function_call is not read; give tool_calls")
        opening = _OPENING.search(prompt.text)
        opened = opening is not None and opening[1] is None
        content = message["content"]
        reasoning = reasoning_of(message)
        if reasoning:
            twice = any(tag in reasoning for tag in (THINK_BEGIN, THINK_END)) or _starts(content)
            require(not twice, "the answer has reasoning under a key and reasoning tags as well")
        elif opened and finished and THINK_END not in content:
            raise InputError("the generation prompt opens reasoning, the answer never ends it")
        if opening is not None and not opened:
            content = content.removeprefix(opening[0])
            again = reasoning or _starts(content)
            require(not again, "the generation prompt closes reasoning, the answer opens it")
        if reasoning or "tool_calls" in message:
            return self._rendered(prompt, message, finished=finished)
        return self._plain(content, opening)

    def _plain(self, content: str, opening: re.Match[str] | None) -> str:
        """Content as it continues its prompt."""
        require(
            not self._inserted,
            f"the chat template puts {shown(self._inserted)} between the generation prompt and an "
            "answer; whether the target writes it cannot be known from text",
        )
        if opening is not None:
            return _without_opening(content, opening[0])
        return content if content[:1].isspace() else self._space + content

    def _rendered(self, prompt: Prompt, message: dict[str, Any], *, finished: bool) -> str:
        """The template's rendering of an answer with reasoning or tool calls."""
        reasoning, content = reasoning_of(message), message["content"]
        # Arguments as text come first: a template that shows them shows what was written.
        for spelled in reversed(list(spellings([message]))):
            try:
                text = prompt.continued(spelled)
            except CostlyTemplate:
                raise
            except InputError:  # this spelling alone, perhaps
                continue
            calls = spelled[0].get("tool_calls", [])
            written = _behind(text, prompt.text)
            if not reasoning and not _starts(content):
                written = _EMPTY.sub("", written)
            end = _end_of_parts(written, reasoning, content, calls)
            if end >= 0:
                return self._until_stop(written, end) if finished else written[:end]
        if reasoning and "tool_calls" not in message and _opens(prompt.text):
            closing = f"\n{THINK_END}\n\n{content}" if content or finished else ""
            return reasoning.strip("\n") + closing
        what = "reasoning" if reasoning else "tool calls"
        raise InputError(f"the chat template does not show the {what} of the answer as given")

    def _until_stop(self, written: str, end: int) -> str:
        """A rendered answer, whose parts end at a character, up to its end of turn."""
        # An id of the embedding's padding has no text.
        texts = filter(None, self._tokenizer.convert_ids_to_tokens(list(self.stop_ids)))
        found = [(written.find(text, end), text) for text in texts if text in written[end:]]
        if not found:
            require(not self._ends_turns, "the chat template shows no end of turn after the answer")
            return written
        begin, text = min(found)
        return written[: begin + len(text)]


def _opens(prompt: str) -> bool:
    """Whether a generation prompt opens reasoning."""
    return prompt.rstrip().endswith(THINK_BEGIN)


def _behind(text: str, prompt: str) -> str:
    """Rendered text behind a prompt; empty where it is no continuation.

    A template need not repeat the reasoning tag that its generation prompt ends with.
    """
    if text.startswith(prompt):
        return text[len(prompt) :]
    opening = _OPENING.search(prompt)
    if opening is None or not text.startswith(prompt[: opening.start()]):
        return ""
    return _without_opening(text[opening.start() :], opening[0])


def _without_opening(content: str, opening: str) -> str:
    """Text without the reasoning tag that its generation prompt ends with already."""
    if content.startswith(opening):
        return content.removeprefix(opening)
    return content.lstrip().removeprefix(THINK_BEGIN) if _starts(content) else content


def _starts(content: str) -> bool:
    return content.lstrip().startswith(THINK_BEGIN)


def _end_of_parts(
    written: str, reasoning: str, content: str, calls: Sequence[Mapping[str, Any]]
) -> int:
    """The character behind the last part of a rendered answer, -1 where one is not in it.

    The names and the arguments of tool calls may have any order.
    """
    at = 0
    if reasoning:
        # Behind its tag, which may hold the same word.
        at = _end_of(written, reasoning, len(THINK_BEGIN) if written.startswith(THINK_BEGIN) else 0)
    at = _end_of(written, content, at) if at >= 0 else -1
    if at < 0:
        return -1
    for call in calls:
        function = call.get("function", call)
        arguments = function.get("arguments")
        # Quoted, the call has text where the target writes an object.
        if isinstance(arguments, str) and json.dumps(arguments, ensure_ascii=False) in written:
            return -1
        for words in (function["name"], *_leaves(arguments)):
            end = _end_of(written, words, 0)
            if end < 0:
                return -1
            at = max(at, end)
    return at


def _end_of(text: str, part: str, at: int) -> int:
    """The character behind a part of text, as it is or escaped as JSON; -1 where it is absent."""
    words = part.strip()
    for spelled in (words, json.dumps(words, ensure_ascii=False)[1:-1]):
        begin = text.find(spelled, at)
        if begin >= 0:
            return begin + len(spelled)
    return -1


def _leaves(value: Any) -> Iterator[str]:
    """The text and the numbers inside the arguments of a tool call."""
    if isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(_leaves, value.values()))
    elif isinstance(value, list):
        yield from itertools.chain.from_iterable(map(_leaves, value))
    elif value is not None:
        yield value if isinstance(value, str) else json.dumps(value)
