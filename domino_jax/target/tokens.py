"""Token ids of a target: its end tokens, its vocabulary, and the mask token of its drafts.

Three files of a target give token ids and may disagree. Text may hold ids that have no embedding,
and an answer may end with a token that only generation_config.json names:

    0 .. tokenizer.json's last id      ids of text; some of them are reserved for no use
    .. config.json's vocab_size - 1    ids that no text has: padding of the embedding
    vocab_size ..                      no embedding: refused
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domino_jax.base.errors import InputError, shown
from domino_jax.base.files import checked_file, read_json

# Parts of the names of tokens that a vocabulary keeps for later: <|reserved_special_token_8|>,
# <unused99>, <|placeholder1|>.
_SPARE_NAMES = ("reserved", "unused", "placeholder")


@dataclass(frozen=True)
class MaskToken:
    """A mask token: its `id`, and as `reason` its text and the rule that chose it."""

    id: int
    reason: str


def end_token_ids(directory: str | Path) -> tuple[int, ...]:
    """The `eos_token_id` of generation_config.json, then that of config.json, each id once.

    Args:
        directory: in Hugging Face form; generation_config.json may be missing.
    Raises:
        InputError: a file cannot be read, or an id is not an integer of the vocabulary.
    """
    directory = Path(directory)
    config = read_json(checked_file(directory, "config.json"))
    sources = {directory / "config.json": config}
    name = "generation_config.json"
    if (directory / name).exists() or (directory / name).is_symlink():
        sources = {directory / name: read_json(checked_file(directory, name)), **sources}
    size = config.get("vocab_size")
    if type(size) is not int:
        raise InputError(
            f"{directory / 'config.json'}: vocab_size is {shown(size)}, expected an integer"
        )
    ends: dict[int, None] = {}
    for source, tree in sources.items():
        found = tree.get("eos_token_id")
        ids = [] if found is None else found if isinstance(found, list) else [found]
        for token in ids:
            # By `type`: to `isinstance` a bool is an int.
            if type(token) is not int or not 0 <= token < size:
                raise InputError(
                    f"{source}: eos_token_id is {shown(found)}, expected an id or a list of ids "
                    f"in 0..{size - 1} (vocab_size {size}); correct the file"
                )
            ends[token] = None
    return tuple(ends)


def token_words(tokenizer: Any, token: int) -> str:
    """A token as a message names it: its text, if the tokenizer has one, and its id."""
    text = tokenizer.convert_ids_to_tokens(token) if token >= 0 else None
    return f"token id {token}" if text is None else f"token {shown(text)} (id {token})"


def check_vocabulary(ids: np.ndarray, tokenizer: Any, *, vocab_size: int, source: str) -> None:
    """Refuses token ids, int32 [n], outside the target's vocabulary.

    Raises:
        InputError: the first of them, with its text.
    """
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise InputError(
            f"{source}: {token_words(tokenizer, int(outside[0]))} is outside the target's "
            f"vocab_size {vocab_size}; use the tokenizer that belongs to these weights, or leave "
            "the text out"
        )


def special_token_ids(tokenizer: Any, stop_ids: tuple[int, ...]) -> dict[int, str]:
    """The ids that no mask token may have, and the role of each.

    Args:
        tokenizer: of the target.
        stop_ids: all that end an answer of the target.
    """
    roles = dict.fromkeys(stop_ids, "stop")
    for role in ("bos", "pad", "eos"):
        token = getattr(tokenizer, f"{role}_token_id")
        if token is not None:
            roles[token] = role
    return roles


def choose_mask_token(
    tokenizer: Any, *, special_ids: Mapping[int, str], vocab_size: int
) -> MaskToken:
    """A token that no text of the target should hold, for a run that names no mask token.

    In this order: the tokenizer's own mask token; the last added token with a name such as
    `<|reserved_special_token_8|>`; the first id above those of the tokenizer; the last special
    token without a role that the chat template does not contain.

    Args:
        tokenizer: a transformers fast tokenizer with a chat template.
        special_ids: see `special_token_ids`.
        vocab_size: of the target.
    Raises:
        InputError: there is none of them.
    """
    added = {
        index: token
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
        if index < vocab_size
        and index not in special_ids
        and index != tokenizer.unk_token_id
        and token.content not in tokenizer.chat_template
    }
    own = tokenizer.mask_token_id
    if own in added:
        return MaskToken(own, f"{shown(tokenizer.mask_token)}, the tokenizer's mask token")
    spare = [
        index
        for index, token in added.items()
        if any(word in token.content.lower() for word in _SPARE_NAMES)
    ]
    if spare:
        return MaskToken(spare[-1], f"{shown(added[spare[-1]].content)}, a token without use")
    last = max(tokenizer.get_vocab().values())
    for index in range(last + 1, vocab_size):
        if index not in special_ids:
            return MaskToken(index, f"the tokenizer's last id is {last}, vocab_size {vocab_size}")
    special = [index for index, token in added.items() if token.special]
    if special:
        name = shown(added[special[-1]].content)
        return MaskToken(special[-1], f"{name}, a special token without a role")
    raise InputError(
        "draft.mask_token_id is missing, and the tokenizer has no mask token, reserved token, "
        "unused id or special token without a role; give the id of a token that no row contains"
    )
