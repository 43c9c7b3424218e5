"""The draft checkpoint that PyTorch trainers and serving engines read: a Hugging Face directory.

Readers look for the same settings under other keys and pass over what they do not know, and nothing
fails: speculators saw 1 % acceptance instead of 22 % where `shift_label` was not in the file. So
every key is written that some reader insists on, and both ways are strict: a tensor or key that is
missing, unknown or contradicts another is refused by its name.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub.serialization import split_state_dict_into_shards_factory

from domino_jax.data.template import KWARGS, ChatTemplate, recorded_kwargs
from domino_jax.draft.backbone import boxed_parameters
from domino_jax.files import CHECKSUMS, checked_file, damage, read_json, write_checksums
from domino_jax.finite import require_finite
from domino_jax.model_config import FULL_ATTENTION, SLIDING_ATTENTION, DraftConfig, RopeScaling
from domino_jax.staging import whole_directory
from domino_jax.strict import InputError, from_tree, shown
from domino_jax.target.rope_keys import read_rope_scaling
from domino_jax.target.safetensors import (
    ANOTHER_COPY,
    StoredTensor,
    check_layers,
    check_tensors,
    open_safetensors,
    write_safetensors,
)

WEIGHTS = "model.safetensors"
TEMPLATE_KEY = "chat_template_sha256"
SHIFTED_DFLASH = "sample_from_anchor"  # what readers of plain DFlash call shift_label
OLD_HEAD = "logit_head."  # the first Domino checkpoints keep the head's tensors below this name


def hf_tensors(config: DraftConfig, params: Any) -> dict[str, np.ndarray]:
    """The tensors of a draft under the names of its checkpoint.

    Weights are stored `[out, in]` on both sides, so this only renames. A tree of gradients goes
    through it too.

    Args:
        config: the draft.
        params: tree of arrays as `load_hf_draft` returns it.
    Returns:
        name -> array, in the types of the tree.
    Raises:
        InputError: a parameter is missing, unknown or mis-shaped for the config.
    """
    expected = {_tensor_name(path): shape for path, shape in _parameter_shapes(config).items()}
    found = {
        _tensor_name(path): np.asarray(leaf)
        for path, leaf in flax.traverse_util.flatten_dict(params).items()
    }
    check_tensors(found, expected, place=Path("params"))
    return {name: found[name] for name in expected}


def save_hf_draft(
    path: str | Path,
    config: DraftConfig,
    params: Any,
    *,
    dtype: str = "bfloat16",
    chat_template: ChatTemplate | None = None,
) -> None:
    """Writes `config.json` and safetensors that every reader accepts.

    Above 5 GB the tensors are sharded, with an index. The directory appears whole or not at all,
    with SHA256SUMS of its files, which `load_hf_draft` checks.

    Args:
        path: a directory that does not exist yet, or an empty one.
        config: the draft.
        params: tree of arrays as `load_hf_draft` returns it.
        dtype: type of the stored tensors, "bfloat16" or "float32".
        chat_template: what the draft was trained with; written beside the other keys for
            `recorded_template`, other readers pass over it.
    Raises:
        InputError: the directory is in use, parameters and config disagree, or a tensor is not
            finite in `dtype`.
        OSError: it could not be written; nothing is left.
    """
    path = Path(path)
    if dtype not in ("bfloat16", "float32"):
        raise InputError(f"dtype must be bfloat16 or float32, found {dtype!r}")
    tensors = {}
    for name, values in hf_tensors(config, params).items():
        # In the type that is stored: a number that float32 holds may be infinite there.
        with np.errstate(over="ignore", invalid="ignore"):  # what it would warn of is refused
            tensors[name] = np.asarray(values, jnp.dtype(dtype))
        place = f"{path} was not written: tensor {name}"
        require_finite(
            tensors[name],
            place=place,
            remedy="a draft that diverged serves nobody: take an earlier one",
        )
    with whole_directory(path) as staging:
        tree = _to_json(config, dtype)
        if chat_template is not None:
            tree |= {TEMPLATE_KEY: chat_template.sha256, KWARGS: dict(chat_template.kwargs)}
        (staging / "config.json").write_text(json.dumps(tree, indent=2) + "\n")
        _write_shards(staging, tensors)
        write_checksums(staging)
        # Before the rename: a draft that does not read back never appears.
        _check_reads_back(staging, config, tensors)


def load_hf_draft(path: str | Path) -> tuple[DraftConfig, Any]:
    """Reads a draft directory.

    Args:
        path: directory with `config.json` and `model.safetensors`, or shards with an index.
    Returns:
        `(config, params)`: a float32 compute config and a tree of float32 arrays for `DraftModel`.
    Raises:
        InputError: files that are not those of its SHA256SUMS, where it has one; missing, unknown
            or mis-shaped tensors, a tensor under its old and its new name, missing or contradicting
            config keys, a tensor that is not finite; the message names each, what was found and
            what was expected.
    """
    config, params = read_hf_draft(path)
    return config, jax.tree.map(jnp.asarray, params)


def read_hf_draft(path: str | Path) -> tuple[DraftConfig, Any]:
    """`load_hf_draft` with arrays in the host's memory, for whoever splits them over devices."""
    path = Path(path)
    # Other trainers write no checksums, and a model card may come after ours.
    found = damage(path, unlisted=None) if (path / CHECKSUMS).exists() else None
    if found is not None:
        raise InputError(
            f"{path}: damaged: {found}; export it again, or remove {CHECKSUMS} if you changed it"
        )
    config = read_hf_config(path)
    stored = _with_current_names(open_safetensors(path), place=path)
    # Before the shapes, for which a model of as many layers is built as config.json claims.
    check_layers(stored, config.num_hidden_layers, prefix="layers.", place=path)
    leaves = {key: (_tensor_name(key), shape) for key, shape in _parameter_shapes(config).items()}
    check_tensors(stored, dict(leaves.values()), place=path)
    tree = {}
    for key, (name, _) in leaves.items():
        values = stored[name].read()
        require_finite(values, place=f"{path}: tensor {name}", remedy=ANOTHER_COPY)
        tree[key] = np.asarray(values, np.float32)
    return config, flax.traverse_util.unflatten_dict(tree)


