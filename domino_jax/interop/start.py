"""A draft checkpoint as the start of a run: the same draft, field by field, or a refusal.

Tensors of one draft fit into another whose positions mean other tokens or whose layers see other
keys. Training would begin from weights that mean something else, and nothing would fail.
"""

from pathlib import Path
from typing import Any

from domino_jax.base.errors import InputError
from domino_jax.config.model import SLIDING_ATTENTION, DraftConfig, draft_tree
from domino_jax.interop.hf import read_hf_config, read_hf_draft

# No tensor and no meaning of one depends on these: the compute type, a length that no angle is made
# from, and the block's length, which only says how many of the same mask tokens are filled.
_FREE = ("dtype", "max_position_embeddings", "block_size")


def starting_params(path: str | Path, config: DraftConfig) -> Any:
    """The weights of a draft checkpoint for a run that trains the same draft further.

    Returns:
        A tree of float32 arrays for `DraftModel(config)`, in the host's memory.
    Raises:
        InputError: an unusable checkpoint, or as `check_start`.
    """
    # From config.json, before gigabytes of weights are read for a refusal.
    check_start(path, config)
    _, params = read_hf_draft(path)
    return params


def check_start(path: str | Path, config: DraftConfig) -> None:
    """Refuses a checkpoint of another draft; no weight is read.

    Block size, compute type and `max_position_embeddings` may differ; nothing else may, so a DFlash
    checkpoint does not start a Domino draft: with `shift_label` its positions mean other tokens.

    Args:
        path: a directory as `load_hf_draft` reads it.
        config: the draft of the run.
    Raises:
        InputError: every field in which it is another draft, found and expected.
    """
    ours = _meaning(config)
    theirs = _meaning(read_hf_config(path))
    different = [
        f"{name} is {theirs.get(name)!r}, expected {ours.get(name)!r}"
        # Theirs too: a field that only they have is another draft as well.
        for name in (*ours, *(theirs.keys() - ours.keys()))
        if theirs.get(name) != ours.get(name)
    ]
    if different:
        raise InputError(
            f"draft.init_from: {path} is another draft than this run's: {'; '.join(different)}"
        )


def _meaning(config: DraftConfig) -> dict[str, Any]:
    """The fields that tensors depend on, without those that say nothing in this draft."""
    fields = draft_tree(config)
    # The types as they are meant: a draft that names none has full attention in each layer.
    fields["layer_types"] = config.attention_types
    unused = list(_FREE)
    unused += [] if config.head is not None else ["pure_draft_prefix_len"]
    unused += [] if SLIDING_ATTENTION in config.attention_types else ["sliding_in_block"]
    return {name: value for name, value in fields.items() if name not in unused}
