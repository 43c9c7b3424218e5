"""config.json of a draft checkpoint: each reader looks for the same settings under other keys.

Readers ignore keys that they do not know, and nothing fails: speculators saw 1 % acceptance instead
of 22 % where `shift_label` was not in the file. So every key is written that some reader insists
on, and a key that is missing, unknown or contradicts another is refused by its name.

    top level                        usual Qwen3 keys; block_size, emb_dim, is_causal
    dflash_config                    the draft's own keys; an unknown one is refused
    domino_config                    the head's keys in some SpecForge configs; read, never written
    (eagle_)aux_hidden_state_...     target_layer_ids + 1 in vLLM and speculators; compared
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from domino_jax.base.errors import InputError, did_you_mean, from_dict, shown
from domino_jax.config.heads import head_kind
from domino_jax.config.model import (
    FULL_ATTENTION,
    SIZES,
    SLIDING_ATTENTION,
    DraftConfig,
    RopeScaling,
)
from domino_jax.formats.rope_keys import read_rope_scaling

SHIFTED_DFLASH = "sample_from_anchor"  # what readers of plain DFlash call shift_label


def config_json(config: DraftConfig, dtype: str) -> dict[str, Any]:
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
    sliding = SLIDING_ATTENTION in config.attention_types
    if not sliding or config.sliding_in_block != "causal":
        top["is_causal"] = dflash["causal"] = False
    if config.shift_label and config.head is None:
        top[SHIFTED_DFLASH] = dflash[SHIFTED_DFLASH] = True
    # The new schema even for a plain one: some readers look nowhere else for the base.
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    if config.rope_scaling is not None:
        # Without defaults: each type of scaling has keys of its own.
        plain = {field.name: field.default for field in dataclasses.fields(RopeScaling)}
        scaling = {k: v for k, v in vars(config.rope_scaling).items() if v != plain[k]}
        rope = {
            "rope_parameters": {**scaling, "rope_theta": config.rope_theta},
            "rope_scaling": scaling,
        }
    if config.head is not None:
        dflash["projector_type"] = config.projector_type
        dflash["pure_draft_prefix_len"] = config.pure_draft_prefix_len
        dflash |= dataclasses.asdict(config.head)
        top["emb_dim"] = config.head.emb_dim
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
        **rope,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        # So many that Qwen3's older rule lets no layer slide: `layer_types` alone decides.
        "max_window_layers": config.num_hidden_layers,
        "layer_types": list(config.attention_types),
        "tie_word_embeddings": False,
        "num_target_layers": config.num_target_layers,
        "block_size": config.block_size,
        **top,
        "dtype": dtype,
        "dflash_config": dflash,
    }


# Keys that change what the draft computes and that this project does not implement, with the only
# value it can read.
_PLAIN = {"attention_bias": False, "hidden_act": "silu", "partial_rotary_factor": 1.0}
_PLAIN_DFLASH = {
    "causal": False,
    "use_aux_hidden_state": True,
    "target_layer_id_convention": "zero_based_transformer_block_index",
}
# What `dflash_config` may hold, head fields aside.
_DFLASH_KEYS = (
    "mask_token_id",
    "target_layer_ids",
    "block_size",
    "shift_label",
    SHIFTED_DFLASH,
    "projector_type",
    "pure_draft_prefix_len",
    "input_embedding_scale",
    "output_multiplier",
    "final_logit_softcapping",
    *_PLAIN_DFLASH,
)
# The same layers counted by their inputs: one more than the index of each layer.
_LAYER_INPUTS = ("aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids")


def config_from_json(tree: dict[str, Any], *, source: str) -> DraftConfig:
    """The draft that a config.json describes.

    Raises:
        InputError: a key is missing, contradicts another, or asks for what is not supported.
    """
    nested = _draft_section(tree, source=source)
    for section, plain in ((tree, _PLAIN), (nested, _PLAIN_DFLASH)):
        for key, only in plain.items():
            # Null as well, which writers put where they have nothing to say.
            if section.get(key, only) not in (only, None):
                raise InputError(
                    f"{source}: {key} is {shown(section[key])}; only {only!r} is supported"
                )
    value = functools.partial(_agreed, source)
    scaling = read_rope_scaling(tree, source=source)
    layer_ids = _layer_ids(tree, nested, source=source)
    projector = nested.get("projector_type")
    optional: dict[str, Any] = _windows(tree, nested, source=source)
    optional["shift_label"] = _shift_label(tree, nested, source=source)
    for key in ("input_embedding_scale", "output_multiplier", "final_logit_softcapping"):
        if nested.get(key) is not None:
            optional[key] = float(value(key, nested, kind=(float, int)))
    head = None
    if projector is not None:
        kind = head_kind(projector, source=source)
        # Its own annotations say what each must be.
        names = [field.name for field in dataclasses.fields(kind)]
        widths = {name: value(name, nested, tree) for name in names}
        head = from_dict(kind, widths, source=source)
        if "pure_draft_prefix_len" in nested:
            optional["pure_draft_prefix_len"] = value("pure_draft_prefix_len", nested, kind=int)
    try:
        sizes = {key: value(key, tree, kind=int) for key in (*SIZES, "num_target_layers")}
        eps = value("rms_norm_eps", tree, kind=(float, int))
        rope = tree.get("rope_parameters") or {}
        theta = value("rope_theta", tree, rope, kind=(float, int))
        scaled = None
        if scaling:
            scaled = from_dict(RopeScaling, scaling, source=f"{source}: rope_scaling")
        return DraftConfig(
            **sizes,
            rms_norm_eps=eps,
            rope_theta=float(theta),
            rope_scaling=scaled,
            block_size=value("block_size", nested, tree, kind=int),
            mask_token_id=value("mask_token_id", nested, tree, kind=int),
            target_layer_ids=tuple(layer_ids),
            head=head,
            **optional,
        )
    # `DraftConfig` knows its fields and no file; what `value` raised names the file already.
    except InputError as error:
        message = str(error)
        raise InputError(
            message if message.startswith(source) else f"{source}: {message}"
        ) from error


def _draft_section(tree: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The keys of `dflash_config`, with those of SpecForge's `domino_config`.

    Raises:
        InputError: no such section, an unknown key, or one that differs between the two.
    """
    dflash = tree.get("dflash_config")
    if not isinstance(dflash, dict):
        raise InputError(f"{source}: no dflash_config section; is this a DFlash or Domino draft?")
    domino = tree.get("domino_config")
    if not isinstance(domino, dict | None):
        raise InputError(f"{source}: domino_config is {shown(domino)}, expected a mapping")
    domino = domino or {}
    known = list(_DFLASH_KEYS)
    projector = dflash.get("projector_type")
    if projector is not None:
        kind = head_kind(projector, source=source)
        known += [field.name for field in dataclasses.fields(kind)]
    for name, section in (("dflash_config", dflash), ("domino_config", domino)):
        for key in section:
            if key not in known:
                remedy = did_you_mean(key, known) or f"known: {', '.join(known)}"
                raise InputError(f"{source}: {name}: unknown key {shown(key)}; {remedy}")
    keys = (*dflash, *domino)
    return {key: _agreed(source, key, dflash, domino, required=False) for key in keys}


