"""Chat templates with the behaviours of published ones, and a tokenizer for each.

A template decides which text a target can have written: it strips reasoning from earlier turns,
opens `<think>` in the prompt, trims answers. Each template here is short, and named by the
published template whose behaviours it has:

    PUBLISHED[name]   -> template, tokens, behaviours
    BEHAVIOURS[name]  -> the cases of `test_trained_text.py` in which a behaviour matters
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from unittest import mock

import jinja2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

DATE = "2026-12-01"
# What a template may do, and the cases of `test_trained_text.py` in which it matters.
BEHAVIOURS: dict[str, tuple[str, ...]] = {
    "strips reasoning from earlier turns": ("multi_think", "reasoning_turns"),
    "opens reasoning in the prompt": ("cut_thinking", "cut_thinking_open", "think_spaces", "plain"),
    "inserts empty reasoning": ("plain", "cut_thinking", "cut_thinking_open", "two_answers"),
    "reads a reasoning key": (
        *("reasoning_content", "reasoning_key", "reasoning_turns", "reasoning_cut"),
        *("reasoning_and_call", "stop_in_reasoning"),
    ),
    "switches reasoning off": ("reasoning_off",),
    "writes channels": ("plain", "reasoning_content", "tool_call"),
    "prints the date": ("plain", "system"),
    "inserts a system turn": ("plain", "developer"),
    "moves a late system message": ("system_late",),
    "ignores unknown roles": ("developer",),
    "requires alternating roles": ("system_late", "two_answers", "tool_call"),
    "prints tools in a system turn": ("tools_declined", "tool_call"),
    "prints tools in a user turn": ("tools_declined", "tool_call"),
    "moves tools to the last question": ("tools_declined", "tool_call"),
    "prints tool calls": (*("tool_call", "tool_call_null", "two_calls", "stop_in_arguments"),),
    "quotes string arguments": ("tool_calls",),
    "drops content beside a tool call": ("tool_call_with_words",),
    "prints tool results": ("tool_call",),
    "prints tool results as JSON": ("tool_call",),
    "puts a newline after the end of turn": ("plain", "system"),
    "puts a space before an answer": ("plain", "outer_whitespace"),
    "trims answers": ("outer_whitespace",),
    "has generation markers": ("plain",),
    "has no generation prompt": ("plain", "system"),
}
END_ID, VOCAB_SIZE = 340, 384
TOOL = {"type": "function", "function": {"name": "weather"}}


@dataclass(frozen=True)
class Published:
    """A published template: its test double, its special tokens and its behaviours.

    `end` is the token after an answer, `ends` are further end tokens of the published
    `generation_config.json`. `words` are added tokens that decode as plain text does.
    """

    template: str
    behaviours: frozenset[str]
    end: str
    eos: str
    special: tuple[str, ...]
    words: tuple[str, ...] = ()
    bos: str | None = None
    ends: tuple[str, ...] = ()

    def tokenizer(self) -> Any:
        """A byte-level BPE tokenizer of `VOCAB_SIZE` ids; the end of turn is `END_ID` in all."""
        tokenizer = Tokenizer.from_str(_trained_bpe())
        marks = dict.fromkeys([self.end, self.eos, *filter(None, [self.bos]), *self.special])
        tokenizer.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
        tokenizer.add_tokens([AddedToken(w, special=False, normalized=False) for w in self.words])
        free = [f"<|reserved_{id}|>" for id in range(tokenizer.get_vocab_size(), VOCAB_SIZE)]
        tokenizer.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in free])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=self.bos,
            eos_token=self.eos,
            chat_template=self.template,
        )

    @property
    def prints_date(self) -> bool:
        return "prints the date" in self.behaviours


@functools.cache
def _trained_bpe() -> str:
    """Merges across spaces and newlines, so that a boundary between tokens can be missed."""
    texts = [
        "system\nYou help.\n\nuser\n\nassistant\n\n Okay, the user asks for a sum. It is 4.\n\n",
        'The time is now. {"name": "weather", "arguments": {"city": "Oslo"}} It is sunny.\n\n \n',
        "What is 2 + 2? It is 5. Sure? <think>\n\nAdd them.\n</think>\n\nIt is 7.",
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=END_ID, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts * 4, trainer)
    return tokenizer.to_str()


def rendered(
    tokenizer: Any, messages: Any, *, prompt: bool = False, day: str = DATE, **kwargs: Any
) -> str:
    """The text of a conversation as transformers renders it on a day."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.fromisoformat(day)

    with mock.patch.object(chat_template_utils, "datetime", Clock):
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, **kwargs
        )


