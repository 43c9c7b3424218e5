"""Marked text of conversations, expected by hand, for test templates with published behaviours.

`MARKED` holds the text that is marked for each answer of each conversation; `MARKED_BY` holds the
differences of a template. The tokens before each marked run are compared with those of the prompt
that transformers renders, without the encoder.
"""

import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from chat_templates import (
    BEHAVIOURS,
    DATE,
    PUBLISHED,
    TOOL,
    Published,
    behaviours,
    covered,
    rendered,
)
from chats import write

from domino_jax.base.errors import InputError
from domino_jax.data.conversations import RowSet, load_rows

END = "¶"  # the template's own end of turn


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def call(arguments: Any, *, name: str = "weather", **keys: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "arguments": arguments}, **keys}]


def think(reasoning: str, content: str) -> str:
    return f"<think>\n{reasoning}\n</think>\n\n{content}"


def result(identity: str) -> dict[str, Any]:
    return {"role": "tool", "content": "sunny", "tool_call_id": identity}


CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
SUM, OSLO, DEVELOPER = user("2 + 2?"), {"city": "Oslo"}, {"role": "developer"}
STOP = "Write <|im_end|> then stop."
CASES: dict[str, dict[str, Any]] = {
    "plain": {"messages": [user("What is 2 + 2?"), answer("It is 4.")]},
    "system": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            *[SUM, answer("It is 4."), user("And 3?"), answer("It is 7.")],
        ]
    },
    "outer_whitespace": {"messages": [SUM, answer("\n It is 4. \n")]},
    "end_in_content": {"messages": [SUM, answer(f"Write {END} then stop.")]},
    "cut_thinking": {
        "messages": [SUM, answer("<think>\nOkay, the user asks for a sum. It is")],
        "finished": False,
    },
    "cut_thinking_open": {
        "messages": [SUM, answer("Okay, the user asks for a sum. It is")],
        "finished": False,
    },
    "loss_weight": {
        "messages": [SUM, answer("It is 5.", weight=0), user("Sure?"), answer("It is 4.", weight=1)]
    },
    "multi_prompts": {"messages": [SUM, answer("SOMEBODY ELSE wrote this."), user("And 3?")]},
    "multi_think": {
        "messages": [
            *[SUM, answer(think("Add them.", "It is 4."))],
            *[user("And 3?"), answer(think("Seven.", "It is 7."))],
        ]
    },
    "think_spaces": {"messages": [SUM, answer("<think>\n\nAdd.\n\n</think>\nIt is 4.")]},
    "developer": {"messages": [{**DEVELOPER, "content": "Be brief."}, SUM, answer("4.")]},
    "system_late": {
        "messages": [
            *[SUM, answer("It is 4."), {"role": "system", "content": "Be brief."}],
            *[user("3?"), answer("3.")],
        ]
    },
    "parts": {
        "messages": [
            user([{"type": "text", "text": "2 + 2?"}]),
            answer([{"type": "text", "text": "4."}]),
        ]
    },
    "two_answers": {"messages": [SUM, answer("It is 4."), answer("And 3 is 7.")]},
    "reasoning_content": {"messages": [SUM, answer("It is 4.", reasoning_content="Add them.")]},
    "reasoning_key": {"messages": [SUM, answer("It is 4.", reasoning="Add them.")]},
    "stop_in_reasoning": {"messages": [SUM, answer("It is 4.", reasoning=STOP)]},
    "stop_in_reasoning_content": {"messages": [SUM, answer("It is 4.", reasoning_content=STOP)]},
    "stop_in_arguments": {
        "messages": [SUM, answer("I call.", tool_calls=call({"x": "<|im_end|> more"}, name="f"))]
    },
    "tools_declined": {"messages": [user("Say hello."), answer("hello world")], "tools": TOOLS},
    "tool_call": {
        "messages": [
            *[user("Weather in Oslo?"), answer("", tool_calls=call(OSLO, id="abcdefghi"))],
            *[result("abcdefghi"), answer("It is sunny.")],
        ],
        "tools": [TOOL],
    },
    "tool_call_null": {
        "messages": [user("Weather in Oslo?"), answer(None, tool_calls=call(OSLO, id="c1"))]
    },
    "tool_call_with_words": {
        "messages": [
            user("Weather in Oslo?"),
            answer("The time is now.", tool_calls=call(OSLO, id="c1")),
        ],
        "tools": [TOOL],
    },
    "tool_calls": {
        "messages": [
            user("Weather in Oslo?"),
            answer("", tool_calls=call(json.dumps(OSLO), id="c1")),
            *[result("c1"), answer("It is sunny.")],
        ],
        "tools": TOOLS,
    },
    "reasoning_turns": {
        "messages": [
            *[SUM, answer("It is 4.", reasoning_content="Add them.")],
            *[user("And 3?"), answer("It is 7.", reasoning_content="Seven.")],
        ]
    },
    "reasoning_cut": {
        "messages": [SUM, answer("", reasoning_content="Okay, the user asks")],
        "finished": False,
    },
    "reasoning_and_call": {
        "messages": [
            user("Weather in Oslo?"),
            answer("", reasoning_content="Look it up.", tool_calls=call(OSLO, id="abcdefghi")),
        ],
        "tools": [TOOL],
    },
    "two_calls": {
        "messages": [
            user("Weather in Oslo and Rome?"),
            answer(
                "",
                tool_calls=[*call(OSLO, id="abcdefghi"), *call({"city": "Rome"}, id="abcdefghj")],
            ),
        ],
        "tools": [TOOL],
    },
    "null_keys": {
        "messages": [SUM, answer("It is 4.", reasoning_content=None, refusal=None, tool_calls=[])]
    },
    "empty_reasoning": {"messages": [SUM, answer("It is 4.", reasoning_content="")]},
    "ends_with_end": {"messages": [SUM, answer(f"It is 4.{END}")]},
}
# Template arguments of one line, for the templates that read them.
REASONING_OFF = {**CASES["plain"], "chat_template_kwargs": {"enable_thinking": False}}

