"""A draft whose heads are not the target's, against NeMo AutoModel 0.7.0.

There the fields are `draft_num_attention_heads` and the like.
"""

import pytest
from reference import compare_with_nemo, draft_config

from domino_jax.config.draft import DraftRecipe, make_draft_config
from domino_jax.config.model import DecoderConfig


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
    recipe = DraftRecipe(
        mask_token_id=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        num_hidden_layers=2,
        block_size=4,
    )
    draft = make_draft_config(recipe, target, special_ids={}, dtype="float32")
    assert (draft.num_attention_heads, draft.num_key_value_heads, draft.head_dim) == (6, 3, 10)
    assert (draft.hidden_size, draft.intermediate_size, draft.vocab_size) == (32, 44, 120)
    plain = make_draft_config(
        DraftRecipe(mask_token_id=3, num_hidden_layers=1), target, special_ids={}, dtype="float32"
    )
    assert (plain.num_attention_heads, plain.num_key_value_heads, plain.head_dim) == (4, 2, 8)
