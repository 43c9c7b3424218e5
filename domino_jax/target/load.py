"""Hugging Face directory -> target: config.json, tensors and tokenizer files, strict or refused.

Training runs a target that one device may not hold, so its parameters go from the files straight
into the parts that the devices of a mesh hold. `*` in a name numbers a leading axis:

    layers/layer/mlp/up_proj/weight [L, F, D]   <- model.layers.*.mlp.up_proj.weight, L times [F, D]
    part of a device [L, F, D/8]                <- of each of the L files' tensors, its D/8 columns

Decoding wants the layers apart, on one device; both are filled by the same reading of parts.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from domino_jax.base.errors import InputError, shown, text_problem
from domino_jax.base.files import checked_file
from domino_jax.base.finite import all_finite
from domino_jax.config.model import DecoderConfig
from domino_jax.formats.safetensors import (
    StoredTensor,
    check_tensors,
    equal_tensors,
    not_finite_tensor,
    open_safetensors,
)
from domino_jax.sharding import parameter_shardings
from domino_jax.target.decoder import Target
from domino_jax.target.decoder_keys import read_decoder_config

TABLES = ("embed_tokens", "lm_head")  # the parameters with one row per token of the vocabulary

_TOKENIZER_SUFFIXES = (".json", ".jinja", ".txt", ".model")
_TOKENIZER_BYTES = 2**28  # of each of its files
# Text that tokenizers split in different ways where one of them is read wrongly.
_PROBE = "One two  three\n\n\tx = 3.14 * 2048; Zoë's Größe: 東京 🦊👍🏽 end."
ParameterPath = tuple[str, ...]  # in a tree of parameters
Bounds = tuple[tuple[int, int], ...]  # first entry and end of a part, for each axis


@dataclass(frozen=True)
class LoadedTarget:
    """A target read from disk: `path`, its `config` and the unboxed parameter tree of `Target`."""

    path: Path
    config: DecoderConfig
    params: Any


def load_target(directory: str | Path, *, dtype: str = "float32") -> LoadedTarget:
    """Reads a Llama, Qwen2, Qwen3 or Qwen3 MoE model onto one device, layers apart.

    Args:
        directory: holds config.json and model.safetensors, or shards with their index.
        dtype: "float32" or "bfloat16", the type of the parameters and of the computation.
    Returns:
        `LoadedTarget`. The arrays lie on jax's default device and are uncommitted.
    Raises:
        InputError: a file cannot be read, the config describes another kind of model, or a tensor
            is missing, unexpected or mis-shaped, or not finite in `dtype`.
    """
    directory = Path(directory)
    config = read_decoder_config(directory, dtype=dtype)
    tensors = open_target(directory, config)
    leaves = {}
    for path, (name, shape) in expected_tensors(config).items():
        whole = tuple((0, size) for size in shape)
        leaves[path] = jnp.asarray(_read_part(tensors, name, whole, dtype=dtype))
    return LoadedTarget(directory, config, unflatten_dict(leaves))


def load_sharded_target(
    directory: str | Path,
    model: Target,
    mesh: Mesh,
    *,
    only: Callable[[ParameterPath], bool] = lambda path: True,
) -> LoadedTarget:
    """Reads parameters of a target straight into the parts that the devices of a mesh hold.

    The host holds one parameter at a time above them (with `scan_layers`, of all layers), no
    device more than its share, and a process reads the parts of its own devices alone, each once.

    Args:
        directory: as for `load_target`.
        model: the target as it is run, with the config that `read_decoder_config` gives. Layers
            that do not run are not read.
        mesh: the mesh of `make_mesh`.
        only: which paths in the parameters of `model` are read; the tree holds no others.
    Returns:
        `LoadedTarget`, in the compute dtype, laid out as `parameter_shardings` says.
    Raises:
        InputError: as `load_target`; only numbers that are not finite are found while reading.
    """
    directory = Path(directory)
    tensors = open_target(directory, model.cfg)
    boxed = boxed_parameters(model)
    layout = flatten_dict(parameter_shardings(boxed, mesh))
    leaves = {}
    for path, (name, shape) in _named_parameters(boxed).items():
        if only(path):
            read = functools.partial(_read_part, tensors, name, dtype=model.cfg.dtype)
            # Waited for: what the host holds of one parameter is gone before the next is read.
            leaves[path] = _sharded(read, shape, layout[path]).block_until_ready()
    return LoadedTarget(directory, model.cfg, unflatten_dict(leaves))


def expected_tensors(config: DecoderConfig) -> dict[ParameterPath, tuple[str, tuple[int, ...]]]:
    """The Hugging Face name and the shape of each parameter of `Target`, by its path.

    A `*` in a name stands for one stored tensor per entry of the first axis: the experts of a
    layer.
    """
    return _named_parameters(boxed_parameters(Target(config)))


def stored_shapes(config: DecoderConfig, *, found: int, source: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the files of a target hold.

    Args:
        config: the target.
        found: how many tensors there are; so many more in the config are not even listed.
        source: of the tensors, for the message.
    Raises:
        InputError: the config describes far more tensors.
    """
    # One trace serves all layers of a scanned model; their names are the same.
    stacked = _named_parameters(boxed_parameters(Target(config, scan_layers=True)))
    count = sum(math.prod(shape[: name.count("*")]) for name, shape in stacked.values())
    # With room to spare: what is missing or unexpected is told by name, see `check_tensors`.
    if count > 2 * found + 1000:
        raise InputError(f"{source}: config.json describes {count} tensors, the files hold {found}")
    shapes = {}
    for pattern, shape in stacked.values():
        stored = shape[pattern.count("*") :]
        for _, name in _stored_names(pattern, [range(size) for size in shape]):
            shapes[name] = stored
    return shapes


