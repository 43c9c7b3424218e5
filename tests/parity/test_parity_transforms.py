"""`input_embedding_scale`, `output_multiplier`, `final_logit_softcapping` against NeMo 0.7.0."""

from typing import Any

import pytest
from doubles import slow_after
from reference import compare_with_nemo, dflash_config, draft_config


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
    plain = compare_with_nemo(make())
    assert abs(found["loss"] - plain["loss"]) > 1e-3
