"""The parsers of tensors in files of strangers: safetensors and GGUF."""

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import fuzz_mutations as mutations
import numpy as np
from fuzz_cases import Case, Inputs, Parser, as_json, json_inputs


def safetensors_file(header: bytes, data: bytes) -> bytes:
    """A file with this header."""
    return struct.pack("<Q", len(header)) + header + data


def tensor_parsers(directory: Path) -> list[Parser]:
    """One file, and an index with its shards."""
    return [_single_file(directory / "single"), _sharded(directory / "sharded")]


def _single_file(place: Path) -> Parser:
    from domino_jax.formats.safetensors import open_safetensors

    place.mkdir()
    path = place / "model.safetensors"
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    tensors = (("a", "F32", [2, 4]), ("b.c", "BF16", [16]), ("d", "F16", [4, 4]))
    for index, (name, dtype, shape) in enumerate(tensors):
        offsets = [32 * index, 32 * index + 32]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    headers = json_inputs(header)
    data = bytes(range(96))
    good = safetensors_file(headers.good, data)

    def draw(rng: random.Random) -> Case:
        if rng.randrange(4) == 0:
            return Case(mutations.mutated_bytes(rng, good))
        case = headers.draw(rng)
        return Case(safetensors_file(case.content, data), case.forbidden)

    def check(content: bytes) -> str | None:
        path.write_bytes(content)
        held = sum(tensor.read().nbytes for tensor in open_safetensors(place).values())
        sound = held < len(content) and held in (0, 96, *range(97, len(content)))
        return None if sound else "more numbers than the file holds"

    return Parser(name="safetensors", weight=12, inputs=Inputs(good, draw), check=check)


def _sharded(place: Path) -> Parser:
    from domino_jax.formats.safetensors import open_safetensors

    place.mkdir()
    files = {"a": "one.safetensors", "b": "two.safetensors"}
    for name, file in files.items():
        header = as_json({name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}})
        (place / file).write_bytes(safetensors_file(header, bytes(16)))
    index = {"metadata": {"total_size": 32}, "weight_map": files}

    def check(content: bytes) -> str | None:
        (place / "model.safetensors.index.json").write_bytes(content)
        found = {name: tensor.file.name for name, tensor in open_safetensors(place).items()}
        return None if found.items() <= files.items() else f"tensors in other files: {found}"

    return Parser(name="safetensors index", weight=8, inputs=json_inputs(index), check=check)


def write_gguf(path: Path) -> None:
    """A random Qwen3 of the tiny shape."""
    import gguf
    from tiny import CONFIG, WORDS

    writer = gguf.GGUFWriter(path, arch="qwen3")
    sizes = {
        "context_length": CONFIG.max_position_embeddings,
        "embedding_length": CONFIG.hidden_size,
        "feed_forward_length": CONFIG.intermediate_size,
        "block_count": CONFIG.num_hidden_layers,
        "attention.head_count": CONFIG.num_attention_heads,
        "attention.head_count_kv": CONFIG.num_key_value_heads,
        "attention.key_length": CONFIG.head_dim,
    }
    for key, size in sizes.items():
        writer.add_uint32(f"qwen3.{key}", size)
    writer.add_float32("qwen3.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "qwen2")
    writer.add_array("tokenizer.ggml.tokens", [*WORDS[:-1], "ab"])
    writer.add_array("tokenizer.ggml.token_type", [3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 0)
    writer.add_string("tokenizer.chat_template", "{{ messages }}")
    for name, shape in _gguf_shapes(path).items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """llama.cpp's name of each tensor of the tiny target -> its shape."""
    from tiny import CONFIG

    from domino_jax.target.gguf import _LAYER_NAMES, _TOP_NAMES
    from domino_jax.target.load import stored_shapes

    parts_of_layers = {theirs: ours for ours, theirs in _LAYER_NAMES.items()}
    tops = {theirs: ours for ours, theirs in _TOP_NAMES.items()}
    shapes = {}
    for name, shape in stored_shapes(CONFIG, found=1000, source=path).items():
        if name in tops:
            shapes[tops[name]] = shape
            continue
        _, _, layer, *inside, _ = name.split(".")  # model.layers.0.mlp.up_proj.weight
        shapes[f"blk.{layer}.{parts_of_layers['.'.join(inside)]}.weight"] = shape
    return shapes


def gguf_parser(directory: Path) -> Parser:
    """The conversion of a whole file."""
    from domino_jax.target.gguf import convert_gguf

    path, made = directory / "model.gguf", directory / "converted"
    write_gguf(path)
    whole = path.read_bytes()

    def draw(rng: random.Random) -> Case:
        return Case(mutations.mutated_bytes(rng, whole, head=5000))

    def check(content: bytes) -> str | None:
        path.write_bytes(content)
        try:
            config = json.loads((convert_gguf(path, made) / "config.json").read_text())
        finally:
            shutil.rmtree(made, ignore_errors=True)
        right = 0 < config["num_hidden_layers"] <= 4
        return None if right else "layers that the file does not hold"

    words = ("target", path, directory / "gguf-target")
    return Parser(name="GGUF", weight=3, inputs=Inputs(whole, draw), check=check, words=words)
