"""Drafts' scaled rotary embeddings against NeMo AutoModel 0.7.0, which reads them from exports."""

from typing import Any

import pytest
from reference import compare_with_nemo, draft_config

from domino_jax.config.model import RopeScaling

SCALINGS: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("packed", [False, True])
def test_draft_with_scaled_rotary_embedding_equals_nemo(name: str, packed: bool) -> None:
    scaled = draft_config(rope_scaling=RopeScaling(**SCALINGS[name]))
    found = compare_with_nemo(scaled, length=48, packed=packed)
    plain = compare_with_nemo(draft_config(), length=48, packed=packed)
    assert abs(found["loss"] - plain["loss"]) > 1e-4  # the scaling shows
