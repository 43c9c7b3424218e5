"""Every parser of the project with valid inputs to start from, and what an accepted input must be.

The oracles are written from the documented bounds, not from the checks: what a parser lets pass is
looked at by somebody who does not know how it decided.
"""

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import fuzz_mutations as mutations
from fuzz_cases import Case, Inputs, Parser, json_inputs, unusable
from fuzz_data import data_parsers
from fuzz_models import model_parsers


def all_parsers(directory: Path) -> list[Parser]:
    """The parsers, with valid files of a tiny target, draft, capture and run in `directory`."""
    return [*_config_parsers(directory), *data_parsers(directory), *model_parsers(directory)]


def _wrong_config(config: Any) -> str | None:
    tree = asdict(config)
    if problem := unusable(tree):
        return problem
    if not 0 <= config.seed < 2**32:
        return "a seed that grain and jax do not take"
    train, data, optimizer, loss = config.train, config.data, config.optimizer, config.loss
    counts = (
        data.max_length, data.batch_size, train.epochs, train.steps or 1, train.log_every,
        train.eval_every, train.checkpoint_every, train.keep_checkpoints, train.max_nonfinite_steps,
        train.rollout_prompts, train.rollout_tokens, train.rollout_every or 1,
        config.draft.num_hidden_layers, loss.num_anchors, optimizer.grad_accumulation,
        config.mesh.fsdp, config.mesh.tensor,
    )  # fmt: skip
    if any(type(count) is not int or not 1 <= count < 2**31 for count in counts):
        return "a count outside 1..2**31-1"
    steps = optimizer.learning_rate > 0 and optimizer.max_grad_norm > 0
    if not steps or not 0 <= optimizer.b1 < 1:
        return "an optimiser that cannot train"
    if data.max_length <= config.draft.block_size or not 0 <= loss.kl_weight <= 1:
        return "a loss without a block"
    one_source = (data.train is None) != (data.hidden_states is None)
    return None if one_source else "two sources of rows, or none"


def _config_parsers(directory: Path) -> list[Parser]:
    """Those of settings; writes the configuration that they start from."""
    from tiny import run_config

    valid = directory / "valid"
    valid.mkdir()
    good = run_config(valid, directory / "target")
    return [
        _config_file(good, directory / "config.yaml"),
        _override_words(good),
        _template_kwargs(directory),
        _decoding_options(directory),
    ]


def _config_file(good: Path, path: Path) -> Parser:
    from domino_jax.config.run import dump_config, load_config

    trees = json_inputs(json.loads(good.read_text()), asdict(load_config(good)))

    def draw(rng: random.Random) -> Case:
        if rng.random() < 0.2:
            return Case(mutations.mutated_text(rng, dump_config(load_config(good))))
        return trees.draw(rng)

    def check(content: bytes) -> str | None:
        path.write_bytes(content)
        return _wrong_config(load_config(path))

    inputs = Inputs(trees.good, draw)
    return Parser(name="config.yaml", weight=35, inputs=inputs, check=check, words=("train", path))


def _override_words(good: Path) -> Parser:
    from domino_jax.config.run import load_config

    keys = [".".join(map(str, place)) for place in mutations.places(asdict(load_config(good)))]

    def draw(rng: random.Random) -> Case:
        value = mutations.odd_value(rng)
        text = value if isinstance(value, str) else json.dumps(value)
        word = f"{rng.choice(keys)}={text}"
        if rng.random() < 0.2:
            word = mutations.mutated_text(rng, word).decode("utf-8", "surrogateescape")
        return Case(word)

    def check(word: str) -> str | None:
        return _wrong_config(load_config(good, [word]))

    inputs = Inputs("train.steps=3", draw)
    return Parser(
        name="key=value words", weight=30, inputs=inputs, check=check, words=("train", good)
    )


def _template_kwargs(directory: Path) -> Parser:
    from domino_jax.cli.options import chat_template_kwargs

    @click.command()
    @chat_template_kwargs
    def kwargs(**options: Any) -> Any: ...

    mappings = json_inputs({"enable_thinking": False, "budget": 3, "style": "short"})

    def draw(rng: random.Random) -> Case:
        case = mappings.draw(rng)
        return Case(case.content.decode("utf-8", "surrogateescape"), case.forbidden)

    def check(text: str) -> str | None:
        context = kwargs.make_context("kwargs", ["--chat-template-kwargs", text])
        found = context.params["chat_template_kwargs"]
        plain = all(isinstance(value, bool | int | float | str) for value in found.values())
        return unusable(found) or (None if plain else "a value that is not plain")

    inputs = Inputs("{a: 1, b: x}", draw)
    words = ("generate", directory / "nope", "a", "--chat-template-kwargs")
    return Parser(name="--chat-template-kwargs", weight=20, inputs=inputs, check=check, words=words)


def _decoding_options(directory: Path) -> Parser:
    from domino_jax.cli.evaluate import evaluate

    names = ("--temperature", "--max-new-tokens", "--seed", "--proposals", "--dtype", "--limit")
    values = (*mutations.NUMBERS, *mutations.FLOATS, *mutations.TEXTS, "serving", "float32")

    def draw(rng: random.Random) -> Case:
        return Case([rng.choice(names), str(rng.choice(values))])

    def check(words: list[str]) -> str | None:
        options = evaluate.make_context("evaluate", ["run", "prompts.jsonl", *words]).params
        temperature, seed = options["temperature"], options["seed"]
        if not (temperature == 0 or 1e-4 < temperature < 1e4):
            return "a temperature that float32 cannot divide by"
        bounded = 0 <= seed < 2**32 and 1 <= options["max_new_tokens"] <= 2**20
        return None if bounded else "a seed or length beyond its bound"

    inputs = Inputs(["--seed", "4"], draw)
    words = ("evaluate", directory / "nope", "prompts.jsonl")
    return Parser(name="decoding options", weight=10, inputs=inputs, check=check, words=words)
