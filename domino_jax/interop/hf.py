"""The draft checkpoint that PyTorch trainers and serving engines read: a Hugging Face directory.

A tensor that a reader misses or reads under another name costs acceptance and raises no error, so
both ways are strict: a tensor that is missing, unknown or mis-shaped is refused by its name, and
what was written is read back. Its config.json is `hf_config`'s.
"""

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

from domino_jax.base.errors import InputError, scalars, shown
from domino_jax.base.files import (
    CHECKSUMS,
    checked_file,
    damage,
    read_json,
    whole_directory,
    write_checksums,
)
from domino_jax.base.finite import require_finite
from domino_jax.config.model import DraftConfig
from domino_jax.data.template import KWARGS, ChatTemplate
from domino_jax.draft.build import boxed_parameters
from domino_jax.draft.head import HEAD_TENSORS
from domino_jax.formats.safetensors import (
    ANOTHER_COPY,
    StoredTensor,
    check_tensors,
    open_safetensors,
    write_safetensors,
)
from domino_jax.interop.hf_config import config_from_json, config_json

TEMPLATE_KEY = "chat_template_sha256"
SHARD_BYTES = 5 * 10**9  # as Hugging Face writes them
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
    shapes = _parameter_shapes(config)
    expected = {_tensor_name(path, config): shape for path, shape in shapes.items()}
    leaves = flax.traverse_util.flatten_dict(params)
    found = {_tensor_name(path, config): np.asarray(leaf) for path, leaf in leaves.items()}
    check_tensors(found, expected, source=Path("params"))
    # In the model's order whatever the tree's is: one draft, one file, one checksum.
    return {name: found[name] for name in expected}