def _layer_ids(tree: Mapping[str, Any], nested: Mapping[str, Any], *, source: str) -> list[int]:
    """The layers of the target that the draft reads, counted from 0 by their outputs."""
    layers = _agreed(source, "target_layer_ids", nested, tree, kind=list)
    if any(type(layer) is not int for layer in layers):
        raise InputError(f"{source}: target_layer_ids is {shown(layers)}, expected integers")
    inputs = [layer + 1 for layer in layers]
    for name in _LAYER_INPUTS:
        found = tree.get(name)
        if found not in (None, inputs):
            raise InputError(
                f"{source}: {name} is {shown(found)}, expected {shown(inputs)}: the inputs of the "
                f"layers behind target_layer_ids {shown(layers)}"
            )
    return layers


def _agreed(
    source: str,
    key: str,
    *sections: Mapping[str, Any],
    kind: type | tuple[type, ...] = object,
    required: bool = True,
) -> Any:
    """The value of a key, of this type, in the sections that have it, which must agree."""
    found = [section[key] for section in sections if section.get(key) is not None]
    if not found and required:
        raise InputError(f"{source}: {key} is missing")
    if any(other != found[0] for other in found):
        raise InputError(f"{source}: {key} contradicts itself: {shown(found)}")
    value = found[0] if found else None
    # true is an int in Python, and no size.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not object):
        raise InputError(f"{source}: {key} is {shown(value)}, expected {kind}")
    return value


def _shift_label(tree: Mapping[str, Any], nested: Mapping[str, Any], *, source: str) -> bool:
    """Whether the first position of a block predicts too, by either name; false where none is.

    Source: SpecForge 0.2.0 and NeMo AutoModel 0.7.0, which read `dflash_config.shift_label` with
        false as its default; vLLM's speculators (#760), which write `sample_from_anchor` at the top
        with the same default.
    """
    found = {}
    for section, place in ((nested, "dflash_config."), (tree, "")):
        for name in ("shift_label", SHIFTED_DFLASH):
            value = section.get(name)
            if value is not None:
                found[place + name] = value
            if not isinstance(value, bool | None):
                raise InputError(
                    f"{source}: {place}{name} is {shown(value)}, expected true or false"
                )
    if len(set(found.values())) > 1:
        said = ", ".join(f"{name} is {json.dumps(value)}" for name, value in found.items())
        raise InputError(
            f"{source}: {said}: names of one layout of the block, expected the same value"
        )
    return any(found.values())


def _windows(tree: Mapping[str, Any], nested: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The fields of sliding layers; a window that no layer uses is left behind."""
    kinds = tree.get("layer_types") or []
    if not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise InputError(f"{source}: layer_types is {shown(kinds)}; expected a list of names")
    if SLIDING_ATTENTION not in kinds:
        if tree.get("is_causal"):
            raise InputError(
                f"{source}: is_causal is true; a block without windows looks both ways"
            )
        full = set(kinds) <= {FULL_ATTENTION}
        plain = full and len(kinds) in (0, tree.get("num_hidden_layers"))
        return {} if plain else {"layer_types": tuple(kinds)}
    window = tree.get("sliding_window")
    # Hugging Face drops the window unless use_sliding_window is true: the layer would see all.
    if tree.get("use_sliding_window") is not True or type(window) is not int:
        raise InputError(
            f"{source}: layer_types holds {SLIDING_ATTENTION!r}, but use_sliding_window is "
            f"{shown(tree.get('use_sliding_window'))} and sliding_window {shown(window)}; "
            "expected true and an integer"
        )
    if tree.get("is_causal") is True and FULL_ATTENTION in kinds:
        raise InputError(
            f"{source}: is_causal is true for {FULL_ATTENTION!r} layers too; "
            "only sliding ones can be causal"
        )
    # vLLM asks `is_causal`, then `dflash_config.causal`; z-lab and SGLang know the first only.
    said = tree.get("is_causal")
    if said is None:
        said = nested.get("causal")
    in_block = "bidirectional" if said is False else "causal"
    return {"layer_types": tuple(kinds), "sliding_window": window, "sliding_in_block": in_block}
