"""The parsers of data, which users bring and verbs write; see `fuzz_parsers.py`.

Conversations, captured states, unfinished answers and logs.
"""

import gzip
import hashlib
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fuzz_mutations as mutations
from fuzz_cases import Case, Inputs, Parser, as_json, json_inputs

ASKED = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "Hello."}]


def data_parsers(directory: Path) -> list[Parser]:
    """Those that read rows, captures, answers and logs."""
    return [
        _conversations(directory),
        _packed_conversations(directory),
        _bombs(directory),
        _manifest(directory),
        _partial_answers(directory),
        _metrics(directory),
    ]


def _settings() -> Any:
    """Settings of the answers below."""
    from domino_jax.datagen.regenerate import AnswerSettings

    sampling = {"temperature": 0.0, "top_k": None, "top_p": None, "seed": 0}
    work = {"max_new_tokens": 8, "dtype": "float32", "batch_size": 2}
    return AnswerSettings(target="t", turns="all", chat_template_kwargs={}, **sampling, **work)


def _answer_line() -> dict[str, Any]:
    ids = {"prompt_ids": [1, 2], "output_ids": [3, 4], "finish_reason": "stop"}
    return {"messages": ANSWERED, "prompt_line": 1, **ids}


def _conversations(directory: Path) -> Parser:
    """A line of a JSONL file, behind one that is right; for the command alone."""
    from domino_jax.base.errors import InputError
    from domino_jax.data.forms import read_conversations

    lines, alone = directory / "rows.jsonl", directory / "alone.jsonl"
    prompt = {"messages": ASKED}

    def check(content: bytes) -> str | None:
        line = content.replace(b"\n", b" ") + b"\n"
        alone.write_bytes(line)
        lines.write_bytes(as_json(prompt) + b"\n" + line)
        found = read_conversations(lines)
        if found.bad_lines:  # what was wrong with the line
            raise InputError(found.bad_lines.first[0].reason)
        return _wrong_lines(found)

    words = ("regenerate", alone, directory / "new.jsonl", "--target", directory / "target")
    inputs = json_inputs(_answer_line(), prompt)
    return Parser(name="lines of data", weight=35, inputs=inputs, check=check, words=words)


def _packed_conversations(directory: Path) -> Parser:
    """A file of lines as gzip packs it, damaged anywhere."""
    from domino_jax.data.forms import read_conversations

    path = directory / "rows.jsonl.gz"
    packed = gzip.compress(as_json(_answer_line()) + b"\n", mtime=0)

    def draw(rng: random.Random) -> Case:
        return Case(mutations.mutated_bytes(rng, packed))

    def check(content: bytes) -> str | None:
        path.write_bytes(content)
        return _wrong_lines(read_conversations(path))

    return Parser(name="packed data", weight=8, inputs=Inputs(packed, draw), check=check)


# What takes much more memory than its text, or repeats without end.
BOMBS = [b"[],", b"{},", b'{"":0},', b"3000,", b'"ab",', b"1e5,", b"[", b'{"a":', b"\\", b'\\"']
BOMBS += [b"\n", b"x\n", b"\0", b"a", "\U0001f98a".encode(), b'{"%d":0}\n', b'"%d":0,']
OPENINGS = [
    b"",
    b"[",
    b"{",
    b'["',
    b'{"messages": [',
    b'{"messages": [{"role": "user", "content": "',
]