def save_hf_draft(
    path: str | Path,
    config: DraftConfig,
    params: Any,
    *,
    dtype: str = "bfloat16",
    chat_template: ChatTemplate | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `config.json` and safetensors that every reader accepts.

    The directory appears whole or not at all, with SHA256SUMS of its files, which `load_hf_draft`
    checks.

    Args:
        path: a directory that does not exist yet, or an empty one.
        config: the draft.
        params: tree of arrays as `load_hf_draft` returns it.
        dtype: type of the stored tensors, "bfloat16" or "float32".
        chat_template: what the draft was trained with; written beside the other keys for
            `recorded_template`, other readers pass over it.
        shard_bytes: above so many the tensors are sharded, with an index.
    Raises:
        InputError: the directory is in use, parameters and config disagree, or a tensor is not
            finite in `dtype`.
        OSError: it could not be written; nothing is left.
    """
    path = Path(path)
    if dtype not in ("bfloat16", "float32"):
        raise InputError(f"dtype must be bfloat16 or float32, found {dtype!r}")
    # In the type that is stored: a number that float32 holds may be infinite there.
    with np.errstate(over="ignore", invalid="ignore"):  # what it would warn of is refused
        found = hf_tensors(config, params)
        tensors = {name: np.asarray(x, jnp.dtype(dtype)) for name, x in found.items()}
    for name in tensors:
        require_finite(
            tensors[name],
            source=f"{path} was not written: tensor {name}",
            remedy="a draft that diverged serves nobody: take an earlier one",
        )
    with whole_directory(path) as staging:
        tree = config_json(config, dtype)
        if chat_template is not None:
            tree |= {TEMPLATE_KEY: chat_template.sha256, KWARGS: dict(chat_template.kwargs)}
        (staging / "config.json").write_text(json.dumps(tree, indent=2) + "\n")
        _write_shards(staging, tensors, shard_bytes=shard_bytes)
        write_checksums(staging)
        # Before the rename: a draft that does not read back never appears.
        stored, read_back = read_hf_draft(staging)
        back = hf_tensors(stored, read_back)
        equal = all(np.array_equal(back[name], x.astype("float32")) for name, x in tensors.items())
        if not equal or config_json(stored, dtype) != config_json(config, dtype):
            raise RuntimeError(f"{path}: what was written does not read back as the same draft")


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
    """`load_hf_draft` into the host's memory, for whoever splits it over devices."""
    path = Path(path)
    # Other trainers write no checksums, and a model card may come after ours.
    found = damage(path, unlisted=None) if (path / CHECKSUMS).exists() else None
    if found is not None:
        raise InputError(
            f"{path}: damaged: {found}; export it again, or remove {CHECKSUMS} if you changed it"
        )
    config = read_hf_config(path)
    stored = _with_current_names(open_safetensors(path), source=path)
    # Before the shapes, for which a model of as many layers is built as config.json claims.
    layers = {name.split(".")[1] for name in stored if name.startswith("layers.")}
    if len(layers) != config.num_hidden_layers:
        raise InputError(
            f"{path}: tensors of {len(layers)} layers, config.json says num_hidden_layers "
            f"{config.num_hidden_layers}"
        )
    shapes = _parameter_shapes(config)
    names = {key: _tensor_name(key, config) for key in shapes}
    check_tensors(stored, {names[key]: shape for key, shape in shapes.items()}, source=path)
    tree = {}
    for key, name in names.items():
        values = stored[name].read()
        require_finite(values, source=f"{path}: tensor {name}", remedy=ANOTHER_COPY)
        tree[key] = np.asarray(values, np.float32)
    return config, flax.traverse_util.unflatten_dict(tree)


def read_hf_config(path: str | Path) -> DraftConfig:
    """The draft that a directory describes, its weights unread.

    Raises:
        InputError: missing or contradicting keys; the message names each.
    """
    source = checked_file(Path(path), "config.json")
    return config_from_json(read_json(source), source=str(source))


def recorded_template(path: str | Path) -> ChatTemplate | None:
    """The chat template that a draft was trained with; None where its writer recorded none.

    Raises:
        InputError: no readable config.json, or something else under its keys.
    """
    source = Path(path) / "config.json"
    tree = read_json(source)
    found = tree.get(TEMPLATE_KEY)
    if found is None:  # other trainers write no such key
        return None
    if not isinstance(found, str):
        raise InputError(f"{source}: {TEMPLATE_KEY} is {shown(found)}, expected text")
    return ChatTemplate(found, scalars(tree.get(KWARGS), source=f"{source}: {KWARGS}"))


def _with_current_names(
    tensors: Mapping[str, StoredTensor], *, source: Path
) -> dict[str, StoredTensor]:
    """Gives the head's tensors of old checkpoints their present names.

    Source: SpecForge 0.2.0, which renames them on load, but takes the new one where both are there.
    """
    renamed = {}
    for name in sorted(tensors):
        # Before these two names alone: another tensor below that prefix stays, and is refused.
        new = re.sub(rf"^{re.escape(OLD_HEAD)}(?=(prefix_gru|embed_proj)\.)", "", name)
        if new != name and new in tensors:
            raise InputError(
                f"{source}: tensor {new} is there twice, as {name} and as {new}; expected one"
            )
        renamed[new] = tensors[name]
    return renamed


def _parameter_shapes(config: DraftConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path in the tree -> shape, from the model itself."""
    shapes = nn.meta.unbox(boxed_parameters(config))
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(shapes).items()}


def _tensor_name(path: tuple[str, ...], config: DraftConfig) -> str:
    """`("layers_0", "mlp", "up_proj", "weight")` -> `layers.0.mlp.up_proj.weight`.

    The head's tensors lie at the top, under names of its own.
    """
    first, *rest = path
    if first == "head":
        return HEAD_TENSORS[type(config.head)][tuple(rest)]
    # Linen joins the name of a list and its index by "_", checkpoints by a dot.
    return ".".join([re.sub(r"^layers_(\d+)$", r"layers.\1", first), *rest])


def _write_shards(directory: Path, tensors: dict[str, np.ndarray], *, shard_bytes: int) -> None:
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda x: x.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for filename, names in split.filename_to_tensors.items():
        shard = {name: np.ascontiguousarray(tensors[name]) for name in names}
        write_safetensors(directory / filename, shard)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
