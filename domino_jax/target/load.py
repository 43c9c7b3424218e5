"""Hugging Face directory -> target: config.json, safetensors and tokenizer files, read strictly or refused."""

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from domino_jax.model_config import ROPE_TYPES, DecoderConfig
from domino_jax.strict import InputError, from_tree
from domino_jax.target.model import Target

MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")
TABLES = ("embed_tokens", "lm_head")  # the parameters with one row per token of the vocabulary

# Keys that would change the arithmetic, with the only value that `Target` computes; an absent key means that value.
_ONLY_VALUE: dict[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1,
    "quantization_config": None,
    # A mixture of experts has them in every layer: the layers are alike, which one scan over them needs.
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
_FLOAT_TYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


class LoadedTarget(NamedTuple):
    """A target read from disk: `path`, its `config` and the unboxed parameter tree of `Target`, layers apart."""

    path: Path
    config: DecoderConfig
    params: Any


def load_target(directory: str | Path, *, dtype: str = "float32") -> LoadedTarget:
    """Reads the directory of a Llama, Qwen2, Qwen3 or Qwen3 MoE model into parameters of `Target`.

    Args:
        directory: holds config.json and model.safetensors, or shards with their index.
        dtype: "float32" or "bfloat16", the type of the parameters and of the computation.
    Returns:
        `LoadedTarget`. The arrays lie on jax's default device and are uncommitted: under
        `jax.default_device(jax.devices("cpu")[0])` a model too large for one accelerator can be read and then sharded.
    Raises:
        InputError: a file cannot be read, the config describes another kind of model, or a tensor is missing,
            unexpected or mis-shaped.
    """
    directory = Path(directory)
    config = read_decoder_config(directory, dtype=dtype)
    tensors = read_safetensors(directory)
    _drop_known_extras(tensors, config, place=directory)
    expected = expected_tensors(config)
    stored = {path: _stored_names(name, shape) for path, (name, shape) in expected.items()}
    shapes = {
        name: shape[1:] if "*" in pattern else shape
        for path, (pattern, shape) in expected.items()
        for name in stored[path]
    }
    check_tensors(tensors, shapes, place=directory)
    leaves = {}
    for path, (pattern, _) in expected.items():
        # Popped one by one, so that the file's own copy of a tensor is freed as soon as it is converted.
        parts = [tensors.pop(name) for name in stored[path]]
        leaves[path] = jnp.asarray(np.stack(parts) if "*" in pattern else parts[0], dtype)
    return LoadedTarget(directory, config, unflatten_dict(leaves))


def load_tables(directory: str | Path, *, dtype: str = "float32") -> LoadedTarget:
    """Reads the embedding and the output head of a target alone, for training from its captured states.

    Args:
        directory: as for `load_target`.
        dtype: as for `load_target`.
    Returns:
        `LoadedTarget` whose parameters are those of `TABLES` that the model has.
    Raises:
        InputError: a file cannot be read, or a tensor is missing or mis-shaped.
    """
    directory = Path(directory)
    config = read_decoder_config(directory, dtype=dtype)
    wanted = {path[0]: named for path, named in expected_tensors(config).items() if path[0] in TABLES}
    tensors = read_safetensors(directory, names={name for name, _ in wanted.values()})
    check_tensors(tensors, dict(wanted.values()), place=directory)
    return LoadedTarget(
        directory, config, {key: jnp.asarray(tensors[name], dtype) for key, (name, _) in wanted.items()}
    )


def read_decoder_config(directory: str | Path, *, dtype: str) -> DecoderConfig:
    """Reads config.json of a Llama, Qwen2, Qwen3 or Qwen3 MoE model.

    Args:
        directory: the Hugging Face directory.
        dtype: type of the computation, "float32" or "bfloat16".
    Returns:
        `DecoderConfig`. An absent `head_dim` is hidden_size // num_attention_heads, absent key-value heads are as many
        as the heads, an absent rotary base is 10000, an absent `norm_topk_prob` is false: what Hugging Face reads in
        such files.
    Raises:
        InputError: the file, the key, what was found and what is supported.
    """
    place = Path(directory) / "config.json"
    tree = read_json(place)
    model_type = tree.get("model_type")
    if model_type not in MODEL_TYPES:
        raise InputError(f"{place}: model_type is {model_type!r}; supported: {', '.join(MODEL_TYPES)}")
    # Qwen2 always has the biases and its files do not say so.
    for key, value in (_ONLY_VALUE | {"attention_bias": model_type == "qwen2"}).items():
        if tree.get(key, value) not in (value, None):
            raise InputError(f"{place}: {key} is {tree[key]!r}; supported: {value!r}")
    other = sorted({kind for kind in tree.get("layer_types") or () if kind != "full_attention"})
    if other:
        raise InputError(f"{place}: layer_types holds {', '.join(map(repr, other))}; supported: 'full_attention'")
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = {key: tree[key] for key in (*same, "max_position_embeddings", "rms_norm_eps") if key in tree}
    for key in ("num_attention_heads", "hidden_size", "rms_norm_eps"):
        if key not in values:
            raise InputError(f"{place}: missing {key}")
    values["num_key_value_heads"] = _given(tree, "num_key_value_heads", values["num_attention_heads"])
    values["head_dim"] = _given(tree, "head_dim", None)
    if values["head_dim"] is None:
        values["head_dim"] = _head_dim(values["hidden_size"], values["num_attention_heads"], place)
    values |= {"rope_theta": _rope_theta(tree, place), "rope_scaling": read_rope_scaling(tree, place=str(place))}
    values["tie_word_embeddings"] = _given(tree, "tie_word_embeddings", False)
    values |= {"qk_norm": model_type in ("qwen3", "qwen3_moe"), "attention_bias": model_type == "qwen2"}
    values |= _experts(tree, place) if model_type == "qwen3_moe" else {}
    values["dtype"] = dtype
    return from_tree(DecoderConfig, values, place=str(place))


def read_safetensors(directory: str | Path, *, names: Set[str] | None = None) -> dict[str, np.ndarray]:
    """Reads the tensors of a Hugging Face directory, from one file or from shards; pickles are never opened.

    Args:
        directory: holds model.safetensors, or model.safetensors.index.json and the shards it names.
        names: which of them to read, None for all; what is not there is left out.
    Returns:
        Arrays by their names in the file, in the file's own type (bfloat16 as `ml_dtypes.bfloat16`).
    Raises:
        InputError: no such file, a damaged file, a pickle, a type that is not floating point, or an index that
            disagrees with its shards.
    """
    directory = Path(directory)
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return _read_file(single, names)
    if not index.is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        found = (
            f"found the pickle {pickles[0]}, which is never opened: save it as safetensors" if pickles else "not there"
        )
        raise InputError(f"{directory}: expected model.safetensors or {index.name}; {found}")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index}: expected weight_map, a mapping of tensors to files")
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted({file for tensor, file in places.items() if names is None or tensor in names}):
        if Path(shard).name != shard:
            raise InputError(f"{index}: weight_map names {shard!r}; expected a file of the same directory")
        held = _read_file(directory / shard, names)
        named = {tensor for tensor, file in places.items() if file == shard and (names is None or tensor in names)}
        if set(held) != named:
            raise InputError(
                f"{directory / shard}: holds other tensors than {index.name} says: {_some(set(held) ^ named)}"
            )
        tensors |= held
    return tensors


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes tensors as one file whose mode follows the umask, as that of any other new file.

    Args:
        path: of a file that is not there yet.
        tensors: contiguous arrays by name.
    """
    # The library leaves a file of mode 600, which nobody else could serve.
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def check_tensors(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], *, place: Path) -> None:
    """Refuses tensors that are not exactly the expected ones.

    Args:
        tensors: what was found, by name.
        shapes: what was expected, by name.
        place: file or directory for the message.
    Raises:
        InputError: missing, unexpected or mis-shaped tensors, by name, found and expected.
    """
    for word, names in (("missing", set(shapes) - set(tensors)), ("unexpected", set(tensors) - set(shapes))):
        if names:
            raise InputError(f"{place}: {word} tensor: {_some(names)}; expected {len(shapes)}, found {len(tensors)}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise InputError(f"{place}: tensor {name} has shape {list(tensors[name].shape)}, expected {list(shape)}")


def expected_tensors(config: DecoderConfig) -> dict[tuple[str, ...], tuple[str, tuple[int, ...]]]:
    """For each path in the parameters of `Target`: the Hugging Face name and the shape of its tensor.

    A `*` in the name stands for one stored tensor per entry of the first axis: the experts of a layer.
    """
    one_token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    boxed = jax.eval_shape(Target(config).init, jax.random.key(0), one_token)["params"]
    return {path: (_tensor_name(path), leaf.shape) for path, leaf in flatten_dict(nn.unbox(boxed)).items()}


def load_tokenizer(directory: str | Path) -> Any:
    """Reads the fast tokenizer of a target from local files; no code of the directory is ever run.

    Args:
        directory: holds tokenizer.json, tokenizer_config.json and a chat template.
    Returns:
        A transformers fast tokenizer.
    Raises:
        InputError: a file or the chat template is missing, or the files cannot be read.
    """
    # Here and not at the top: where torch is installed, transformers imports it, which takes seconds.
    from transformers import AutoTokenizer

    directory = Path(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (directory / name).is_file():
            raise InputError(f"{directory}: no {name}; a target needs its fast tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust library raises plain Exception for a damaged file
        raise InputError(f"{directory}: the tokenizer cannot be read: {' '.join(str(error).split())[:300]}") from error
    if not tokenizer.chat_template:
        raise InputError(f"{directory}: no chat template in tokenizer_config.json or chat_template.jinja")
    return tokenizer


def read_rope_scaling(tree: Mapping[str, Any], *, place: str) -> dict[str, Any] | None:
    """The scaling of the rotary embedding that a config.json describes, in the old schema, the new one, or both.

    Args:
        tree: the file; `rope_scaling` (with `type` or `rope_type`) and `rope_parameters` are read.
        place: the file, for messages.
    Returns:
        The fields of `RopeScaling`, unchecked, or None where the frequencies are not scaled.
    Raises:
        InputError: an unknown type, keys without a type, or two descriptions that differ.
    """
    sections = (_rope_section(tree, key, place) for key in ("rope_scaling", "rope_parameters"))
    found = [section for section in sections if section is not None]
    if any(section != found[0] for section in found):
        raise InputError(f"{place}: rope_scaling {found[0]} and rope_parameters {found[1]} contradict")
    return found[0] if found and found[0]["rope_type"] != "default" else None


def read_json(place: Path) -> dict[str, Any]:
    """Reads a JSON object, or raises `InputError` naming the file."""
    try:
        tree = json.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{place}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{place}: expected a JSON object, found {type(tree).__name__}")
    return tree


def _read_file(path: Path, names: Set[str] | None) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            held = set(file.keys())
            tensors = {name: file.get_tensor(name) for name in (held if names is None else held & names)}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (SafetensorError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}") from error
    for name, array in tensors.items():
        if array.dtype not in _FLOAT_TYPES and not name.endswith("rotary_emb.inv_freq"):
            raise InputError(f"{path}: tensor {name} is {array.dtype}; supported: float32, float16, bfloat16")
    return tensors


def _drop_known_extras(tensors: dict[str, np.ndarray], config: DecoderConfig, *, place: Path) -> None:
    """Removes what old checkpoints store beside the weights: rotary buffers and a copy of a tied head."""
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]
    if config.tie_word_embeddings and "lm_head.weight" in tensors and "model.embed_tokens.weight" in tensors:
        if not np.array_equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]):
            raise InputError(
                f"{place}: lm_head.weight differs from model.embed_tokens.weight, but config.json says "
                "tie_word_embeddings true; expected equal tensors or tie_word_embeddings false"
            )
        del tensors["lm_head.weight"]


def _tensor_name(path: tuple[str, ...]) -> str:
    head, *rest = path
    if head == "lm_head":
        return "lm_head.weight"
    if head == "embed_tokens":
        return "model.embed_tokens.weight"
    if "experts" in rest:
        rest = ["mlp", "experts", "*", rest[-1], "weight"]
    return ".".join(("model", head.replace("layers_", "layers."), *rest))


def _stored_names(name: str, shape: tuple[int, ...]) -> list[str]:
    return [name.replace("*", str(index)) for index in range(shape[0])] if "*" in name else [name]


def _experts(tree: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """The fields of a mixture of experts; transformers 5 writes `num_local_experts` for `num_experts`."""
    counts = [tree[key] for key in ("num_experts", "num_local_experts") if tree.get(key) is not None]
    if any(count != counts[0] for count in counts):
        raise InputError(f"{place}: num_experts {counts[0]!r} and num_local_experts {counts[1]!r} contradict")
    if not counts or counts[0] == 0:
        raise InputError(f"{place}: {'num_experts is 0' if counts else 'missing num_experts'}; expected a mixture")
    values = {"num_experts": counts[0], "norm_topk_prob": _given(tree, "norm_topk_prob", False)}
    for key in ("num_experts_per_tok", "moe_intermediate_size"):
        if key not in tree:
            raise InputError(f"{place}: missing {key}")
        values[key] = tree[key]
    return values


def _rope_theta(tree: Mapping[str, Any], place: Path) -> Any:
    """The rotary base, at the top level or inside rope_scaling or rope_parameters."""
    found = {"rope_theta": tree["rope_theta"]} if tree.get("rope_theta") is not None else {}
    for key in ("rope_scaling", "rope_parameters"):
        inner = tree.get(key)
        if isinstance(inner, dict) and inner.get("rope_theta") is not None:
            found[f"{key}.rope_theta"] = inner["rope_theta"]
    theta = next(iter(found.values()), 10_000.0)
    if any(value != theta for value in found.values()):
        raise InputError(f"{place}: {' and '.join(f'{key} {value!r}' for key, value in found.items())} contradict")
    return theta


def _rope_section(tree: Mapping[str, Any], key: str, place: str) -> dict[str, Any] | None:
    """One of the two mappings, its type under `rope_type`; None where it names no type."""
    inner = tree.get(key) or {}
    if not isinstance(inner, dict):
        raise InputError(f"{place}: {key} is {inner!r}; expected a mapping or null")
    kinds = [inner[name] for name in ("rope_type", "type") if inner.get(name) is not None]
    if any(kind != kinds[0] for kind in kinds):
        raise InputError(f"{place}: {key}: rope_type {kinds[0]!r} and type {kinds[1]!r} contradict")
    read = ("rope_theta", "rope_type", "type")
    # A null stands for an absent key, except that transformers reads a null `truncate` as false: refused further on.
    section = {k: v for k, v in inner.items() if k not in read and (v is not None or k == "truncate")}
    if section.get("partial_rotary_factor") == 1:
        del section["partial_rotary_factor"]
    kind = kinds[0] if kinds else None
    for name, value in section.items():
        if kind in ("default", None) or name == "partial_rotary_factor":
            raise InputError(f"{place}: {key}.{name} is {value!r}; not supported with rope_type {kind!r}")
    if kind not in ("default", None, *ROPE_TYPES):
        raise InputError(f"{place}: {key}.rope_type is {kind!r}; supported: default, {', '.join(ROPE_TYPES)}")
    if kind in ("llama3", "yarn"):
        outer, own = (level.get("original_max_position_embeddings") for level in (tree, section))
        if outer is not None and own is not None and outer != own:
            raise InputError(
                f"{place}: original_max_position_embeddings {outer!r} and {key}.original_max_position_embeddings "
                f"{own!r} contradict"
            )
        # What transformers takes when neither is there: a scaling that starts from the full length.
        given = next((value for value in (own, outer) if value is not None), tree.get("max_position_embeddings"))
        section["original_max_position_embeddings"] = given
    return None if kind is None else {"rope_type": kind, **section}


def _given(tree: Mapping[str, Any], key: str, default: Any) -> Any:
    return default if tree.get(key) is None else tree[key]


def _head_dim(hidden_size: Any, heads: Any, place: Path) -> int:
    if not (isinstance(hidden_size, int) and isinstance(heads, int) and heads > 0 and hidden_size % heads == 0):
        raise InputError(
            f"{place}: no head_dim, and num_attention_heads {heads!r} does not divide hidden_size {hidden_size!r}"
        )
    return hidden_size // heads


def _some(names: set[str]) -> str:
    """The first three names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more