def _one_line(template: str) -> str:
    """A template without its line breaks; those of its output are written as escapes."""
    return template.replace("\n", "")


SMOLLM2 = _one_line(r"""
{% for m in messages %}
{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nYou are a helper.<|im_end|>\n' }}
{% endif %}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""")

# Calls and their results, tools in a system turn; `arguments` differ between Qwen2.5 and Qwen3.
_QWEN_TOOLS = _one_line(r"""
{% set first = messages[0].content if messages[0].role == 'system' else DEFAULT %}
{% if tools %}{{ '<|im_start|>system\n' + first + '\n<tools>' }}
{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}
{% elif first %}{{ '<|im_start|>system\n' + first + '<|im_end|>\n' }}{% endif %}
{% macro calls(m, content) %}
{% for call in m.tool_calls or [] %}{% set call = call.function or call %}
{% if content or not loop.first %}{{ '\n' }}{% endif %}
{{ '<tool_call>\n{"name": "' + call.name + '", "arguments": ' + ARGUMENTS + '}\n</tool_call>' }}
{% endfor %}{% endmacro %}
{% macro result(m, before, after) %}
{% if before.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{% if not after or after.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}{% endmacro %}
""")
QWEN2_5 = _QWEN_TOOLS.replace("DEFAULT", "'You are a helper.'").replace(
    "ARGUMENTS", "call.arguments | tojson"
) + _one_line(r"""
{% for m in messages %}
{% if m.role == 'user' or m.role == 'system' and not loop.first %}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{% elif m.role == 'assistant' %}
{{ '<|im_start|>assistant\n' + (m.content or '') + calls(m, m.content) + '<|im_end|>\n' }}
{% elif m.role == 'tool' %}{{ result(m, loop.previtem, loop.nextitem) }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""")
# Reasoning moves out of the content, and only turns after the last question show it.
QWEN3 = _QWEN_TOOLS.replace("DEFAULT", "''").replace(
    "ARGUMENTS", "(call.arguments if call.arguments is string else call.arguments | tojson)"
) + _one_line(r"""
{% set ns = namespace(asked=0) %}
{% for m in messages %}
{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}
{% if m.role == 'user' or m.role == 'system' and not loop.first %}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{% elif m.role == 'assistant' %}
{% set content = m.content or '' %}{% set reasoning = m.reasoning_content or '' %}
{% if not reasoning and '</think>' in content %}
{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{% set content = content.split('</think>')[-1].lstrip('\n') %}
{% endif %}{{ '<|im_start|>assistant\n' }}
{% if loop.index0 > ns.asked and (loop.last or reasoning) %}
{{ '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{% else %}{{ content }}{% endif %}{{ calls(m, content) + '<|im_end|>\n' }}
{% elif m.role == 'tool' %}{{ result(m, loop.previtem, loop.nextitem) }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}
{% endif %}{% endif %}""")
# The prompt opens the reasoning; a finished turn that is rendered again looks like Qwen3's.
QWEN3_THINKING = QWEN3.split("{% if enable_thinking")[0].replace(
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}",
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
)
# The last system message goes to the front; a generation prompt follows questions alone.
R1_DISTILL = _one_line(r"""
{% set ns = namespace(system='', tool=false) %}
{% for m in messages if m.role == 'system' %}{% set ns.system = m.content %}{% endfor %}
{{ bos_token + ns.system }}
{% for m in messages %}
{% if m.role == 'user' %}{% set ns.tool = false %}{{ '<|User|>' + m.content }}
{% elif m.role == 'tool' %}{% set ns.tool = true %}{{ '<|tool|>' + m.content + '<|tool_end|>' }}
{% elif m.role == 'assistant' and m.content is not none %}
{{ '' if ns.tool else '<|Assistant|>' }}{% set ns.tool = false %}
{{ m.content.split('</think>')[-1] + eos_token }}
{% endif %}
{% endfor %}
{% if add_generation_prompt and not ns.tool %}{{ '<|Assistant|><think>\n' }}{% endif %}""")

