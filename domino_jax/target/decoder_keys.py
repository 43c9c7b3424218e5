"""config.json of a target: a key that changes the arithmetic and is passed over gives wrong states.

So each key that `Target` does not compute is refused, by its name, unless it has the one value that
changes nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from domino_jax.base.errors import InputError, from_dict, shown
from domino_jax.base.files import checked_file, read_json
from domino_jax.config.model import SIZES, DecoderConfig
from domino_jax.formats.rope_keys import read_rope_scaling, read_rope_theta

MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")
# Keys that would change the arithmetic, with the only value that `Target` computes; an absent key
# means that value.
_ONLY_VALUE: dict[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1,
    "quantization_config": None,
    # A mixture of experts has them in every layer: one scan over the layers needs them alike.
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}


def read_decoder_config(directory: str | Path, *, dtype: str) -> DecoderConfig:
    """Reads config.json of a Llama, Qwen2, Qwen3 or Qwen3 MoE model.

    Args:
        directory: the Hugging Face directory.
        dtype: type of the computation, "float32" or "bfloat16".
    Returns:
        `DecoderConfig`. An absent `head_dim` is hidden_size // num_attention_heads, absent
        key-value heads are as many as the heads, an absent rotary base is 10000, an absent
        `norm_topk_prob` is false: what Hugging Face reads in such files.
    Raises:
        InputError: the file, the key, what was found and what is supported.
    """
    source = checked_file(Path(directory), "config.json")
    tree = read_json(source)
    model_type = tree.get("model_type")
    if model_type not in MODEL_TYPES:
        raise InputError(
            f"{source}: model_type is {shown(model_type)}; supported: {', '.join(MODEL_TYPES)}"
        )
    # Qwen2 always has the biases and its files do not say so.
    for key, value in (_ONLY_VALUE | {"attention_bias": model_type == "qwen2"}).items():
        if tree.get(key, value) not in (value, None):
            raise InputError(f"{source}: {key} is {shown(tree[key])}; supported: {value!r}")
    _check_layer_types(tree, source)
    values = {key: tree[key] for key in (*SIZES, "rms_norm_eps") if key in tree}
    for key in ("num_attention_heads", "hidden_size", "rms_norm_eps"):
        if key not in values:
            raise InputError(f"{source}: missing {key}")
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    if values.get("head_dim") is None:
        if not (type(hidden) is int and type(heads) is int and heads > 0 and hidden % heads == 0):
            raise InputError(
                f"{source}: no head_dim, and num_attention_heads {shown(heads)} does not divide "
                f"hidden_size {shown(hidden)}"
            )
        values["head_dim"] = hidden // heads
    values |= {
        "rope_theta": read_rope_theta(tree, source=str(source)),
        "rope_scaling": read_rope_scaling(tree, source=str(source)),
        "tie_word_embeddings": _given(tree, "tie_word_embeddings", False),
    }
    values |= {
        "qk_norm": model_type in ("qwen3", "qwen3_moe"),
        "attention_bias": model_type == "qwen2",
    }
    if model_type == "qwen3_moe":
        values |= _experts(tree, source)
    return from_dict(DecoderConfig, values | {"dtype": dtype}, source=str(source))


def _check_layer_types(tree: Mapping[str, Any], source: Path) -> None:
    kinds = tree.get("layer_types")
    if kinds is None:
        return
    for kind in kinds if isinstance(kinds, list) else ():
        if kind != "full_attention":
            raise InputError(
                f"{source}: layer_types holds {shown(kind)}; supported: 'full_attention'"
            )
    if not isinstance(kinds, list) or len(kinds) not in (0, tree.get("num_hidden_layers")):
        raise InputError(
            f"{source}: layer_types is {shown(kinds)}; expected one name for each layer"
        )


def _experts(tree: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The fields of a mixture of experts."""
    # transformers 5 writes the second name.
    names = ("num_experts", "num_local_experts")
    counts = [tree[name] for name in names if tree.get(name) is not None]
    if any(count != counts[0] for count in counts):
        raise InputError(
            f"{source}: num_experts {shown(counts[0])} and num_local_experts {shown(counts[1])} "
            "contradict"
        )
    if not counts or counts[0] == 0:
        found = "num_experts is 0" if counts else "missing num_experts"
        raise InputError(f"{source}: {found}; expected a mixture")
    values = {"num_experts": counts[0], "norm_topk_prob": _given(tree, "norm_topk_prob", False)}
    for key in ("num_experts_per_tok", "moe_intermediate_size"):
        if key not in tree:
            raise InputError(f"{source}: missing {key}")
        values[key] = tree[key]
    return values


def _given(tree: Mapping[str, Any], key: str, default: Any) -> Any:
    return default if tree.get(key) is None else tree[key]
