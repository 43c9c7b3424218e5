"""The useful FLOPs of a training step: what its result needs, whatever a program computes for it.

The same count serves the figures of a run, plans and benchmarks. Only matrix products count, a
multiplication and its addition as two FLOPs. Useful means:

- a product with a trained weight counts three times (forward, and the gradients of both sides),
  less where one side is frozen: the embeddings, the target's states and the target's head have no
  gradient, and the target itself runs forward only;
- attention counts the keys that may be seen: those before the anchor, half of a row on average (up
  to the window in a sliding layer), those of the block, and for the target those before the token;
- nothing counts twice: no recomputation, padding or unused slot; the vocabulary once per
  prediction, the target's logits once per token, though many blocks may read them.

No jax here: a benchmark's parent must not start it.
"""

from domino_jax.base.scopes import BACKBONE, BLOCK_ATTENTION, CONTEXT, HEAD, TARGET, VOCABULARY_LOSS
from domino_jax.config.model import SLIDING_ATTENTION, DecoderConfig, DecoderShape, DraftConfig


def step_flops(
    draft: DraftConfig,
    length: float,
    anchors: float,
    *,
    target: DecoderConfig | None = None,
    target_logits: bool = False,
) -> dict[str, float]:
    """Useful FLOPs of one row's training step.

    Args:
        draft: with or without head, shifted or not.
        length: S, tokens of the row without its padding; may be a mean.
        anchors: N, blocks that are trained on; may be a mean.
        target: the target where it runs in the step; None where its states are given. The layers
            that the draft reads count, or with `target_logits` all. That its head is tied changes
            nothing.
        target_logits: whether the loss reads the target's distribution (`kl_weight`).
    Returns:
        FLOPs by the stage they belong to (`stages.STAGES`); stages without any are left out.
    """
    width = draft.hidden_size
    vocabulary = draft.vocab_size
    predictions = anchors * draft.num_predictions
    # Twice, not three times: the target's states are frozen and want no gradient.
    fc = 2 * length * len(draft.target_layer_ids) * width * width
    # Keys and values alone: the queries come from the tokens of blocks.
    context_keys = 3 * draft.num_hidden_layers * length * width * 2 * _kv_width(draft)
    block_tokens = anchors * draft.block_size
    products = {
        CONTEXT: fc + context_keys,
        BACKBONE: 3 * draft.num_hidden_layers * block_tokens * _layer_weights(draft),
        BLOCK_ATTENTION: 3 * block_tokens * _block_attention(draft, length),
        # Through the frozen head, and back to the states: it has no gradient of its own.
        VOCABULARY_LOSS: 2 * predictions * vocabulary * width,
    }
    if draft.head is not None:
        products[HEAD] = predictions * draft.head.training_products(width)
        products[VOCABULARY_LOSS] += 3 * predictions * vocabulary * draft.head.emb_dim
    if target_logits:
        products[VOCABULARY_LOSS] += min(length, predictions) * vocabulary * width
    if target is not None:
        # Layers behind the last captured one serve the target's distribution, or rollouts, which
        # are no part of a step.
        last_read = max(draft.target_layer_ids) + 1
        depth = target.num_hidden_layers if target_logits else last_read
        seen = 2 * _heads_width(target) * _mean_seen(length, None)
        products[TARGET] = depth * length * (_layer_weights(target) + seen)
    # Counted up to here: multiplications, each with its addition.
    return {stage: 2.0 * count for stage, count in products.items()}


def _heads_width(config: DecoderShape) -> int:
    return config.num_attention_heads * config.head_dim


def _kv_width(config: DecoderShape) -> int:
    return config.num_key_value_heads * config.head_dim


def _layer_weights(config: DecoderShape) -> int:
    """Weights of a layer that a token is multiplied with; of experts, those that it is sent to."""
    width = config.hidden_size
    # q and o are as wide as the query heads, k and v as those that the queries share.
    attention = width * 2 * (_heads_width(config) + _kv_width(config))
    if not isinstance(config, DecoderConfig) or config.num_experts == 0:
        return attention + 3 * width * config.intermediate_size
    chosen = 3 * width * config.moe_intermediate_size * config.num_experts_per_tok
    # A router scores all experts, though few are chosen.
    return attention + width * config.num_experts + chosen


def _block_attention(draft: DraftConfig, length: float) -> float:
    """Products of a block's token with the keys and values that it sees, over all layers."""
    causal = draft.sliding_in_block == "causal"
    total = 0.0
    for kind in draft.attention_types:
        sliding = kind == SLIDING_ATTENTION
        # Causal in its block: position k sees k + 1 tokens, half the block on average.
        own = (draft.block_size + 1) / 2 if sliding and causal else draft.block_size
        context = _mean_seen(length, draft.sliding_window if sliding else None)
        total += 2 * _heads_width(draft) * (context + own)
    return total


def _mean_seen(length: float, window: int | None) -> float:
    """Tokens before a place of the row, at most `window` of them, on average over its places."""
    if window is None or window >= length:
        return length / 2
    # The first `window` places see half of it on average; they are a share window / length of all.
    return window - window * window / (2 * length)
