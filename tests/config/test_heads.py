"""A head of one's own: what its fields may be called, and what must know them."""

import runpy
from dataclasses import dataclass
from typing import Any

import pytest

from domino_jax.config import draft, model
from domino_jax.config.heads import HEADS, DominoHeadConfig, head_kind


@dataclass(frozen=True, kw_only=True)
class AttentionHead(DominoHeadConfig):
    """A head that calls its width as the draft calls one of its own."""

    head_dim: int = 4


@dataclass(frozen=True, kw_only=True)
class DecayHead(DominoHeadConfig):
    """A head with a field that no run could set."""

    decay: float = 0.5


@pytest.mark.parametrize(
    ("kind", "module", "message"),
    [
        (AttentionHead, model, r"config/heads\.py: AttentionHead has fields \['head_dim'\]"),
        (DecayHead, draft, r"config/draft\.py: DraftRecipe lacks \['decay'\], fields of DecayHead"),
    ],
)
def test_a_head_that_does_not_fit_is_named_with_the_file_to_mend(
    kind: type, module: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HEADS, "own", kind)
    with pytest.raises(AssertionError, match=message):
        runpy.run_path(module.__file__)


def test_heads_are_known_by_name() -> None:
    assert {"domino": DominoHeadConfig} == HEADS
    assert head_kind("domino", source="file") is DominoHeadConfig
