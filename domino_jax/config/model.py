"""A shape that no decoder can have should be refused before a weight is read or a program compiled.

These are the shapes of target and draft as their checkpoints describe them. No jax here: commands
that only check a file answer before it is there.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from domino_jax.base.errors import FLOAT32_LARGEST, FLOAT32_SMALLEST, from_dict, require, shown
from domino_jax.config.heads import HEADS, DominoHeadConfig, HeadConfig, head_kind
from domino_jax.config.sizes import check_positive

FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"

# Turns within the pretraining length above which YaRN leaves a frequency alone, and below which it
# stretches it fully.
YARN_BETA_FAST, YARN_BETA_SLOW = 32.0, 1.0

# What each kind of scaling needs and what else it reads; any other field given is an error.
_ROPE_NEEDS = {
    "linear": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position_embeddings",),
}
_ROPE_READS = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
}
ROPE_TYPES = tuple(_ROPE_NEEDS)
_EXPERT_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched past the pretraining length.

    In the names of Hugging Face's config.json. `rope_type` is "linear" (arXiv:2306.15595), "llama3"
    (Llama 3.1) or "yarn" (arXiv:2309.00071); a field that the type does not read must keep its
    default. What None stands for is said where `layers.rotary_frequencies` reads it.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        """Refuses unknown types, fields missing or of another type, and what stretches nothing."""
        kind = self.rope_type
        require(kind in _ROPE_NEEDS, f"rope_type is {kind!r}; supported: {', '.join(ROPE_TYPES)}")
        for name in _ROPE_NEEDS[kind]:
            require(getattr(self, name) is not None, f"rope_type {kind!r} needs {name}")
        known = ("rope_type", "factor", *_ROPE_NEEDS[kind], *_ROPE_READS.get(kind, ()))
        for field in fields(self):
            value = getattr(self, field.name)
            require(
                field.name in known or value == field.default,
                f"rope_type {kind!r} does not read {field.name}",
            )
            # `truncate` is a bool, which is an int to Python.
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_positive(field.name, value)
        require(self.factor >= 1, f"factor must be at least 1, found {self.factor}")
        low, high = self.low_freq_factor, self.high_freq_factor
        # Equal ones would divide by 0 where Llama 3.1 blends between the two.
        require(
            low is None or high is None or low < high,
            f"low_freq_factor {low} must be below high_freq_factor {high}",
        )
        fast = self.beta_fast or YARN_BETA_FAST
        slow = self.beta_slow or YARN_BETA_SLOW
        require(fast >= slow, f"beta_fast {fast} must not be below beta_slow {slow}")
        require(
            (self.mscale is None) == (self.mscale_all_dim is None),
            "mscale and mscale_all_dim go together",
        )


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """What a target and its draft share: a stack of Llama- or Qwen-style layers.

    In the names of Hugging Face's config.json. `dtype` is the type of matrix products and
    activations; norms, softmax and logits are float32 always.
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
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuses shapes that no decoder can have."""
        # Not `fields(self)`: a subclass's own fields may be 0, and it checks them.
        for name in SIZES:
            check_positive(name, getattr(self, name))
        # Rounded to 0 in float32 it would make NaN of a zero vector.
        eps = self.rms_norm_eps
        require(FLOAT32_SMALLEST <= eps < 1, f"rms_norm_eps must lie between 0 and 1, found {eps}")
        heads = self.num_attention_heads
        kv_heads = self.num_key_value_heads
        require(
            heads % kv_heads == 0,
            f"num_key_value_heads {kv_heads} must divide num_attention_heads {heads}",
        )
        require(
            self.head_dim % 2 == 0,
            f"head_dim must be even for rotary embeddings, found {self.head_dim}",
        )
        # Its powers must fall, and YaRN divides by its logarithm.
        theta = self.rope_theta
        require(theta > 1, f"rope_theta must be above 1, found {theta}")
        require(theta <= FLOAT32_LARGEST, f"rope_theta must be finite in float32, found {theta}")
        require(
            self.dtype in ("float32", "bfloat16"),
            f"dtype must be float32 or bfloat16, found {self.dtype!r}",
        )


# The whole numbers of a shape, which every config.json names alike.
SIZES = tuple(name for name, kind in DecoderShape.__annotations__.items() if kind is int)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(DecoderShape):
    """A target as its checkpoint describes it.

    `attention_bias` gives q, k and v (not o) a bias, as in Qwen2. With `num_experts` above 0 the
    feed-forward part of every layer is a mixture of experts as in Qwen3 MoE, and
    `intermediate_size` is not read by the decoder itself.
    """

    attention_bias: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        """Refuses contradictions between the fields of a mixture of experts."""
        super().__post_init__()
        if self.num_experts == 0:
            given = [name for name in _EXPERT_FIELDS if getattr(self, name)]
            require(not given, f"{', '.join(given)} without num_experts")
            return
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            check_positive(name, getattr(self, name))
        require(
            self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok {self.num_experts_per_tok} must not exceed "
            f"num_experts {self.num_experts}",
        )


@dataclass(frozen=True, kw_only=True)
class DraftConfig(DecoderShape):
    """A draft model as its checkpoint describes it (see `interop/hf.py` for the file format).

    `head` corrects the logits of a block's predictions but the first `pure_draft_prefix_len`;
    None is plain DFlash. With `shift_label` block position k predicts the token `k + 1` after the
    anchor, else the one `k` after it, of which the first is known. `num_target_layers` and
    `target_layer_ids` (0-based layer outputs) say which states of the target the draft reads; the
    last layer's is taken after the target's final norm.

    `layer_types` names each layer "full_attention" or "sliding_attention" (None: all full); a
    sliding layer sees the context less than `sliding_window` positions before its query. Inside the
    block it looks both ways, or with `sliding_in_block` "causal" (SpecForge's rule) only back.

    `input_embedding_scale` multiplies the embedded block; base logits are multiplied by
    `output_multiplier`, then bounded to
    `final_logit_softcapping * tanh(logits / final_logit_softcapping)`.
    """

    qk_norm: bool = True
    block_size: int
    mask_token_id: int
    num_target_layers: int
    target_layer_ids: tuple[int, ...]
    head: HeadConfig | None = dataclasses.field(default_factory=DominoHeadConfig)
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
        for name in ("num_target_layers", "block_size"):
            check_positive(name, getattr(self, name))
        # An unshifted block of one token holds its anchor alone.
        require(
            self.num_predictions >= 1,
            f"block_size {self.block_size} predicts no token without shift_label; use block_size "
            "2 or more, or shift_label true",
        )
        require(
            0 <= self.mask_token_id < self.vocab_size,
            f"mask_token_id {self.mask_token_id} is outside the vocabulary of {self.vocab_size}",
        )
        layers = list(self.target_layer_ids)
        last = self.num_target_layers - 1
        require(
            len(layers) > 0 and all(0 <= layer <= last for layer in layers),
            f"target_layer_ids {shown(layers)} must lie in 0..{last}",
        )
        require(layers == sorted(set(layers)), f"target_layer_ids {shown(layers)} must rise")
        if self.head is not None:
            prefix = self.pure_draft_prefix_len
            count = self.num_predictions
            require(
                0 <= prefix < count,
                f"pure_draft_prefix_len {prefix} leaves the head none of {count} predictions to "
                f"correct; use 0 to {count - 1}",
            )
        self._check_windows()
        for name in ("input_embedding_scale", "output_multiplier", "final_logit_softcapping"):
            value = getattr(self, name)
            require(
                value is None or FLOAT32_SMALLEST <= value <= FLOAT32_LARGEST,
                f"{name} must be positive and finite in float32, found {value}",
            )

    def _check_windows(self) -> None:
        types = self.layer_types or ()
        require(
            self.layer_types is None or len(types) == self.num_hidden_layers,
            f"layer_types names {len(types)} layers, num_hidden_layers is {self.num_hidden_layers}",
        )
        unknown = sorted(set(types) - {FULL_ATTENTION, SLIDING_ATTENTION})
        require(
            not unknown,
            f"layer_types holds {shown(unknown)}; known: {FULL_ATTENTION}, {SLIDING_ATTENTION}",
        )
        window = self.sliding_window
        require(
            (SLIDING_ATTENTION in types) == (window is not None),
            f"sliding_window is {window}, layer_types {shown(list(types))}: "
            f"a window needs {SLIDING_ATTENTION} layers and they need a window",
        )
        # A smaller one would cut into the block itself, where trainers and engines disagree.
        require(
            window is None or window >= self.block_size,
            f"sliding_window {window} must be at least block_size {self.block_size}",
        )
        if window is not None:
            check_positive("sliding_window", window)
        require(
            self.sliding_in_block in ("bidirectional", "causal"),
            "sliding_in_block must be 'bidirectional' or 'causal', "
            f"found {self.sliding_in_block!r}",
        )

    @property
    def projector_type(self) -> str | None:
        """The name of the head, None without one."""
        return None if self.head is None else self.head.projector_type

    @property
    def attention_types(self) -> tuple[str, ...]:
        """The type of each layer's attention."""
        return self.layer_types or (FULL_ATTENTION,) * self.num_hidden_layers

    @property
    def num_predictions(self) -> int:
        """Positions of a block that predict a token: K with `shift_label`, else K - 1."""
        return self.block_size if self.shift_label else self.block_size - 1


# A draft and its head are stored as one flat mapping, in which one would overwrite the other.
_NAMES = {"projector_type"} | {f.name for f in fields(DraftConfig)}
for _kind in HEADS.values():
    _shared = sorted(_NAMES & {f.name for f in fields(_kind)})
    assert not _shared, (
        f"config/heads.py: {_kind.__name__} has fields {_shared}, as DraftConfig has; rename them"
    )


def draft_tree(config: DraftConfig) -> dict[str, Any]:
    """A draft as one flat mapping: `projector_type` names its head, its widths stand at the top."""
    tree = asdict(config)
    head = tree.pop("head") or {}
    return tree | {"projector_type": config.projector_type} | head


def draft_from_dict(tree: Mapping[str, Any], *, source: str) -> DraftConfig:
    """A draft from its flat mapping, strictly; the reverse of `draft_tree`.

    Raises:
        InputError: as `base.errors.from_dict`, or an unknown head.
    """
    rest, head = dict(tree), None
    name = rest.pop("projector_type", DominoHeadConfig.projector_type)
    if name is not None:
        kind = head_kind(name, source=source)
        widths = {f.name: rest.pop(f.name) for f in fields(kind) if f.name in rest}
        head = from_dict(kind, widths, source=source)
    return from_dict(DraftConfig, rest | {"head": head}, source=source)


def default_target_layer_ids(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """Target layers spread from near the bottom to near the top, one per draft layer.

    Args:
        num_target_layers: depth L of the target.
        num_draft_layers: depth n of the draft.
    Returns:
        `(L // 2,)` for n = 1, else `round(1 + i (L - 4) / (n - 1))`.
    Source: DFlash (arXiv:2602.06036); NeMo AutoModel 0.7.0 `build_target_layer_ids`.

    >>> default_target_layer_ids(36, 5)
    (1, 9, 17, 25, 33)
    """
    # Python's `round`, which takes halves to the even number, as the reference does: another
    # rounding would read other layers than the draft was trained on.
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    return tuple(
        round(1 + i * (num_target_layers - 4) / (num_draft_layers - 1))
        for i in range(num_draft_layers)
    )