# Per case the marked text of each answer; None: not trained.
Marked = dict[str, list[str | None]]
NO, BOTH_NO = [None], [None, None]
MARKED: Marked = {
    "plain": ["It is 4.¶"],
    "system": ["It is 4.¶", "It is 7.¶"],
    "outer_whitespace": ["\n It is 4. \n¶"],
    "end_in_content": NO,
    "cut_thinking": ["<think>\nOkay, the user asks for a sum. It is"],
    "cut_thinking_open": ["Okay, the user asks for a sum. It is"],
    "loss_weight": [None, "It is 4.¶"],
    "multi_prompts": ["SOMEBODY ELSE wrote this.¶"],
    "multi_think": [
        "<think>\nAdd them.\n</think>\n\nIt is 4.¶",
        "<think>\nSeven.\n</think>\n\nIt is 7.¶",
    ],
    "think_spaces": ["<think>\n\nAdd.\n\n</think>\nIt is 4.¶"],
    "developer": ["4.¶"],
    "system_late": ["It is 4.¶", "3.¶"],
    "parts": ["4.¶"],
    "two_answers": ["It is 4.¶", "And 3 is 7.¶"],
    # The template shows no reasoning, and the answer followed it.
    "reasoning_content": NO,
    "reasoning_key": NO,
    "stop_in_reasoning": NO,
    "stop_in_reasoning_content": NO,
    "stop_in_arguments": NO,
    "tools_declined": ["hello world¶"],
    "tool_call": [None, "It is sunny.¶"],
    "tool_call_null": NO,
    "tool_call_with_words": NO,
    "tool_calls": [None, "It is sunny.¶"],
    "reasoning_turns": BOTH_NO,
    "reasoning_cut": NO,
    "reasoning_and_call": NO,
    "two_calls": NO,
    "null_keys": ["It is 4.¶"],
    "empty_reasoning": ["It is 4.¶"],
    "ends_with_end": ["It is 4.¶"],
}
TOOL_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>¶'
QWEN_CALLS: Marked = {
    "tool_call": [TOOL_CALL, "It is sunny.¶"],
    "tool_call_null": [TOOL_CALL],
    "tool_call_with_words": [f"The time is now.\n{TOOL_CALL}"],
    "tool_calls": [TOOL_CALL, "It is sunny.¶"],
    "two_calls": [f"{TOOL_CALL[:-1]}\n{TOOL_CALL.replace('Oslo', 'Rome')}"],
}
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Oslo"}}¶'
LLAMA: Marked = {
    "tool_call": [LLAMA_CALL, "It is sunny.¶"],
    "tool_call_null": [LLAMA_CALL],
    "tool_calls": [LLAMA_CALL, "It is sunny.¶"],
}
# A role that the template leaves out or refuses: no prompt holds these messages.
NO_TOOL_ROLE: Marked = {"tool_call": BOTH_NO, "tool_calls": BOTH_NO}
LATE_SYSTEM: Marked = {"system_late": ["It is 4.¶", None]}
FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>"
GPT_OSS_CALL = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'


