"""Fields of a draft's config against NeMo AutoModel 0.7.0, and that each of them shows.

NeMo names a draft's own heads `draft_num_attention_heads` and the like, and its trainer bounds the
context of all layers alike.
"""

from typing import Any

import pytest
from doubles import slow_after
from reference import compare_with_nemo, dflash_config, draft_config

from domino_jax.config.draft import DraftRecipe, make_draft_config
from domino_jax.config.model import DecoderConfig, RopeScaling

SLIDING: dict[str, Any] = {"layer_types": ("sliding_attention",) * 2}
LLAMA3 = RopeScaling(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)


@pytest.mark.parametrize(
    "changes",
    [
        {"input_embedding_scale": 3.0},
        {"output_multiplier": 0.4},
        {"final_logit_softcapping": 5.0},
        {"input_embedding_scale": 0.5, "output_multiplier": 2.0, "final_logit_softcapping": 12.0},
    ],
    ids=lambda changes: "+".join(changes),
)
@pytest.mark.parametrize("make", slow_after(1, [draft_config, dflash_config]))
def test_transformed_draft_equals_nemo(changes: dict[str, Any], make: Any) -> None:
    found = compare_with_nemo(make(**changes))
    assert abs(found["loss"] - compare_with_nemo(make())["loss"]) > 1e-3


@pytest.mark.parametrize("scaling", [LLAMA3, YARN], ids=["llama3", "yarn"])
@pytest.mark.parametrize("packed", [False, True])
def test_draft_with_scaled_rotary_embedding_equals_nemo(scaling: RopeScaling, packed: bool) -> None:
    found = compare_with_nemo(draft_config(rope_scaling=scaling), length=48, packed=packed)
    plain = compare_with_nemo(draft_config(), length=48, packed=packed)
    assert abs(found["loss"] - plain["loss"]) > 1e-4


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [5, 9])
def test_windowed_domino_equals_nemo(window: int, packed: bool) -> None:
    config = draft_config(sliding_window=window, **SLIDING)
    found = compare_with_nemo(config, packed=packed, gamma=7.0)
    whole = compare_with_nemo(draft_config(), packed=packed, gamma=7.0)
    assert abs(found["loss"] - whole["loss"]) > 1e-3


def test_windowed_dflash_equals_nemo() -> None:
    compare_with_nemo(dflash_config(sliding_window=6, **SLIDING), packed=True)


def test_a_window_over_the_whole_row_is_no_window() -> None:
    wide = compare_with_nemo(draft_config(sliding_window=64, **SLIDING), gamma=7.0)
    assert wide == pytest.approx(compare_with_nemo(draft_config(), gamma=7.0), rel=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 3, 4), (1, 1, 32), (8, 2, 16)])
def test_draft_with_its_own_heads_equals_nemo(heads: int, kv_heads: int, head_dim: int) -> None:
    config = draft_config(
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim
    )
    compare_with_nemo(config, packed=True)


def test_recipe_overrides_the_targets_heads_and_nothing_else() -> None:
    target = DecoderConfig(
        vocab_size=120,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}
    for own in (heads, {}):
        recipe = DraftRecipe(mask_token_id=3, num_hidden_layers=2, block_size=4, **own)
        draft = make_draft_config(recipe, target, special_ids={}, dtype="float32")
        for name, size in ({name: getattr(target, name) for name in heads} | own).items():
            assert getattr(draft, name) == size
        assert (draft.hidden_size, draft.intermediate_size, draft.vocab_size) == (32, 44, 120)
