"""A run names a few sizes of its draft; widths and rotary base are its target's, or it cannot fit.

So a recipe is not yet a draft: `make_draft_config` completes it for one target and refuses what
does not fit it. No jax here.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from domino_jax.base.errors import InputError, require
from domino_jax.config.heads import HEADS, head_kind
from domino_jax.config.model import (
    SLIDING_ATTENTION,
    DecoderConfig,
    DecoderShape,
    DraftConfig,
    default_target_layer_ids,
)
from domino_jax.config.schema import INDEX, LENGTH, SIZE, Section, key


@dataclass(frozen=True, kw_only=True)
class DraftRecipe(Section):
    """The draft to train; what is left null is the target's."""

    num_hidden_layers: int = key(5, "layers of the draft", **LENGTH)
    num_attention_heads: int | None = key(None, "query heads; null: the target's", **SIZE)
    num_key_value_heads: int | None = key(None, "key and value heads; null: the target's", **SIZE)
    head_dim: int | None = key(None, "width of a head; null: the target's", **SIZE)
    block_size: int = key(
        16, "K, tokens of a block, its clean first one included; 1 needs shift_label", **LENGTH
    )
    # No constant default: unused ids differ between targets.
    mask_token_id: int | None = key(
        None,
        "mask token id; must not be a stop, eos, pad or bos token or occur in a row; null: a mask, "
        "reserved or unused token of the target, chosen from the target's files",
        **INDEX,
    )
    target_layer_ids: tuple[int, ...] | None = key(
        None,
        "layers of the target whose outputs the draft reads, from 0; null: spread over its depth",
        **INDEX,
    )
    projector_type: str | None = key("domino", "head over the base logits; null: plain DFlash")
    emb_dim: int = key(256, "R, width of the head's low-rank correction", **SIZE)
    gru_hidden_dim: int = key(1024, "G, width of the Domino head's GRU", **SIZE)
    pure_draft_prefix_len: int = key(
        1, "first predictions of a block that the head leaves alone", **INDEX
    )
    # Null and not a value: Domino and plain DFlash differ in it, and so do their readers.
    shift_label: bool | None = key(
        None, "block position k predicts token k + 1; null: true with a head, false without"
    )
    sliding_window: int | None = key(
        None,
        "context that sliding layers see; every layer slides unless layer_types says which",
        unit="tokens",
        **SIZE,
    )
    layer_types: tuple[str, ...] | None = key(
        None, "full_attention or sliding_attention, for each layer; null: all alike"
    )
    sliding_in_block: str = key(
        "bidirectional",
        "how sliding layers look inside the block; causal is SpecForge's rule",
        choices=("bidirectional", "causal"),
    )
    input_embedding_scale: float = key(1.0, "multiplies the embedded block", above=0)
    output_multiplier: float = key(1.0, "multiplies base logits", above=0)
    final_logit_softcapping: float | None = key(
        None, "bounds base logits c: c * tanh(logits / c); null: none", above=0
    )
    init_layers_from_target: bool = key(False, "start as the target's last layers and norm")
    init_from: str | None = key(None, "directory of a draft checkpoint to start from")

    def __post_init__(self) -> None:
        """Refuses what no draft can have; the rest depends on the target."""
        super().__post_init__()
        # Which of two starts would win is not for a reader to guess.
        require(
            not (self.init_from and self.init_layers_from_target),
            "init_from and init_layers_from_target are two starts; give one",
        )


# A run sets the fields of its head by their names.
_NAMES = {f.name for f in dataclasses.fields(DraftRecipe)}
for _kind in HEADS.values():
    _lacking = sorted({f.name for f in dataclasses.fields(_kind)} - _NAMES)
    assert not _lacking, (
        f"config/draft.py: DraftRecipe lacks {_lacking}, fields of {_kind.__name__}; add keys"
    )


def make_draft_config(
    recipe: DraftRecipe, target: DecoderConfig, *, special_ids: Mapping[int, str], dtype: str
) -> DraftConfig:
    """The full draft of a recipe for one target.

    Args:
        recipe: what the run's configuration says, with a mask token.
        target: the target; widths, heads and rotary base are taken from it.
        special_ids: ids of tokens that must not double as the mask token -> role (eos, pad, ...).
        dtype: compute type of the draft.
    Raises:
        InputError: the mask token is missing or a special token, or the recipe does not fit the
            target.
    """
    mask = recipe.mask_token_id
    if mask is None:
        raise InputError(
            "draft.mask_token_id is missing, and only the target's tokenizer shows which id is "
            "unused; give draft.mask_token_id, or the tokenizer's files beside config.json"
        )
    # A text may hold such a token, where the draft would then see a place to be predicted.
    role = special_ids.get(mask)
    require(role is None, f"draft.mask_token_id {mask} is the target's {role} token")
    layers = recipe.target_layer_ids
    if layers is None:
        depth = target.num_hidden_layers
        count = recipe.num_hidden_layers
        layers = default_target_layer_ids(depth, count)
        # `DraftConfig` refuses these too, but names a setting that nobody has given.
        require(
            list(layers) == sorted(set(layers)) and layers[0] >= 0 and layers[-1] < depth,
            f"draft.num_hidden_layers {count} needs {count} different layers of a target of "
            f"{depth} layers; give draft.target_layer_ids or fewer layers",
        )
    # Depth and type are the draft's own, and it always has per-head norms.
    own = ("num_hidden_layers", "dtype", "qk_norm")
    shape = [f.name for f in dataclasses.fields(DecoderShape) if f.name not in own]
    fields: dict[str, Any] = {name: getattr(target, name) for name in shape}
    for f in dataclasses.fields(DraftConfig):
        chosen = getattr(recipe, f.name, None)
        # Null is what the target has, which stands there already.
        if chosen is not None:
            fields[f.name] = chosen
    fields["head"] = None
    if recipe.projector_type is not None:
        kind = head_kind(recipe.projector_type, source="draft")
        fields["head"] = kind(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(kind)})
    fields.setdefault("shift_label", fields["head"] is not None)
    # A window without types is meant for all layers: none would use it otherwise.
    if recipe.sliding_window is not None and recipe.layer_types is None:
        fields["layer_types"] = (SLIDING_ATTENTION,) * recipe.num_hidden_layers
    fields |= {"num_target_layers": target.num_hidden_layers, "target_layer_ids": layers}
    return DraftConfig(**fields | {"dtype": dtype})
