"""The smallest settings of a run and of both models, as mappings."""

from typing import Any

from domino_jax.config.model import RopeScaling

SMALLEST: dict[str, Any] = {
    "run_dir": "runs/x",
    "target": "smollm2-135m-instruct",
    "draft": {"mask_token_id": 5},
    "data": {"train": "train.jsonl"},
}


DECODER: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
}


DRAFT: dict[str, Any] = DECODER | {
    "block_size": 4,
    "mask_token_id": 31,
    "num_target_layers": 6,
    "target_layer_ids": (1, 3),
}


LLAMA3 = RopeScaling(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
