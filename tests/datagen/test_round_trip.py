"""Rows of generated answers: the ids that were fed and generated, under every test template.

One random target answers conversations through `regenerate`; its tokens are any bytes and any
special tokens. Whatever the template does with the text of such answers, the rows that training
reads must hold the ids of the prompts and of the answers.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chat_templates import DATE, END_ID, PUBLISHED, TOOL, VOCAB_SIZE, rendered
from chats import chat, write
from tiny import quiet

from domino_jax.config.model import DecoderConfig
from domino_jax.data.conversations import load_rows
from domino_jax.datagen import regenerate as regenerate_module
from domino_jax.datagen.regenerate import AnswerSettings, read_dialogues, regenerate
from domino_jax.decoding.decoder import Weights, make_decoder
from domino_jax.decoding.generate import Answer
from domino_jax.target.decoder import Target

CONFIG = DecoderConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=1024,
    qk_norm=True,
)
# With the end of turn, so many that about half of the answers end before their limit.
STOP_IDS = (END_ID, *range(VOCAB_SIZE - 12, VOCAB_SIZE))
CONVERSATIONS = [
    {"messages": chat("What is 2 + 2?")},
    {"messages": chat("Hi", "SOMEBODY ELSE wrote this.", "And 3?", system="Be brief.")},
    {"messages": chat("Say hello."), "tools": [TOOL]},
    {"messages": chat("2 + 2?", "<think>\nAdd.\n</think>\n\n4.", "3?", "3.", "Sure?", "Yes.")},
]
TURNS = 1 + 2 + 1 + 3
OTHER_DAY = "2024-02-29"
DAYS = [
    (name, day)
    for name, published in PUBLISHED.items()
    for day in ((DATE, OTHER_DAY) if published.prints_date else (DATE,))
]


@dataclass
class Recorded:
    """Every prompt that the target was given, with the ids that it generated."""

    exchanges: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)


@pytest.fixture(scope="module")
def target() -> tuple[Any, Weights]:
    variables = Target(CONFIG).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return (
        make_decoder(Target(CONFIG), temperature=1.0, stop_ids=STOP_IDS),
        Weights(nn.meta.unbox(variables)["params"]),
    )


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    found = Recorded()
    generate = regenerate_module.generate

    def noted(
        decoder: Any, weights: Any, prompts: Sequence[np.ndarray], **settings: Any
    ) -> list[Answer]:
        answers = generate(decoder, weights, prompts, **settings)
        for prompt, answer in zip(prompts, answers, strict=True):
            found.exchanges.append((tuple(prompt.tolist()), tuple(answer.tokens.tolist())))
        return answers

    monkeypatch.setattr(regenerate_module, "generate", noted)
    return found


@pytest.mark.pitfall(
    "text rendered and tokenised again: the row differs from what was generated",
    seen="data/conversations.py: recorded ids not taken, the text tokenised again",
)
@pytest.mark.parametrize(("name", "day"), DAYS)
def test_rows_hold_the_ids_that_were_fed_and_generated(
    name: str, day: str, target: Any, recorded: Recorded, tmp_path: Path
) -> None:
    published = PUBLISHED[name]
    tokenizer = published.tokenizer()
    kwargs = {"strftime_now": day} if published.prints_date else {}
    prompts, answers = write(tmp_path / "prompts", *CONVERSATIONS), tmp_path / "answers.jsonl"
    decoder, weights = target
    settings = AnswerSettings(
        target="tiny",
        turns="all",
        max_new_tokens=16,
        temperature=1.0,
        top_k=None,
        top_p=None,
        seed=0,
        dtype="float32",
        batch_size=4,
        chat_template_kwargs=kwargs,
    )
    counts = regenerate(
        read_dialogues(prompts, decoder, tokenizer, settings=settings, reporter=quiet()),
        answers,
        source=prompts,
        decoder=decoder,
        weights=weights,
        tokenizer=tokenizer,
        settings=settings,
        reporter=quiet(),
    )
    assert counts.total == len(recorded.exchanges) == TURNS
    assert 0 < counts.cut < TURNS

    header, *lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert header["generator"]["chat_template_kwargs"] == kwargs
    for line in lines:
        *before, _ = line["messages"]
        assert "SOMEBODY" not in json.dumps(line)
        tools = {"tools": line["tools"]} if "tools" in line else {}
        text = rendered(tokenizer, before, prompt=True, day=day, **tools)
        assert line["prompt_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]

    # The clock of the day on which they are read does not matter.
    rows = load_rows(answers, tokenizer, max_length=1024, chat_template_kwargs=kwargs).rows
    trained = []
    for row in rows:
        edges = np.flatnonzero(np.diff(np.pad(row.loss_mask.astype(int), 1)))
        for begin, end in edges.reshape(-1, 2):
            ids = row.input_ids.tolist()
            trained.append((tuple(ids[:begin]), tuple(ids[begin:end])))
    assert sorted(trained) == sorted(recorded.exchanges)
