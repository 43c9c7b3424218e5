"""Shapes, workloads and settings of the benchmarks.

A workload is the published Domino recipe, cut to one row, on a Qwen3 target of some widths; its
settings are that row with few or many anchors, from given features (draft only) or with the frozen
target's forward in the step (online). Nothing here imports jax or torch: the process that lets both
sides take turns must not hold a part of the card itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from domino_jax.config.heads import DominoHeadConfig
from domino_jax.config.model import (
    DecoderConfig,
    DecoderShape,
    DraftConfig,
    default_target_layer_ids,
)

MODES = ("draft", "online")
LAMBDA_BASE, LEARNING_RATE, BETAS = 0.5, 6e-4, (0.9, 0.95)
LOSS_DECAY_GAMMA, CLIP_NORM = 7.0, 1.0

QWEN3_8B = DecoderConfig(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    rope_theta=1e6,
    qk_norm=True,
    tie_word_embeddings=False,
)
SHAPES = {
    "qwen3-8b": QWEN3_8B,
    "qwen3-4b": replace(
        QWEN3_8B, hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True
    ),
    "smollm2": replace(  # its widths
        QWEN3_8B,
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
    ),
}
TINY = replace(
    QWEN3_8B,
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
DRAFT_LAYERS = {36: 5, 30: 3, 5: 2}  # by the target's


@dataclass(frozen=True)
class Workload:
    """A target's shape with the rows that are trained on it: S, the choices of N, and the modes.

    `chunk_blocks`: blocks whose logits exist together; 52 is what a row takes on 80 GiB.
    """

    shape: str
    length: int
    anchors: tuple[int, ...]
    modes: tuple[str, ...] = MODES
    chunk_blocks: int = 52


WORKLOADS = {
    "small": Workload("smollm2", 512, (64,), ("draft",), chunk_blocks=16),
    "wide": Workload("smollm2", 512, (256,), ("draft",), chunk_blocks=16),
    "long": Workload("smollm2", 4096, (64,), ("draft",), chunk_blocks=16),
    "qwen3-4b": Workload("qwen3-4b", 2048, (256, 512)),
    "qwen3-8b": Workload("qwen3-8b", 2048, (256, 512)),
    # The one published step time of another trainer: SpecForge on an H200, 105.6 ms a sample.
    "specforge": Workload("qwen3-8b", 768, (256,), ("draft",)),
}


def target_config(shape: str, *, dtype: str, tiny: bool) -> DecoderConfig:
    """The target of a shape; `tiny` keeps only whether its head is tied."""
    full = SHAPES[shape]
    if tiny:
        return replace(TINY, dtype=dtype, tie_word_embeddings=full.tie_word_embeddings)
    return replace(full, dtype=dtype)


def draft_config(target: DecoderConfig, *, domino: bool = True) -> DraftConfig:
    """The published Domino draft of a target, or without its head the DFlash draft beside it."""
    tiny = target.hidden_size == TINY.hidden_size
    depth = DRAFT_LAYERS[target.num_hidden_layers]
    shape = {field.name: getattr(target, field.name) for field in fields(DecoderShape)}
    head = DominoHeadConfig(emb_dim=16, gru_hidden_dim=32) if tiny else DominoHeadConfig()
    return DraftConfig(
        **(shape | {"num_hidden_layers": depth}),
        block_size=4 if tiny else 16,
        mask_token_id=min(151669, target.vocab_size - 1),
        num_target_layers=target.num_hidden_layers,
        target_layer_ids=default_target_layer_ids(target.num_hidden_layers, depth),
        head=head if domino else None,
        pure_draft_prefix_len=1 if domino else 0,
        shift_label=domino,
    )


@dataclass(frozen=True)
class Setting:
    """One measured step: a row of a workload with N anchors, draft only or online."""

    workload: str
    anchors: int
    mode: str
    tiny: bool

    @property
    def shape(self) -> str:
        """Whose target it is."""
        return WORKLOADS[self.workload].shape

    @property
    def length(self) -> int:
        """S."""
        return WORKLOADS[self.workload].length // (32 if self.tiny else 1)

    @property
    def num_anchors(self) -> int:
        """N, as it is run."""
        return self.anchors // (64 if self.tiny else 1)


def settings(
    workload: str, *, anchors: Sequence[int], modes: Sequence[str], tiny: bool
) -> list[Setting]:
    """The settings of a workload, all of them or those with the given anchors and modes."""
    row = WORKLOADS[workload]
    chosen = [mode for mode in row.modes if not modes or mode in modes]
    counts = anchors or row.anchors
    return [Setting(workload, count, mode, tiny) for mode in chosen for count in counts]