def _bombs(directory: Path) -> Parser:
    """A packed file that repeats a part: the memory of its reader is bounded."""
    from domino_jax.base.errors import InputError
    from domino_jax.data.forms import read_conversations

    path = directory / "bomb.jsonl.gz"
    good = as_json({"messages": ASKED}) + b"\n"

    def draw(rng: random.Random) -> Case:
        part, size = rng.choice(BOMBS), 2 ** rng.randrange(10, 24)
        parts = [part % n if b"%d" in part else part for n in range(min(size // len(part), 2**18))]
        text = good + rng.choice(OPENINGS) + b"".join(parts) + rng.choice([b"", b"]\n", b'"]}]}\n'])
        return Case(gzip.compress(text, compresslevel=1, mtime=0))

    def check(content: bytes) -> str | None:
        path.write_bytes(content)
        before = _reset_peak()
        try:
            problem = _wrong_lines(read_conversations(path))
        except InputError:
            if _peak() - before <= 64:
                raise
        grown = _peak() - before
        return f"a reader of {grown:.0f} MiB" if grown > 64 else problem

    inputs = Inputs(gzip.compress(good, mtime=0), draw)
    return Parser(name="packed bombs", weight=6, inputs=inputs, check=check)


def _reset_peak() -> float:
    """Forgets the largest size of this process; its size now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> float:
    """The largest size of this process, in MiB."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 1024


def _wrong_lines(found: Any) -> str | None:
    from domino_jax.data.forms import ROLES

    for conversation in found.conversations:
        ids, mask = conversation.input_ids, conversation.loss_mask
        if ids is not None and (len(ids) != len(mask) or ids.min() < 0 or not len(ids)):
            return "token ids without their mask"
        asked = False
        for message in conversation.messages:
            role, content = message["role"], message["content"]
            if role not in ROLES or not isinstance(content, str):
                return "a message without its role or text"
            content.encode()
            asked |= role == "user"
            if role == "assistant" and not asked:
                return "an answer to nothing"
    return None


def _manifest(directory: Path) -> Parser:
    """What is said of captured states."""
    from domino_jax.data.hidden_states import read_manifest

    place = directory / "capture" / "manifest.json"
    place.parent.mkdir()
    manifest = {
        "target": "a" * 64,
        "tokenizer": "b" * 64,
        "rows": "c" * 64,
        "target_layer_ids": [0, 2],
        "hidden_size": 16,
        "dtype": "bfloat16",
        "compute_dtype": "float32",
        "max_length": 24,
        "mask_reasoning_content": False,
        "target_states": True,
        "row_lengths": [9, 24, 3],
        "shard_rows": [2, 1],
        "chat_template_kwargs": {"a": 1},
        "answer_tokens": 20,
        "token_spans": [0, 40],
    }

    def check(content: bytes) -> str | None:
        place.write_bytes(content)
        return _wrong_manifest(read_manifest(place.parent))

    run = ("train", directory / "valid" / "config.yaml")
    words = (*run, "data.train=null", f"data.hidden_states={place.parent}")
    inputs = _signed(json_inputs(manifest), directory / "signed.json")
    return Parser(name="capture manifest", weight=12, inputs=inputs, check=check, words=words)


def _signed(inputs: Inputs, scratch: Path) -> Inputs:
    """Inputs with the hash of their values, so that they pass that check and reach the others."""
    from domino_jax.base.files import write_json

    def signed(content: bytes) -> bytes:
        try:
            write_json(scratch, json.loads(content))
        except (ValueError, TypeError, RecursionError):  # no object, or no JSON
            return content
        return scratch.read_bytes()

    def draw(rng: random.Random) -> Case:
        case = inputs.draw(rng)
        # Parsing would remove one of two equal keys.
        return case if case.forbidden else Case(signed(case.content))

    return Inputs(signed(inputs.good), draw)


def _wrong_manifest(found: Any) -> str | None:
    held = sum(found.shard_rows) == len(found.row_lengths) and min(found.shard_rows) > 0
    fits = all(0 < length <= found.max_length for length in found.row_lengths)
    known = {found.dtype, found.compute_dtype} <= {"float32", "bfloat16"}
    sized = 0 < found.hidden_size <= 2**24
    layers = list(found.target_layer_ids)
    rising = bool(layers) and layers == sorted(set(layers)) and layers[0] >= 0
    return None if held and fits and known and sized and rising else "a manifest of no capture"


def _partial_answers(directory: Path) -> Parser:
    """A line of unfinished answers, attested."""
    import numpy as np

    from domino_jax.datagen.batch_log import BatchLog, _attestation
    from domino_jax.datagen.regenerate import Dialogue, _AnswerRecords

    answers = directory / "answers.jsonl.partial"
    of = {"kind": "an answer", "generator": asdict(_settings())}
    header = as_json({"generator": of["generator"]}) + b"\n"
    ids = np.array([1, 2], np.int32)
    dialogue = Dialogue(line=1, turns=[ASKED], first_ids=ids, tools=None, chat_template_kwargs={})

    def check(content: bytes) -> str | None:
        # What is attested is what was written: whoever wrote it may have been wrong.
        before = b""
        for lines in (b"", header, content + b"\n"):
            before += lines
            before += _attestation(hashlib.sha256(before))
        answers.write_bytes(before)
        records = _AnswerRecords([dialogue], Path("prompts.jsonl"))
        with BatchLog(answers, records.read, **of) as log:
            found = log.finished.items()
        right = all(key == (1, 2) and type(ended) is bool for key, ended in found)
        return None if right else "another line"

    inputs = json_inputs(_answer_line())
    return Parser(name="partial answers", weight=10, inputs=inputs, check=check)


def _metrics(directory: Path) -> Parser:
    """A line of a run's log."""
    from domino_jax.training.log import METRICS, read_metrics

    record = {"step": 4, "split": "train", "loss": 1.5}
    record |= {"not_finite": ["grad_norm"], "grad_norm": None}

    def check(content: bytes) -> str | None:
        (directory / METRICS).write_bytes(content + b"\n")
        right = all(type(one["step"]) is int for one in read_metrics(directory))
        return None if right else "a record without step"

    return Parser(name="metrics.jsonl", weight=5, inputs=json_inputs(record), check=check)
