"""Chats, their templates, and a tokenizer for them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from domino_jax.data.conversations import Encoded, Encoder, Row
from domino_jax.data.forms import Conversation

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# No generation prompt, no headers: an answer follows its question at once and ends with eos.
BRACKETS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[Q]{{ message['content'] }}[A]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] | trim }}<|endoftext|>"
    "{% endif %}{% endfor %}"
)
# As Qwen3: only the last answer shows its (empty) thoughts.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last and message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


TEXTS = [
    "How many legs have 3 cats?",
    "They have twelve legs, 3 times 4.",
    "Grüße aus Köln, 東京 and 🦊🦊!",
    "You help.",
]


def make_tokenizer(
    template: str = CHATML, *, eos: str | None = "<|im_end|>", trim_offsets: bool = False
) -> Any:
    """A byte-level BPE tokenizer with a few merges, as SmolLM2, Qwen and Llama 3 have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    marks = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in marks]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, chat_template=template
    )


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """User and assistant in turn."""
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
    return [{"role": "system", "content": system}] * (system is not None) + turns


def encoded(
    messages: list[dict[str, Any]], tokenizer: Any, *, max_length: int = 1000, **settings: Any
) -> Row | None:
    """The one row of a conversation; None where nothing of it is trained."""
    found = encoded_all(messages, tokenizer, max_length=max_length, **settings)
    assert len(found.rows) <= 1, found.rows
    return found.rows[0] if found.rows else None


def encoded_all(
    messages: list[dict[str, Any]],
    tokenizer: Any,
    *,
    max_length: int = 1000,
    finished: bool = True,
    **settings: Any,
) -> Encoded:
    """The rows of a conversation, and why answers are in none."""
    encoder = Encoder(tokenizer, max_length=max_length, **settings)
    return encoder.rows(Conversation(line=1, messages=messages, finished=finished))


def marked(row: Row | None, tokenizer: Any) -> str:
    """The text of a row's marked tokens."""
    assert row is not None
    return tokenizer.decode(row.input_ids[row.loss_mask])


def write(path: Path, *lines: Any) -> Path:
    """Lines as they are, or as JSON."""
    for number, line in enumerate(lines):
        raw = line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode()
        with path.open("ab" if number else "wb") as file:
            file.write(raw + b"\n")
    return path


GOOD = {"messages": chat("Hi", "Hello."), "family": "greeting"}