# The prompt opens the reasoning: an answer that never closes it was not written there, unless cut.
OPENED: Marked = {
    **dict.fromkeys(("plain", "outer_whitespace", "multi_prompts", "developer", "parts"), NO),
    **dict.fromkeys(("tools_declined", "null_keys", "empty_reasoning", "ends_with_end"), NO),
    **dict.fromkeys(("system", "loss_weight", "system_late", "two_answers"), BOTH_NO),
    "cut_thinking": ["Okay, the user asks for a sum. It is"],
    "multi_think": ["Add them.\n</think>\n\nIt is 4.¶", "Seven.\n</think>\n\nIt is 7.¶"],
    "think_spaces": ["\nAdd.\n\n</think>\nIt is 4.¶"],
    "reasoning_content": ["Add them.\n</think>\n\nIt is 4.¶"],
    "reasoning_key": ["Add them.\n</think>\n\nIt is 4.¶"],
    "reasoning_turns": ["Add them.\n</think>\n\nIt is 4.¶", "Seven.\n</think>\n\nIt is 7.¶"],
    "reasoning_cut": ["Okay, the user asks"],
}


def after_analysis(reasoning: str, text: str = "It is 4.") -> list[str | None]:
    return [f"{ANALYSIS}{reasoning}<|end|><|start|>assistant{FINAL}{text}¶"]


def spaced(marked: Marked) -> Marked:
    return {
        case: [text if text is None else f" {text}" for text in texts]
        for case, texts in marked.items()
    }


MARKED_BY: dict[str, Marked] = {
    "SmolLM2": {},
    "Qwen2.5": QWEN_CALLS,
    "Qwen3": {
        **QWEN_CALLS,
        "reasoning_content": ["<think>\nAdd them.\n</think>\n\nIt is 4.¶"],
        "reasoning_key": ["<think>\nAdd them.\n</think>\n\nIt is 4.¶"],
        "reasoning_turns": MARKED["multi_think"],
        "reasoning_cut": ["<think>\nOkay, the user asks"],
        "reasoning_and_call": [f"<think>\nLook it up.\n</think>\n\n{TOOL_CALL}"],
    },
    "Qwen3-Thinking-2507": {
        **OPENED,
        **dict.fromkeys(("tool_call", "tool_calls"), BOTH_NO),
        "reasoning_and_call": [f"Look it up.\n</think>\n\n{TOOL_CALL}"],
    },
    "DeepSeek-R1-Distill": {
        **OPENED,
        # Here <|im_end|> is text as any other.
        "stop_in_reasoning": [f"{STOP}\n</think>\n\nIt is 4.¶"],
        "stop_in_reasoning_content": [f"{STOP}\n</think>\n\nIt is 4.¶"],
    },
    "Llama 3.1": LLAMA,
    "Llama 3.2": LLAMA,
    "Gemma 3": NO_TOOL_ROLE | LATE_SYSTEM,
    "Mistral 7B v0.3": {
        **spaced(MARKED | LATE_SYSTEM),
        # Whitespace of the text is whitespace that was written, here instead of the template's.
        "outer_whitespace": MARKED["outer_whitespace"],
        # Nothing is generated after an end of turn, and no generation prompt follows this one.
        "two_answers": [" It is 4.¶", None],
        "tool_call": [
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "abcdefghi"}]¶',
            " It is sunny.¶",
        ],
        "tool_calls": BOTH_NO,  # it refuses short ids of calls
    },
    "SmolLM3": LATE_SYSTEM,
    "Phi-4": NO_TOOL_ROLE,
    # Plain text lacks the channel of the answer; renderings with reasoning or calls show it.
    "gpt-oss": {
        **{case: [None] * len(texts) for case, texts in MARKED.items()},
        "reasoning_content": after_analysis("Add them."),
        "reasoning_key": after_analysis("Add them."),
        "stop_in_reasoning": after_analysis(STOP),
        "stop_in_reasoning_content": after_analysis(STOP),
        "reasoning_turns": [*after_analysis("Add them."), *after_analysis("Seven.", "It is 7.")],
        "reasoning_cut": [f"{ANALYSIS}Okay, the user asks"],
        "tool_call": [GPT_OSS_CALL, None],
        "tool_call_null": [GPT_OSS_CALL],
        "tool_calls": [GPT_OSS_CALL, None],
    },
}
# Templates that show the role developer; the others get its message as system.
SHOWS_DEVELOPER = ("SmolLM2", "Llama 3.1", "Llama 3.2", "gpt-oss")


