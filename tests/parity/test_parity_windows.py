"""Sliding windows against NeMo AutoModel 0.7.0, whose trainer bounds all layers' context alike."""

from typing import Any

import pytest
from reference import compare_with_nemo, dflash_config, draft_config

SLIDING = {"layer_types": ("sliding_attention",) * 2}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [5, 9])
def test_windowed_domino_equals_nemo(window: int, packed: bool) -> None:
    config = draft_config(sliding_window=window, **SLIDING)
    found = compare_with_nemo(config, packed=packed, gamma=7.0)
    whole = compare_with_nemo(draft_config(), packed=packed, gamma=7.0)
    assert abs(found["loss"] - whole["loss"]) > 1e-3  # the window shows


def test_windowed_dflash_equals_nemo() -> None:
    compare_with_nemo(dflash_config(sliding_window=6, **SLIDING), packed=True)


def test_a_window_over_the_whole_row_is_no_window() -> None:
    options: dict[str, Any] = {"gamma": 7.0}
    wide = compare_with_nemo(draft_config(sliding_window=64, **SLIDING), **options)
    assert wide == pytest.approx(compare_with_nemo(draft_config(), **options), rel=1e-6)