def read_hf_config(path: str | Path) -> DraftConfig:
    """The draft that a directory describes, its weights unread.

    Raises:
        InputError: missing or contradicting keys; the message names each.
    """
    place = checked_file(Path(path), "config.json")
    return _from_json(read_json(place), place=str(place))


def recorded_template(path: str | Path) -> ChatTemplate | None:
    """The chat template that a draft was trained with; None where its writer recorded none.

    Raises:
        InputError: no readable config.json, or something else under its keys.
    """
    place = Path(path) / "config.json"
    tree = read_json(place)
    found = tree.get(TEMPLATE_KEY)
    if found is None:
        return None
    if not isinstance(found, str):
        raise InputError(f"{place}: {TEMPLATE_KEY} is {shown(found)}, expected text")
    return ChatTemplate(found, recorded_kwargs(tree, place=str(place)))


def _with_current_names(
    tensors: Mapping[str, StoredTensor], *, place: Path
) -> dict[str, StoredTensor]:
    """Gives the head's tensors of old checkpoints their present names.

    Source: SpecForge 0.2.0, which renames them on load and, unlike here, prefers the new one where
        both are there.
    """
    names = {
        name: re.sub(rf"^{re.escape(OLD_HEAD)}(?=(prefix_gru|embed_proj)\.)", "", name)
        for name in tensors
    }
    twice = sorted(new for old, new in names.items() if new != old and new in tensors)
    if twice:
        raise InputError(
            f"{place}: tensor {twice[0]} is there twice, as {OLD_HEAD}{twice[0]} and as "
            f"{twice[0]}; expected one"
        )
    return {names[name]: tensor for name, tensor in tensors.items()}


def _check_reads_back(
    directory: Path, config: DraftConfig, tensors: Mapping[str, np.ndarray]
) -> None:
    stored, params = read_hf_draft(directory)
    found = hf_tensors(stored, params)
    equal = all(
        np.array_equal(found[name], np.asarray(x, np.float32)) for name, x in tensors.items()
    )
    if not equal or _to_json(stored, "float32") != _to_json(config, "float32"):
        raise RuntimeError(f"{directory}: what was written does not read back as the same draft")