def with_end(found: Any, end: str) -> Any:
    """Lines or expectations with the end of turn of a template."""
    return json.loads(json.dumps(found, ensure_ascii=False).replace(END, end))


def expected(name: str) -> Marked:
    return with_end({**MARKED, **MARKED_BY[name]}, PUBLISHED[name].end)


def prompt_ids(name: str, tokenizer: Any, line: dict[str, Any], before: int) -> list[int] | None:
    """The ids that the target would be given before a message, through transformers alone."""
    messages = json.loads(json.dumps(line["messages"][:before]))
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = "".join(part["text"] for part in message["content"])
        if message["role"] == "developer" and name not in SHOWS_DEVELOPER:
            message["role"] = "system"
        for found in message.get("tool_calls", ()):
            arguments = found["function"]["arguments"]
            if isinstance(arguments, str):
                found["function"]["arguments"] = json.loads(arguments)
    kwargs = {key: value for key, value in line.items() if key == "tools"}
    kwargs |= line.get("chat_template_kwargs", {})
    try:
        text = rendered(tokenizer, messages, prompt=True, **kwargs)
    except jinja2.TemplateError:  # no target could have been given this
        return None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def loaded(published: Published, tokenizer: Any, path: Path, *lines: Any) -> RowSet:
    kwargs = {"strftime_now": DATE} if published.prints_date else {}
    return load_rows(
        write(path, *lines),
        tokenizer,
        max_length=1000,
        chat_template_kwargs=kwargs,
        end_ids=tokenizer.convert_tokens_to_ids([published.end, *published.ends]),
    )


def marked_texts(
    name: str, tokenizer: Any, line: dict[str, Any], rows: list[Any]
) -> list[str | None]:
    """The marked text after each prompt of a line; fails for a run after any other text."""
    answers = [at for at, m in enumerate(line["messages"]) if m["role"] == "assistant"]
    found: dict[int, str] = {}
    prompts: dict[int, list[int] | None] = {}
    for row in rows:
        edges = np.flatnonzero(np.diff(np.pad(row.loss_mask.astype(int), 1)))
        for begin, end in edges.reshape(-1, 2):
            before = row.input_ids[:begin].tolist()
            if not prompts:
                prompts = {at: prompt_ids(name, tokenizer, line, at) for at in answers}
            matching = [at for at, ids in prompts.items() if ids == before]
            text = tokenizer.decode(row.input_ids[begin:end])
            assert matching, f"{text!r} is trained after {tokenizer.decode(before)!r}"
            assert matching[0] not in found, f"{text!r} is trained twice"
            found[matching[0]] = text
    return [found.get(at) for at in answers]


@pytest.fixture(scope="module", params=PUBLISHED)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, list[str | None] | str]]:
    """A template, and the marked texts of every case, or the error of its rows."""
    name = request.param
    published = PUBLISHED[name]
    tokenizer = published.tokenizer()
    lines = with_end([*CASES.values()], published.end)
    path = tmp_path_factory.mktemp("cases") / "lines.jsonl"
    rows = loaded(published, tokenizer, path, *lines).rows
    found: dict[str, list[str | None] | str] = {}
    for number, (case, line) in enumerate(zip(CASES, lines, strict=True), start=1):
        try:
            of_line = [row for row in rows if row.line == number]
            found[case] = marked_texts(name, tokenizer, line, of_line)
        except AssertionError as error:
            found[case] = str(error)
    return name, found


