"""The shapes of target and draft as their checkpoints describe them. No jax here."""

from dataclasses import dataclass

from domino_jax.strict import require

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a Llama- or Qwen3-style decoder, in the names of Hugging Face's config.json.

    `dtype` is the type of matrix products and activations; norms, softmax and logits are float32 always.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuses shapes that no decoder can have."""
        for name, kind in DecoderConfig.__annotations__.items():
            require(kind is not int or getattr(self, name) > 0, f"{name} must be positive, found {getattr(self, name)}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        require(heads % kv_heads == 0, f"num_key_value_heads {kv_heads} must divide num_attention_heads {heads}")
        require(self.head_dim % 2 == 0, f"head_dim must be even for rotary embeddings, found {self.head_dim}")
        require(self.dtype in ("float32", "bfloat16"), f"dtype must be float32 or bfloat16, found {self.dtype!r}")


@dataclass(frozen=True, kw_only=True)
class DraftConfig(DecoderConfig):
    """A draft model as its checkpoint describes it (see `interop/hf.py` for the file format).

    `projector_type` "domino" adds the causal head; None is plain DFlash. `num_target_layers` and
    `target_layer_ids` (0-based layer outputs) say which states of the target the draft reads.

    `layer_types` names each layer "full_attention" or "sliding_attention" (None: all full); a sliding layer sees the
    context less than `sliding_window` positions before its query. Inside the block it looks both ways, or with
    `sliding_in_block` "causal" (SpecForge's rule) only back.

    `input_embedding_scale` multiplies the embedded block; base logits are multiplied by `output_multiplier`, then
    bounded to `final_logit_softcapping * tanh(logits / final_logit_softcapping)`.
    """

    qk_norm: bool = True
    block_size: int
    mask_token_id: int
    num_target_layers: int
    target_layer_ids: tuple[int, ...]
    projector_type: str | None = "domino"
    emb_dim: int = 256
    gru_hidden_dim: int = 1024
    pure_draft_prefix_len: int = 0
    shift_label: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    sliding_in_block: str = "bidirectional"
    input_embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float | None = None

    def __post_init__(self) -> None:
        """Refuses contradictions between fields."""
        super().__post_init__()
        require(self.block_size >= 2, f"block_size must be at least 2, found {self.block_size}")
        require(
            0 <= self.mask_token_id < self.vocab_size,
            f"mask_token_id {self.mask_token_id} is outside the vocabulary of {self.vocab_size}",
        )
        # Not the last layer: config formats disagree on whether its state is taken before or after the final norm.
        require(
            len(self.target_layer_ids) > 0 and all(0 <= i < self.num_target_layers - 1 for i in self.target_layer_ids),
            f"target_layer_ids {list(self.target_layer_ids)} must lie in 0..{self.num_target_layers - 2}",
        )
        require(
            list(self.target_layer_ids) == sorted(set(self.target_layer_ids)),
            f"target_layer_ids {list(self.target_layer_ids)} must rise",
        )
        require(
            self.projector_type in ("domino", None),
            f"projector_type must be 'domino' or null, found {self.projector_type!r}",
        )
        if self.projector_type == "domino":
            require(self.emb_dim > 0 and self.gru_hidden_dim > 0, "emb_dim and gru_hidden_dim must be positive")
            prefix, count = self.pure_draft_prefix_len, self.num_predictions
            require(0 <= prefix < count, f"pure_draft_prefix_len {prefix} leaves none of {count} positions to correct")
        else:
            require(not self.shift_label, "shift_label needs projector_type 'domino': plain DFlash keeps its anchor")
        self._check_windows()
        for name in ("input_embedding_scale", "output_multiplier"):
            require(getattr(self, name) > 0, f"{name} must be positive, found {getattr(self, name)}")
        cap = self.final_logit_softcapping
        require(cap is None or cap > 0, f"final_logit_softcapping must be positive or null, found {cap}")

    def _check_windows(self) -> None:
        types = self.layer_types or ()
        require(
            self.layer_types is None or len(types) == self.num_hidden_layers,
            f"layer_types names {len(types)} layers, num_hidden_layers is {self.num_hidden_layers}",
        )
        unknown = sorted(set(types) - {FULL_ATTENTION, SLIDING_ATTENTION})
        require(not unknown, f"layer_types holds {unknown}; known: {FULL_ATTENTION}, {SLIDING_ATTENTION}")
        window = self.sliding_window
        require(
            (SLIDING_ATTENTION in types) == (window is not None),
            f"sliding_window is {window}, layer_types {list(types)}: a window needs {SLIDING_ATTENTION} layers "
            "and they need a window",
        )
        # A smaller one would cut into the block itself, where trainers and engines disagree.
        require(
            window is None or window >= self.block_size,
            f"sliding_window {window} must be at least block_size {self.block_size}",
        )
        require(
            self.sliding_in_block in ("bidirectional", "causal"),
            f"sliding_in_block must be 'bidirectional' or 'causal', found {self.sliding_in_block!r}",
        )

    @property
    def attention_types(self) -> tuple[str, ...]:
        """The type of each layer's attention."""
        return self.layer_types or (FULL_ATTENTION,) * self.num_hidden_layers

    @property
    def num_predictions(self) -> int:
        """Positions of a block that predict a token: K with `shift_label`, else K - 1."""
        return self.block_size if self.shift_label else self.block_size - 1


def default_target_layer_ids(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """Target layers spread from near the bottom to near the top, one per draft layer.

    Args:
        num_target_layers: depth L of the target.
        num_draft_layers: depth n of the draft.
    Returns:
        `(L // 2,)` for n = 1, else `round(1 + i (L - 4) / (n - 1))`.
    Source: DFlash (arXiv:2602.06036); NeMo AutoModel 0.7.0 `build_target_layer_ids`.
    """
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    return tuple(round(1 + i * (num_target_layers - 4) / (num_draft_layers - 1)) for i in range(num_draft_layers))