def load_tokenizer(directory: str | Path) -> Any:
    """Reads the fast tokenizer of a target from local files; no code of the directory is ever run.

    Args:
        directory: holds tokenizer.json, tokenizer_config.json and a chat template.
    Returns:
        A transformers fast tokenizer.
    Raises:
        InputError: a file or the chat template is missing, the files cannot be read, or
            transformers reads them as another tokenizer than the one in tokenizer.json.
    """
    # Here and not at the top: where torch is installed, transformers imports it, which takes
    # seconds.
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    directory = Path(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (directory / name).is_file():
            raise InputError(f"{directory}: no {name}; a target needs its fast tokenizer")
    _check_tokenizer_files(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        # Some settings are looked at when text comes.
        found = tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"]
        plain = Tokenizer.from_file(str(directory / "tokenizer.json"))
        # transformers asks for neither, whatever the file has.
        plain.no_truncation()
        plain.no_padding()
        expected = plain.encode(_PROBE, add_special_tokens=False).ids
    except Exception as error:  # the Rust library raises plain Exception for a damaged file
        raise InputError(
            f"{directory}: the tokenizer cannot be read: {' '.join(str(error).split())[:300]}"
        ) from error
    if found != expected:
        raise _other_tokenizer(directory, found, expected)
    if not template:
        raise InputError(
            f"{directory}: no chat template in tokenizer_config.json or chat_template.jinja"
        )
    if not isinstance(template, str) or text_problem(template):
        raise InputError(f"{directory}: the chat template is {shown(template)}; expected text")
    tokenizer.chat_template = template  # of several, the default one
    return tokenizer


def _other_tokenizer(directory: Path, found: list[int], expected: list[int]) -> InputError:
    """The error of a probe text that transformers splits otherwise than tokenizer.json."""
    pairs = enumerate(itertools.zip_longest(found, expected))
    first = next(index for index, (one, other) in pairs if one != other)
    part = slice(first, first + 6)
    return InputError(
        f"{directory}: transformers {version('transformers')} reads {_PROBE!r} as {len(found)} "
        f"ids, {found[part]} from number {first} on; tokenizers {version('tokenizers')} reads "
        f"tokenizer.json as {len(expected)}, {expected[part]}; use transformers 5.22 or newer, or "
        "tokenizer_class PreTrainedTokenizerFast"
    )


def _check_tokenizer_files(directory: Path) -> None:
    """Refuses links out of a model, pipes and huge files among what transformers may read."""
    # By their suffixes, not by a list of names: which files transformers opens is up to it.
    for path in sorted([*directory.glob("*"), *directory.glob("additional_chat_templates/*")]):
        if path.suffix in _TOKENIZER_SUFFIXES and not path.is_dir():
            size = checked_file(path.parent, path.name).stat().st_size
            if size > _TOKENIZER_BYTES:
                raise InputError(f"{path}: {size} bytes, expected at most {_TOKENIZER_BYTES}")


def open_target(directory: Path, config: DecoderConfig) -> dict[str, StoredTensor]:
    """The tensors of exactly this model, checked by their headers; no tied head's copy.

    Raises:
        InputError: a file cannot be read, or a tensor is missing, unexpected or mis-shaped.
    """
    # Old checkpoints store rotary buffers beside the weights.
    tensors = {
        name: tensor
        for name, tensor in open_safetensors(directory).items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    copy = tensors.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    shapes = stored_shapes(config, found=len(tensors), source=directory)
    check_tensors(tensors, shapes, source=directory)
    # Last: it reads numbers, where the checks before it read headers.
    if copy is not None and not equal_tensors(copy, tensors["model.embed_tokens.weight"]):
        raise InputError(
            f"{directory}: lm_head.weight differs from model.embed_tokens.weight, but config.json "
            "says tie_word_embeddings true; expected equal tensors or tie_word_embeddings false"
        )
    return tensors


def boxed_parameters(model: Target) -> Any:
    """Shapes and logical axes of a target's parameters, without computing any."""
    one_token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), one_token)["params"]


def _named_parameters(boxed: Any) -> dict[ParameterPath, tuple[str, tuple[int, ...]]]:
    """Name and shape of each parameter; each `*` of a name numbers a leading axis."""
    leaves = flatten_dict(nn.unbox(boxed))
    return {path: (_tensor_name(path), leaf.shape) for path, leaf in leaves.items()}


def _tensor_name(path: ParameterPath) -> str:
    head, *rest = path
    if head == "lm_head":
        return "lm_head.weight"
    if head == "embed_tokens":
        return "model.embed_tokens.weight"
    if head == "layers":  # stacked under `layers/layer`
        head, rest = "layers_*", rest[1:]
    if "experts" in rest:
        rest = ["mlp", "experts", "*", rest[-1], "weight"]
    return ".".join(("model", head.replace("layers_", "layers."), *rest))


def _stored_names(pattern: str, entries: Sequence[range]) -> Iterator[tuple[tuple[int, ...], str]]:
    """The stored tensors of a parameter: where each lies among the wanted entries, and its name.

    Args:
        pattern: the name, with a `*` for each leading axis that the files do not have.
        entries: of each axis, those that are wanted; those of the other axes are not looked at.
    """
    stacked = entries[: pattern.count("*")]
    for entry in np.ndindex(*map(len, stacked)):
        name = pattern
        for numbers, index in zip(stacked, entry, strict=True):
            name = name.replace("*", str(numbers[index]), 1)
        yield entry, name


def _read_part(
    tensors: Mapping[str, StoredTensor], pattern: str, bounds: Bounds, *, dtype: str
) -> np.ndarray:
    """A part of a parameter in `dtype`, from the tensors that hold it; finite or refused.

    One stored tensor is read at a time: of a stacked parameter, the host holds no second copy.
    """
    stacked = pattern.count("*")
    part = np.empty([stop - start for start, stop in bounds], jnp.dtype(dtype))
    inside = tuple(slice(*bound) for bound in bounds[stacked:])
    for entry, name in _stored_names(pattern, [range(*bound) for bound in bounds]):
        with np.errstate(over="ignore", invalid="ignore"):  # what it would warn of is refused
            part[entry] = tensors[name].read(inside)
        if not all_finite(part[entry]):
            raise not_finite_tensor(tensors[name], dtype=dtype)
    return part


def _sharded(
    read: Callable[[Bounds], np.ndarray], shape: tuple[int, ...], layout: NamedSharding
) -> jax.Array:
    """An array read part by part; devices that hold the same part share a read."""
    # By bounds: the slices of an index have no hash in Python 3.11.
    read_once = functools.cache(read)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        bounds = (entry.indices(size)[:2] for entry, size in zip(index, shape, strict=True))
        return read_once(tuple(bounds))

    return jax.make_array_from_callback(shape, layout, part)