@pytest.mark.pitfall(
    "text rendered and tokenised again: the row differs from what was generated",
    seen="data/conversations.py: an answer as the template renders it, trimmed or moved",
)
@pytest.mark.pitfall(
    "tools, weight or other keys of a line ignored",
    seen="data/conversations.py: weight 0 trained; tools not rendered",
)
@pytest.mark.parametrize("case", CASES)
def test_marked_text(case: str, trained: Any) -> None:
    name, found = trained
    assert found[case] == expected(name)[case]


@pytest.mark.parametrize(
    "name", [name for name, x in PUBLISHED.items() if "switches reasoning off" in x.behaviours]
)
def test_a_line_may_have_template_arguments_of_its_own(name: str, tmp_path: Path) -> None:
    published = PUBLISHED[name]
    tokenizer = published.tokenizer()
    lines = [REASONING_OFF, CASES["plain"]]
    rows = loaded(published, tokenizer, tmp_path / "a.jsonl", *lines).rows
    for line, row in zip(lines, rows, strict=True):
        assert marked_texts(name, tokenizer, line, [row]) == [f"It is 4.{published.end}"]


def test_an_answer_may_end_with_another_end_token(tmp_path: Path) -> None:
    published = PUBLISHED["Llama 3.1"]
    tokenizer = published.tokenizer()
    code = "<|python_tag|>print(1)<|eom_id|>"
    line = {"messages": [user("Print 1."), answer(code)]}
    (row,) = loaded(published, tokenizer, tmp_path / "a.jsonl", line).rows
    assert marked_texts("Llama 3.1", tokenizer, line, [row]) == [code]


UNUSABLE = {
    "alpaca": ({"instruction": "2 + 2?", "input": "", "output": "4."}, "instruction"),
    "sharegpt": (
        {"id": "a1_0", "conversations": [{"from": "human", "value": "What is 2 + 2?"}]},
        "conversations",
    ),
    "prompt_response": ({"prompt": "2 + 2?", "response": "4."}, "prompt"),
    "openai_choice": (
        {"custom_id": "r-1", "response": {"status_code": 200, "body": {"choices": []}}},
        "response",
    ),
    "role human": ({"messages": [{"role": "human", "content": "2?"}, answer("2.")]}, "'human'"),
    "role User": ({"messages": [{"role": "User", "content": "2?"}, answer("2.")]}, "'User'"),
    "role model": ({"messages": [user("2?"), {"role": "model", "content": "2."}]}, "'model'"),
}


@pytest.mark.parametrize(("line", "found"), UNUSABLE.values(), ids=UNUSABLE)
def test_other_formats_are_named(line: Any, found: str, tmp_path: Path) -> None:
    published = PUBLISHED["SmolLM2"]
    tokenizer = published.tokenizer()
    (bad,) = loaded(published, tokenizer, tmp_path / "a", CASES["plain"], line).bad_lines
    assert bad.line == 2 and found in bad.reason


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (json.dumps([CASES["plain"]]), "list|array"),
        (json.dumps([UNUSABLE["sharegpt"][0]], indent=1), "list|array"),
    ],
    ids=["messages_array", "sharegpt_array"],
)
def test_an_array_is_named(text: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "array.json"
    path.write_text(text)
    with pytest.raises(InputError, match=found) as caught:
        load_rows(path, PUBLISHED["SmolLM2"].tokenizer(), max_length=100)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_templates_have_the_behaviours_of_the_table(name: str) -> None:
    assert behaviours(PUBLISHED[name]) == PUBLISHED[name].behaviours


def test_every_behaviour_occurs_and_has_cases() -> None:
    occurring = set().union(*(published.behaviours for published in PUBLISHED.values()))
    assert occurring == set(BEHAVIOURS)
    assert {case for cases in BEHAVIOURS.values() for case in cases} <= {*CASES, "reasoning_off"}
    assert all(cases for row in covered().values() for cases in row.values())