LLAMA_3_1 = _one_line(r"""
{% set system = '' %}{% set day = '26 Jul 2024' %}
{% macro turn(role, text) %}
{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + text + '<|eot_id|>' }}{% endmacro %}
{% if messages[0].role == 'system' %}
{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}{% endif %}
{{ bos_token + turn('system', 'Today Date: ' + day + '\n\n' + system) }}
{% if tools %}
{{ turn('user', tools | tojson(indent=4) + '\n\n' + messages[0].content | trim) }}
{% set messages = messages[1:] %}{% endif %}
{% for m in messages %}
{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}
{% if m.tool_calls | length != 1 %}{{ raise_exception('only single calls') }}{% endif %}
{{ turn('assistant', '{"name": "' + call.name + '", "parameters": '
+ call.arguments | tojson + '}') }}
{% elif m.role == 'tool' %}{{ turn('ipython', m.content | tojson) }}
{% else %}{{ turn(m.role, m.content | trim) }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""")
LLAMA_3_2 = LLAMA_3_1.replace("'26 Jul 2024'", "strftime_now('%d %b %Y')")

GEMMA_3 = _one_line(r"""
{{ bos_token }}{% set system = '' %}
{% if messages[0].role == 'system' %}
{% set system = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}
{% for m in messages %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate') }}{% endif %}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{ (system if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""")
# No generation prompt. Tools and the system message go to the last question.
MISTRAL_V0_3 = _one_line(r"""
{% set system = '' %}
{% if messages[0].role == 'system' %}
{% set system = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}
{% set questions = messages | selectattr('role', 'equalto', 'user') | list %}
{% set ns = namespace(turns=0) %}{{ bos_token }}
{% for m in messages %}
{% if m.role != 'tool' and not m.tool_calls %}
{% if (m.role == 'user') != (ns.turns % 2 == 0) %}
{{ raise_exception('conversation roles must alternate') }}{% endif %}
{% set ns.turns = ns.turns + 1 %}{% endif %}
{% if m.role == 'user' %}
{% if tools and m == questions[-1] %}
{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{ '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}
{% elif m.tool_calls %}{% set call = m.tool_calls[0] %}
{% if call.id | length != 9 %}{{ raise_exception('call ids must have length 9') }}{% endif %}
{{ '[TOOL_CALLS] [' + (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}]' + eos_token }}
{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}
{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {"content": ' + m.content + '}[/TOOL_RESULTS]' }}
{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}
{% endfor %}""")

SMOLLM3 = _one_line(r"""
{% set off = enable_thinking is defined and not enable_thinking %}
{% set system = messages[0].content if messages[0].role == 'system' else 'You are a helper.' %}
{{ '<|im_start|>system\nToday Date: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: ' }}
{{ ('/no_think' if off else '/think') + '\n\n' + system + '<|im_end|>\n' }}
{% for m in messages %}
{% if m.role == 'user' or m.role == 'tool' %}
{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{% elif m.role == 'assistant' %}{% generation %}
{{ '<|im_start|>assistant\n' + ('<think>\n\n</think>\n' if off else '') }}
{{ m.content.lstrip('\n') + '<|im_end|>\n' }}
{% endgeneration %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' + ('<think>\n\n</think>\n' if off else '') }}{% endif %}""")

PHI_4 = _one_line(r"""
{% for m in messages if m.role in ['system', 'user', 'assistant'] %}
{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}""")

# Every part of an answer opens a channel; the last answer of a conversation ends with <|return|>.
GPT_OSS = _one_line(r"""
{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{% set system = '' %}{% if messages[0].role in ['developer', 'system'] %}
{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{% if system or tools %}
{{ '<|start|>developer<|message|>' + system + (tools | tojson if tools else '') + '<|end|>' }}
{% endif %}{% set ns = namespace(call=none) %}
{% for m in messages %}
{% if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}
{% elif m.role == 'tool' %}
{{ '<|start|>functions.' + ns.call + ' to=assistant<|channel|>commentary<|message|>' }}
{{ m.content | tojson + '<|end|>' }}
{% elif m.tool_calls %}{% set ns.call = m.tool_calls[0].function.name %}
{{ '<|start|>assistant to=functions.' + ns.call + '<|channel|>commentary json<|message|>' }}
{{ m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
{% elif m.role == 'assistant' %}{% set last = loop.last and not add_generation_prompt %}
{% if last and 'thinking' in m %}
{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{ '<|return|>' if last else '<|end|>' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}""")

