"""A head is chosen by name and sized by few fields, and a run with another head is another run.

So each kind has a config of its own here, which checkpoints and runs name `projector_type`. What it
computes is `draft/head.py`'s. No jax here.
"""

from dataclasses import dataclass, fields
from types import NoneType
from typing import ClassVar, TypeAlias, get_args

from domino_jax.base.errors import InputError, shown
from domino_jax.config.sizes import check_positive


@dataclass(frozen=True, kw_only=True)
class DominoHeadConfig:
    """The widths of a Domino head: R of its correction and G of its GRU (`draft/head.py`)."""

    projector_type: ClassVar[str] = "domino"

    emb_dim: int = 256
    gru_hidden_dim: int = 1024

    def __post_init__(self) -> None:
        """Refuses widths that no head can have."""
        for field in fields(self):
            check_positive(field.name, getattr(self, field.name))

    def training_products(self, width: int) -> int:
        """Multiplications of one prediction, forward and backward, before the last product.

        Args:
            width: D. The GRU's inputs are frozen embeddings, which need no gradient.
        """
        gru = 3 * self.gru_hidden_dim * (2 * width + 3 * self.gru_hidden_dim)
        return gru + 3 * self.emb_dim * (width + self.gru_hidden_dim)


# Every kind of head; each has `emb_dim`, the width of its correction.
HeadConfig: TypeAlias = DominoHeadConfig
# By the name that checkpoints and runs give them; None, plain DFlash, has none.
HEADS: dict[str, type[HeadConfig]] = {
    kind.projector_type: kind for kind in get_args(HeadConfig | None) if kind is not NoneType
}


def head_kind(name: object, *, source: str) -> type[HeadConfig]:
    """The class of the head with this name.

    Raises:
        InputError: there is none.
    """
    found = HEADS.get(name) if isinstance(name, str) else None
    if found is None:
        known = ", ".join(map(repr, HEADS))
        raise InputError(f"{source}: projector_type must be {known} or null, found {shown(name)}")
    return found
