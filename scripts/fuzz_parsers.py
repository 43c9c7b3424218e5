"""Every parser of the project with valid inputs to start from, and what an accepted input must be.

The oracles are written from the documented bounds, not from the checks: what a parser lets pass is
looked at by somebody who does not know how it decided.
"""

import hashlib
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import fuzz_mutations as mutations
from fuzz_cases import Case, Parser, as_json, json_cases, unusable
from fuzz_models import model_parsers


def all_parsers(directory: Path) -> list[Parser]:
    """The parsers, with valid files of a tiny target, draft, capture and run in `directory`."""
    return [*_config_parsers(directory), *_data_parsers(directory), *model_parsers(directory)]


def _wrong_config(config: Any) -> str | None:
    tree = asdict(config)
    if problem := unusable(tree):
        return problem
    if not 0 <= config.seed < 2**32:
        return "a seed that grain and jax do not take"
    train, data, optimizer, loss = config.train, config.data, config.optimizer, config.loss
    counts = [data.max_length, data.batch_size, train.epochs, train.log_every, train.eval_every]
    counts += [
        train.checkpoint_every,
        train.keep_checkpoints,
        train.max_bad_steps,
        config.draft.num_hidden_layers,
    ]
    counts += [
        loss.num_anchors,
        optimizer.grad_accumulation,
        config.mesh.fsdp,
        config.mesh.tensor,
        train.steps or 1,
    ]
    if any(type(count) is not int or not 1 <= count < 2**31 for count in counts):
        return "a count outside 1..2**31-1"
    if not optimizer.learning_rate > 0 or not optimizer.clip_norm > 0 or not 0 <= optimizer.b1 < 1:
        return "an optimiser that cannot train"
    if data.max_length <= config.draft.block_size or not 0 <= loss.kl_weight <= 1:
        return "a loss without a block"
    return (
        None if (data.train is None) != (data.features is None) else "two sources of rows, or none"
    )


def _config_parsers(directory: Path) -> list[Parser]:
    from tiny import run_config

    from domino_jax.cli.decode import evaluate
    from domino_jax.cli.shared import template_option
    from domino_jax.config.run import dump_config, load_config

    valid = directory / "valid"
    valid.mkdir()
    good = run_config(valid, directory / "target")
    tree = json.loads(good.read_text())
    full = asdict(load_config(good))
    path = directory / "config.yaml"

    def config_cases(rng: random.Random) -> Case:
        if rng.random() < 0.2:
            return Case(mutations.mutated_text(rng, dump_config(load_config(good))))
        return json_cases(tree, full)(rng)

    def read_config(content: bytes) -> Any:
        path.write_bytes(content)
        return load_config(path)

    keys = [".".join(map(str, place)) for place in mutations.places(full)]

    def word_cases(rng: random.Random) -> Case:
        value = mutations.odd_value(rng)
        text = value if isinstance(value, str) else json.dumps(value)
        word = f"{rng.choice(keys)}={text}"
        if rng.random() < 0.2:
            word = mutations.mutated_text(rng, word).decode("utf-8", "surrogateescape")
        return Case(word)

    @click.command()
    @template_option
    def kwargs(**options: Any) -> Any: ...

    def kwargs_cases(rng: random.Random) -> Case:
        case = json_cases({"enable_thinking": False, "budget": 3, "style": "short"})(rng)
        return Case(case.content.decode("utf-8", "surrogateescape"), case.forbidden)

    def option_cases(rng: random.Random) -> Case:
        name = rng.choice(
            ("--temperature", "--max-new-tokens", "--seed", "--proposals", "--dtype", "--limit")
        )
        value = rng.choice(
            (*mutations.NUMBERS, *mutations.FLOATS, *mutations.TEXTS, "serving", "float32")
        )
        return Case([name, str(value)])

    def read_options(words: list[str]) -> Any:
        return evaluate.make_context("evaluate", ["run", "prompts.jsonl", *words]).params

    def wrong_options(options: dict[str, Any]) -> str | None:
        temperature, seed, count = (
            options[name] for name in ("temperature", "seed", "max_new_tokens")
        )
        if not (temperature == 0 or 1e-4 < temperature < 1e4):
            return "a temperature that float32 cannot divide by"
        return (
            None
            if 0 <= seed < 2**32 and 1 <= count <= 2**20
            else "a seed or length beyond its bound"
        )

    def as_file(content: bytes) -> list[str]:
        path.write_bytes(content)
        return ["train", str(path)]

    return [
        Parser(
            "config.yaml", 35, good.read_bytes(), config_cases, read_config, _wrong_config, as_file
        ),
        Parser(
            *(
                "key=value words",
                30,
                "train.steps=3",
                word_cases,
                lambda word: load_config(good, [word]),
                _wrong_config,
            ),
            lambda word: ["train", str(good), word],
        ),
        Parser(
            *("--chat-template-kwargs", 20, "{a: 1, b: x}", kwargs_cases),
            lambda text: kwargs.make_context("kwargs", ["--chat-template-kwargs", text]).params[
                "chat_template_kwargs"
            ],
            lambda found: (
                unusable(found)
                or (None if all(map(_plain, found.values())) else "a value that is not plain")
            ),
            lambda text: ["generate", str(directory / "nope"), "a", "--chat-template-kwargs", text],
        ),
        Parser(
            *("decoding options", 10, ["--seed", "4"], option_cases, read_options, wrong_options),
            lambda words: ["evaluate", str(directory / "nope"), "prompts.jsonl", *words],
        ),
    ]


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _wrong_lines(found: Any) -> str | None:
    for _, messages in found.conversations:
        asked = False
        for message in messages:
            if (
                message["role"] not in ("system", "user", "assistant")
                or not message["content"].strip()
            ):
                return "a message without its role or text"
            message["content"].encode()
            asked |= message["role"] == "user"
            if message["role"] == "assistant" and not asked:
                return "an answer to nothing"
    return None