_CHATML = ("<|im_start|>", "<|endoftext|>")
_THINK = ("<think>", "</think>")
_CALL = ("<tool_call>", "</tool_call>")
_LLAMA = Published(
    LLAMA_3_1,
    frozenset(
        {
            "prints tools in a user turn",
            "prints tool calls",
            "quotes string arguments",
            "drops content beside a tool call",
            "prints tool results",
            "prints tool results as JSON",
            "trims answers",
        }
    ),
    end="<|eot_id|>",
    eos="<|eot_id|>",
    bos="<|begin_of_text|>",
    special=(
        *("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"),
        *("<|eom_id|>", "<|end_of_text|>"),
    ),
    ends=("<|eom_id|>", "<|end_of_text|>"),
)
PUBLISHED = {
    "SmolLM2": Published(
        SMOLLM2,
        frozenset(
            {"inserts a system turn", "prints tool results", "puts a newline after the end of turn"}
        ),
        end="<|im_end|>",
        eos="<|im_end|>",
        special=_CHATML,
    ),
    "Qwen2.5": Published(
        QWEN2_5,
        frozenset(
            {
                "inserts a system turn",
                "prints tools in a system turn",
                "prints tool calls",
                "quotes string arguments",
                "prints tool results",
                "puts a newline after the end of turn",
                "ignores unknown roles",
            }
        ),
        end="<|im_end|>",
        eos="<|im_end|>",
        special=_CHATML,
        words=_CALL,
    ),
    "Qwen3": Published(
        QWEN3,
        frozenset(
            {
                "strips reasoning from earlier turns",
                "inserts empty reasoning",
                "reads a reasoning key",
                "switches reasoning off",
                "prints tools in a system turn",
                "prints tool calls",
                "prints tool results",
                "puts a newline after the end of turn",
                "ignores unknown roles",
            }
        ),
        end="<|im_end|>",
        eos="<|im_end|>",
        special=_CHATML,
        words=_THINK + _CALL,
    ),
    "Qwen3-Thinking-2507": Published(
        QWEN3_THINKING,
        frozenset(
            {
                "strips reasoning from earlier turns",
                "opens reasoning in the prompt",
                "reads a reasoning key",
                "prints tools in a system turn",
                "prints tool calls",
                "prints tool results",
                "puts a newline after the end of turn",
                "ignores unknown roles",
            }
        ),
        end="<|im_end|>",
        eos="<|im_end|>",
        special=_CHATML,
        words=_THINK + _CALL,
    ),
    "DeepSeek-R1-Distill": Published(
        R1_DISTILL,
        frozenset(
            {
                "strips reasoning from earlier turns",
                "opens reasoning in the prompt",
                "moves a late system message",
                "prints tool results",
                "ignores unknown roles",
            }
        ),
        end="<|end_of_sentence|>",
        eos="<|end_of_sentence|>",
        bos="<|begin_of_sentence|>",
        special=("<|User|>", "<|Assistant|>", "<|tool|>", "<|tool_end|>"),
        words=_THINK,
    ),
    "Llama 3.1": _LLAMA,
    "Llama 3.2": Published(
        **{
            **vars(_LLAMA),
            "template": LLAMA_3_2,
            "behaviours": _LLAMA.behaviours | {"prints the date"},
        }
    ),
    "Gemma 3": Published(
        GEMMA_3,
        frozenset(
            {"trims answers", "puts a newline after the end of turn", "requires alternating roles"}
        ),
        end="<end_of_turn>",
        eos="<eos>",
        bos="<bos>",
        special=("<start_of_turn>",),
    ),
    "Mistral 7B v0.3": Published(
        MISTRAL_V0_3,
        frozenset(
            {
                "has no generation prompt",
                "puts a space before an answer",
                "trims answers",
                "prints tools in a user turn",
                "prints tool calls",
                "quotes string arguments",
                "drops content beside a tool call",
                "prints tool results",
                "requires alternating roles",
                "moves tools to the last question",
            }
        ),
        end="</s>",
        eos="</s>",
        bos="<s>",
        special=(
            *("[INST]", "[/INST]", "[TOOL_CALLS]"),
            *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
    ),
    "SmolLM3": Published(
        SMOLLM3,
        frozenset(
            {
                "inserts a system turn",
                "prints the date",
                "switches reasoning off",
                "has generation markers",
                "prints tool results",
                "puts a newline after the end of turn",
                "ignores unknown roles",
            }
        ),
        end="<|im_end|>",
        eos="<|im_end|>",
        special=_CHATML,
        words=_THINK,
    ),
    "Phi-4": Published(
        PHI_4,
        frozenset({"ignores unknown roles"}),
        end="<|im_end|>",
        eos="<|endoftext|>",
        special=("<|im_start|>", "<|im_sep|>"),
    ),
    "gpt-oss": Published(
        GPT_OSS,
        frozenset(
            {
                "prints the date",
                "reads a reasoning key",
                "writes channels",
                "prints tools in a system turn",
                "prints tool calls",
                "drops content beside a tool call",
                "prints tool results",
                "prints tool results as JSON",
                "quotes string arguments",
                "ignores unknown roles",
            }
        ),
        end="<|return|>",
        eos="<|return|>",
        special=("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"),
        ends=("<|call|>",),
    ),
}

_HI = {"role": "user", "content": "Hi"}
_CALLED = {"id": "abcdefghi", "type": "function", "function": {"name": "weather"}}


def _answer(content: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def _call(arguments: Any) -> list[dict[str, Any]]:
    return [{**_CALLED, "function": {"name": "weather", "arguments": arguments}}]


_RESULT = {"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi"}


def _tools_turn(render: Callable[..., str], end: str) -> str:
    """The kind of turn that shows the tools: none, the one with the question, or another."""
    text = render([_HI], prompt=True, tools=[TOOL])
    if '"weather"' not in text:
        return "none"
    return "other" if end in text[text.index('"weather"') : text.rindex("Hi")] else "question"


def behaviours(published: Published) -> set[str]:
    """The behaviours that a template shows, by rendering conversations that would reveal them."""
    tokenizer = published.tokenizer()
    end = published.end if "<|end|>" not in published.special else "<|end|>"

    def render(messages: Any, **kwargs: Any) -> str:
        try:
            return rendered(tokenizer, messages, **kwargs)
        except (jinja2.TemplateError, TypeError):
            return "refused"

    plain = [_HI, _answer("Yes.")]
    prompt, text = render([_HI], prompt=True), render(plain)
    thought = "<think>\nHm.\n</think>\n\nYes."
    calling = [_HI, _answer("Words", tool_calls=_call({"city": "Oslo"}))]
    called, result = render(calling), render([*calling, _RESULT])
    shows_call = '"Oslo"' in called
    late = render([*plain, {"role": "system", "content": "Late."}, _HI])
    more = {"role": "user", "content": "More"}
    tools_again = render([*plain, more], prompt=True, tools=[TOOL])
    shown = {
        "strips reasoning from earlier turns": "Hm." not in render([_HI, _answer(thought), _HI]),
        "opens reasoning in the prompt": prompt.rstrip().endswith("<think>"),
        "inserts empty reasoning": "<think>" in text and "<think>" not in prompt,
        "reads a reasoning key": any(
            "Hm." in render([_HI, _answer("Yes.", **{key: "Hm."})])
            for key in ("reasoning_content", "reasoning", "thinking")
        ),
        "switches reasoning off": prompt != render([_HI], prompt=True, enable_thinking=False),
        "prints the date": prompt != render([_HI], prompt=True, day="2024-02-29"),
        "prints tools in a system turn": _tools_turn(render, end) == "other",
        "prints tools in a user turn": _tools_turn(render, end) == "question",
        "moves tools to the last question": '"weather"' in tools_again
        and tools_again.index('"weather"') > tools_again.index("Yes."),
        "prints tool calls": shows_call,
        "quotes string arguments": shows_call
        and json.dumps('{"city": "Oslo"}')
        in render([_HI, _answer("", tool_calls=_call('{"city": "Oslo"}'))]),
        "drops content beside a tool call": shows_call and "Words" not in called,
        "prints tool results": "sunny" in result,
        "prints tool results as JSON": '"sunny"' in result,
        "puts a newline after the end of turn": text.endswith(f"{end}\n"),
        "puts a space before an answer": text.removeprefix(prompt).startswith(" "),
        "trims answers": "  Yes.  " not in render([_HI, _answer("  Yes.  ")]),
        "has generation markers": "{% generation %}" in published.template,
        "has no generation prompt": prompt == render([_HI]),
        "requires alternating roles": render([_HI, _HI]) == "refused",
        "ignores unknown roles": render([_HI, {"role": "other", "content": "x"}]) == render([_HI]),
        "inserts a system turn": "You are a helper." in prompt,
        "moves a late system message": "Late." in late and late.index("Late.") < late.index("Hi"),
        "writes channels": "<|channel|>" in text and "<|channel|>" not in prompt,
    }
    return {name for name, found in shown.items() if found}


def covered() -> dict[str, dict[str, tuple[str, ...]]]:
    """Published template -> behaviour -> the tests that watch it, as documentation shows them."""
    test = "tests/data/test_trained_text.py::test_marked_text"
    off = "tests/data/test_trained_text.py::test_a_line_may_have_template_arguments_of_its_own"
    return {
        name: {
            behaviour: tuple(
                f"{off}[{name}]" if case == "reasoning_off" else f"{test}[{name}-{case}]"
                for case in cases
            )
            for behaviour, cases in BEHAVIOURS.items()
            if behaviour in published.behaviours
        }
        for name, published in PUBLISHED.items()
    }
