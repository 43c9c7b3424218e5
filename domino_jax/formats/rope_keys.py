"""Rotary embeddings as config.json describes them, in either of two schemas or in both.

A base or a scaling that is read from the wrong key gives other angles, and nothing fails: a target
of other hidden states, a draft that is hardly accepted. So every key that says something is read or
refused, and two that say different things are refused too:

    old   rope_theta, rope_scaling {type or rope_type, factor, ...}
    new   rope_parameters {rope_type, rope_theta, factor, ...}
"""

from collections.abc import Mapping
from typing import Any

from domino_jax.base.errors import InputError, shown
from domino_jax.config.model import ROPE_TYPES


def read_rope_theta(tree: Mapping[str, Any], *, source: str) -> Any:
    """The rotary base that a config.json describes.

    Args:
        tree: the file.
        source: the file, for messages.
    Returns:
        What the file says, unchecked, at the top level or inside rope_scaling or rope_parameters;
        10000 where it says nothing.
    Raises:
        InputError: two places that differ.
    """
    named = {"rope_theta": tree.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        inner = tree.get(key)
        if isinstance(inner, dict):
            named[f"{key}.rope_theta"] = inner.get("rope_theta")
    found = {key: value for key, value in named.items() if value is not None}
    theta = next(iter(found.values()), 10_000.0)
    if any(value != theta for value in found.values()):
        said = " and ".join(f"{key} {shown(value)}" for key, value in found.items())
        raise InputError(f"{source}: {said} contradict")
    return theta


def read_rope_scaling(tree: Mapping[str, Any], *, source: str) -> dict[str, Any] | None:
    """The scaling of the rotary embedding that a config.json describes, in either schema or both.

    Args:
        tree: the file; `rope_scaling` (with `type` or `rope_type`) and `rope_parameters` are read.
        source: the file, for messages.
    Returns:
        The fields of `RopeScaling`, unchecked, or None where the frequencies are not scaled.
    Raises:
        InputError: an unknown type, keys without a type, or two descriptions that differ.
    """
    sections = (_rope_section(tree, key, source) for key in ("rope_scaling", "rope_parameters"))
    found = [section for section in sections if section is not None]
    if any(section != found[0] for section in found):
        raise InputError(
            f"{source}: rope_scaling {shown(found[0])} and rope_parameters {shown(found[1])} "
            "contradict"
        )
    return found[0] if found and found[0]["rope_type"] != "default" else None


def _rope_section(tree: Mapping[str, Any], key: str, source: str) -> dict[str, Any] | None:
    """One of the two mappings, its type under `rope_type`; None where it names no type."""
    inner = tree.get(key) or {}
    if not isinstance(inner, dict):
        raise InputError(f"{source}: {key} is {shown(inner)}; expected a mapping or null")
    kinds = [inner[name] for name in ("rope_type", "type") if inner.get(name) is not None]
    if any(kind != kinds[0] for kind in kinds):
        raise InputError(
            f"{source}: {key}: rope_type {shown(kinds[0])} and type {shown(kinds[1])} contradict"
        )
    read = ("rope_theta", "rope_type", "type")
    # A null stands for an absent key, except that transformers reads a null `truncate` as false: it
    # stays here and is refused further on.
    given = {k: v for k, v in inner.items() if v is not None or k == "truncate"}
    section = {k: v for k, v in given.items() if k not in read}
    # Some writers say it where nothing is partial: 1 rotates whole heads, as is done here.
    if section.get("partial_rotary_factor") == 1:
        del section["partial_rotary_factor"]
    kind = kinds[0] if kinds else None
    for name, value in section.items():
        if kind in ("default", None) or name == "partial_rotary_factor":
            raise InputError(
                f"{source}: {key}.{name} is {shown(value)}; not supported with "
                f"rope_type {shown(kind)}"
            )
    if kind not in ("default", None, *ROPE_TYPES):
        raise InputError(
            f"{source}: {key}.rope_type is {shown(kind)}; "
            f"supported: default, {', '.join(ROPE_TYPES)}"
        )
    if kind in ("llama3", "yarn"):
        outer, own = (level.get("original_max_position_embeddings") for level in (tree, section))
        if outer is not None and own is not None and outer != own:
            raise InputError(
                f"{source}: original_max_position_embeddings {shown(outer)} and "
                f"{key}.original_max_position_embeddings {shown(own)} contradict"
            )
        # What transformers takes when neither is there: a scaling that starts from the full length.
        lengths = (own, outer, tree.get("max_position_embeddings"))
        first = next((length for length in lengths if length is not None), None)
        section["original_max_position_embeddings"] = first
    return None if kind is None else {"rope_type": kind, **section}