def _data_parsers(directory: Path) -> list[Parser]:
    from domino_jax.data.conversations import read_messages
    from domino_jax.data.features import read_manifest
    from domino_jax.data.template import KWARGS
    from domino_jax.decoding.batch_log import BatchLog, _attestation
    from domino_jax.decoding.regenerate import AnswerSettings, _read_answer
    from domino_jax.training.metrics import METRICS, read_metrics

    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    settings = AnswerSettings(
        target="t",
        max_new_tokens=8,
        temperature=0.0,
        seed=0,
        dtype="float32",
        batch_size=2,
        chat_template_kwargs={},
    )
    answered = [*asked, {"role": "assistant", "content": "Hello."}]
    line = {"messages": answered, "finished": True, "generator": asdict(settings)}
    good_line = json.dumps({"messages": asked}).encode()
    rows, answers = directory / "rows.jsonl", directory / "answers.jsonl.partial"

    def read_rows(content: bytes) -> Any:
        rows.write_bytes(good_line + b"\n" + content.replace(b"\n", b" ") + b"\n")
        found = read_messages(rows)
        if found.bad_lines:  # what was wrong with the line
            from domino_jax.strict import InputError

            raise InputError(found.bad_lines[0].reason)
        return found

    def rows_words(content: bytes) -> list[str]:
        rows.write_bytes(content.replace(b"\n", b" ") + b"\n")
        return [
            "regenerate",
            str(rows),
            str(directory / "new.jsonl"),
            "--target",
            str(directory / "target"),
        ]

    def read_partial(content: bytes) -> Any:
        # What is attested is what was written: whoever wrote it may have been wrong.
        before = _attestation(hashlib.sha256()) + content + b"\n"
        answers.write_bytes(before + _attestation(hashlib.sha256(before)))
        prompts = {1: asked}
        with BatchLog(
            answers, lambda record: _read_answer(record, settings, prompts, Path("prompts.jsonl"))
        ) as log:
            return log.finished

    def read_log(content: bytes) -> Any:
        (directory / METRICS).write_bytes(content + b"\n")
        return read_metrics(directory)

    manifest = {
        **{
            "target": "a" * 64,
            "tokenizer": "b" * 64,
            "rows": "c" * 64,
            "target_layer_ids": [0, 2],
            "hidden_size": 16,
        },
        **{
            "dtype": "bfloat16",
            "compute_dtype": "float32",
            "max_length": 24,
            "mask_reasoning_content": False,
        },
        **{
            "target_states": True,
            "row_lengths": [9, 24, 3],
            "shard_rows": [2, 1],
            KWARGS: {"a": 1},
        },
    }
    place = directory / "capture" / "manifest.json"
    place.parent.mkdir()

    def read_capture(content: bytes) -> Any:
        place.write_bytes(content)
        return read_manifest(place.parent)

    def wrong_manifest(found: Any) -> str | None:
        held = sum(found.shard_rows) == len(found.row_lengths) and min(found.shard_rows) > 0
        fits = all(0 < length <= found.max_length for length in found.row_lengths)
        typed = {found.dtype, found.compute_dtype} <= {
            "float32",
            "bfloat16",
        } and 0 < found.hidden_size <= 2**24
        layers = list(found.target_layer_ids)
        rising = bool(layers) and layers == sorted(set(layers)) and layers[0] >= 0
        return None if held and fits and typed and rising else "a manifest of no capture"

    partial_line = line | {"prompt_line": 1}
    record = {
        "step": 4,
        "split": "train",
        "loss": 1.5,
        "not_finite": ["grad_norm"],
        "grad_norm": None,
    }
    return [
        Parser(
            "lines of data",
            35,
            as_json(line),
            json_cases(line, {"messages": asked}),
            read_rows,
            _wrong_lines,
            rows_words,
        ),
        Parser(
            *(
                "capture manifest",
                12,
                as_json(manifest),
                json_cases(manifest),
                read_capture,
                wrong_manifest,
            ),
            lambda content: (
                place.write_bytes(content)
                and [
                    *("train", str(directory / "valid" / "config.yaml"), "data.train=null"),
                    f"data.features={place.parent}",
                ]
            ),
        ),
        Parser(
            *("partial answers", 10, as_json(partial_line), json_cases(partial_line), read_partial),
            lambda found: (
                None
                if all(n == 1 and type(x) is bool for n, x in found.items())
                else "another line"
            ),
        ),
        Parser(
            *("metrics.jsonl", 5, as_json(record), json_cases(record), read_log),
            lambda found: (
                None if all(type(one["step"]) is int for one in found) else "a record without step"
            ),
        ),
    ]