def _parameter_shapes(config: DraftConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path in the tree -> shape, from the model itself."""
    shapes = nn.meta.unbox(boxed_parameters(config))
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(shapes).items()}


def _tensor_name(path: tuple[str, ...]) -> str:
    """`("layers_0", "mlp", "up_proj", "weight")` -> `layers.0.mlp.up_proj.weight`.

    The head's parts lie at the top.
    """
    parts = [
        re.sub(r"^(layers|embed_proj)_(\d+)$", r"\1.\2", part) for part in path if part != "head"
    ]
    # W2 is a plain array in the head, which leaves its product to the loss.
    return ".".join(parts) + (".weight" if parts[-1] == "embed_proj.2" else "")


def _write_shards(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    split = split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda x: x.nbytes, filename_pattern="model{suffix}.safetensors"
    )
    for filename, names in split.filename_to_tensors.items():
        shard = {name: np.ascontiguousarray(tensors[name]) for name in names}
        write_safetensors(directory / filename, shard)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _to_json(config: DraftConfig, dtype: str) -> dict[str, Any]:
    """The superset of keys that every reader accepts.

    Some readers look at the top, some inside `dflash_config`.
    """
    dflash: dict[str, Any] = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
        "block_size": config.block_size,
        "shift_label": config.shift_label,
        "input_embedding_scale": config.input_embedding_scale,
        "output_multiplier": config.output_multiplier,
        "final_logit_softcapping": config.final_logit_softcapping,
    }
    top: dict[str, Any] = {}
    # Each speaks for all layers. Without both keys a sliding layer is causal inside the block and a
    # full one is not.
    if not (SLIDING_ATTENTION in config.attention_types and config.sliding_in_block == "causal"):
        top["is_causal"] = dflash["causal"] = False
    if config.shift_label and config.projector_type is None:
        top[SHIFTED_DFLASH] = dflash[SHIFTED_DFLASH] = True
    if config.projector_type is not None:
        dflash["projector_type"] = config.projector_type
        dflash["pure_draft_prefix_len"] = config.pure_draft_prefix_len
        dflash["emb_dim"] = top["emb_dim"] = config.emb_dim
        dflash["gru_hidden_dim"] = config.gru_hidden_dim
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        **_rope_json(config),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": config.num_hidden_layers,
        "layer_types": list(config.attention_types),
        "tie_word_embeddings": False,
        "num_target_layers": config.num_target_layers,
        "block_size": config.block_size,
        **top,
        "dtype": dtype,
        "dflash_config": dflash,
    }


def _rope_json(config: DraftConfig) -> dict[str, Any]:
    """The rotary embedding in the new schema and, when it is scaled, in the old one too."""
    if config.rope_scaling is None:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    # Without defaults: each type of scaling has keys of its own.
    plain = {field.name: field.default for field in dataclasses.fields(RopeScaling)}
    scaling = {
        key: value for key, value in vars(config.rope_scaling).items() if value != plain[key]
    }
    return {
        "rope_parameters": {**scaling, "rope_theta": config.rope_theta},
        "rope_scaling": scaling,
    }


# Keys that change what the draft computes and that this project does not implement, with the only
# value it can read.
_PLAIN = {
    "attention_bias": False,
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
}
_PLAIN_DFLASH = {"causal": False}


def _from_json(tree: dict[str, Any], *, place: str) -> DraftConfig:
    nested = tree.get("dflash_config")
    if not isinstance(nested, dict):
        raise InputError(f"{place}: no dflash_config section; is this a DFlash or Domino draft?")
    for section, plain in ((tree, _PLAIN), (nested, _PLAIN_DFLASH)):
        for key, only in plain.items():
            if section.get(key, only) not in (only, None):
                raise InputError(
                    f"{place}: {key} is {shown(section[key])}; only {only!r} is supported"
                )
    scaling = read_rope_scaling(tree, place=place)
    rope = tree.get("rope_parameters") or {}

    def value(key: str, *sections: Mapping[str, Any], kind: type | tuple[type, ...]) -> Any:
        found = [section[key] for section in sections if section.get(key) is not None]
        if not found:
            raise InputError(f"{place}: {key} is missing")
        if any(other != found[0] for other in found):
            raise InputError(f"{place}: {key} contradicts itself: {shown(found)}")
        # true is an int in Python, and no size.
        if not isinstance(found[0], kind) or (isinstance(found[0], bool) and kind is not bool):
            raise InputError(f"{place}: {key} is {shown(found[0])}, expected {kind}")
        return found[0]

    layer_ids = value("target_layer_ids", nested, kind=list)
    if any(type(layer) is not int for layer in layer_ids):
        raise InputError(f"{place}: target_layer_ids is {shown(layer_ids)}, expected integers")
    projector = nested.get("projector_type")
    optional: dict[str, Any] = _windows(tree, nested, place=place)
    optional["shift_label"] = _shift_label(tree, nested, place=place)
    for key in ("input_embedding_scale", "output_multiplier", "final_logit_softcapping"):
        if nested.get(key) is not None:
            optional[key] = float(value(key, nested, kind=(float, int)))
    if projector is not None:
        optional |= {
            "emb_dim": value("emb_dim", nested, tree, kind=int),
            "gru_hidden_dim": value("gru_hidden_dim", nested, tree, kind=int),
            "pure_draft_prefix_len": value(
                "pure_draft_prefix_len", {"pure_draft_prefix_len": 0} | nested, kind=int
            ),
        }
    integers = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "num_target_layers",
    )
    try:
        return DraftConfig(
            **{key: value(key, tree, kind=int) for key in integers},
            rms_norm_eps=value("rms_norm_eps", tree, kind=(float, int)),
            rope_theta=float(value("rope_theta", tree, rope, kind=(float, int))),
            rope_scaling=from_tree(RopeScaling, scaling, place=f"{place}: rope_scaling")
            if scaling
            else None,
            block_size=value("block_size", nested, tree, kind=int),
            mask_token_id=value("mask_token_id", nested, kind=int),
            target_layer_ids=tuple(layer_ids),
            projector_type=projector,
            **optional,
        )
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(place) else f"{place}: {message}") from error


def _shift_label(tree: Mapping[str, Any], nested: Mapping[str, Any], *, place: str) -> bool:
    """Whether the first position of a block predicts too, by either name.

    That of plain DFlash does not where neither name is there.

    Source: vLLM's speculators (#760), which write `sample_from_anchor` at the top and have false as
        its default.
    """
    named = {
        "dflash_config.shift_label": nested.get("shift_label"),
        f"dflash_config.{SHIFTED_DFLASH}": nested.get(SHIFTED_DFLASH),
        SHIFTED_DFLASH: tree.get(SHIFTED_DFLASH),
    }
    found = {name: value for name, value in named.items() if value is not None}
    for name, value in found.items():
        if not isinstance(value, bool):
            raise InputError(f"{place}: {name} is {shown(value)}, expected true or false")
    if len(set(found.values())) > 1:
        said = ", ".join(f"{name} is {json.dumps(value)}" for name, value in found.items())
        raise InputError(
            f"{place}: {said}: names of one layout of the block, expected the same value"
        )
    # A guess here costs nearly all acceptance, so there is no default with the head.
    if not found and nested.get("projector_type") is not None:
        raise InputError(f"{place}: shift_label is missing")
    return any(found.values())


def _windows(tree: Mapping[str, Any], nested: Mapping[str, Any], *, place: str) -> dict[str, Any]:
    """The fields of sliding layers; a window that no layer uses is left behind."""
    kinds = tree.get("layer_types") or []
    if not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise InputError(f"{place}: layer_types is {shown(kinds)}; expected a list of names")
    if SLIDING_ATTENTION not in kinds:
        if tree.get("is_causal"):
            raise InputError(f"{place}: is_causal is true; a block without windows looks both ways")
        plain = set(kinds) <= {FULL_ATTENTION} and len(kinds) in (0, tree.get("num_hidden_layers"))
        return {} if plain else {"layer_types": tuple(kinds)}
    window = tree.get("sliding_window")
    # Hugging Face drops the window unless use_sliding_window is true: the layer would see all.
    if tree.get("use_sliding_window") is not True or type(window) is not int:
        raise InputError(
            f"{place}: layer_types holds {SLIDING_ATTENTION!r}, but use_sliding_window is "
            f"{shown(tree.get('use_sliding_window'))} and sliding_window {shown(window)}; "
            "expected true and an integer"
        )
    if tree.get("is_causal") is True and FULL_ATTENTION in kinds:
        raise InputError(
            f"{place}: is_causal is true for {FULL_ATTENTION!r} layers too; "
            "only sliding ones can be causal"
        )
    # vLLM asks `is_causal`, then `dflash_config.causal`; z-lab and SGLang know the first only.
    said = tree.get("is_causal") if tree.get("is_causal") is not None else nested.get("causal")
    in_block = "bidirectional" if said is False else "causal"
    return {"layer_types": tuple(kinds), "sliding_window": window, "sliding_in_block": in_block}
