"""Training blocks: anchors drawn over each row, and a block of K tokens cut at each.

A block stands for a moment of decoding: its anchor is known, the tokens after it are to be drafted.
Here K = 4 from place `a` (`_` is the mask token, `-` nothing):

    block position k                 0      1      2      3
    noise_ids                        a      _      _      _     rotary positions a .. a + 3
    target_ids with shift_label    a + 1  a + 2  a + 3  a + 4   M = K, prediction m = k
    previous_ids                     a    a + 1  a + 2  a + 3   the token just before each target
    target_ids without               -    a + 1  a + 2  a + 3   M = K - 1, prediction m = k - 1
    previous_ids                     -      a    a + 1  a + 2
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from domino_jax.config.model import DraftConfig


class Packing(NamedTuple):
    """Where documents lie in packed rows.

    `position_ids` int32 [B, S] restarts at each document, `seq_lens` int32 [B, documents] are
    lengths (0 is padding), `doc_remaining` int32 [B, S] counts the real tokens that follow in the
    same document.
    """

    position_ids: jax.Array
    seq_lens: jax.Array
    doc_remaining: jax.Array


class Anchors(NamedTuple):
    """The slots of a batch: where its blocks begin.

    `positions` int32 [B, N], ascending over the used slots and 0 in the unused ones, which come
    last; `keep` bool [B, N], False for an unused slot.
    """

    positions: jax.Array
    keep: jax.Array


class Blocks(NamedTuple):
    """The drawn blocks of a batch.

    `noise_ids` int32 [B, N, K] is the anchor's token followed by mask tokens, `positions` int32
    [B, N, K] its rotary positions. Prediction m of a block is the token at `anchor + 1 + m`:
    `target_ids` int32 [B, N, M], supervised by `mask` float32 [B, N, M], its share of the loss;
    `previous_ids` int32 [B, N, M] is the token just before it.
    """

    noise_ids: jax.Array
    positions: jax.Array
    previous_ids: jax.Array
    target_ids: jax.Array
    mask: jax.Array


def anchor_candidates(
    loss_mask: jax.Array,
    *,
    block_size: int,
    doc_remaining: jax.Array | None = None,
    rule: str = "nemo",
) -> jax.Array:
    """Positions a block may start at.

    Args:
        loss_mask: [B, S], above 0.5 where the token is supervised.
        block_size: K.
        doc_remaining: int [B, S] for packed rows; the block ("specforge": its first label) must lie
            in its document.
        rule: "nemo": the token is supervised and the block ends inside the row. "specforge": the
            token and the next one are supervised; labels past the row's end count as unsupervised.
    Returns:
        bool [B, S].
    Raises:
        ValueError: another rule.
    Source: NeMo AutoModel 0.7.0, `DFlashTrainerModule._sample_anchor_positions`; SpecForge 0.2.0,
    its namesake.
    """
    # Above one half, as in the reference; a smaller share weighs in the loss and starts no block.
    supervised = loss_mask > 0.5
    length = loss_mask.shape[1]
    if rule == "nemo":
        # A row shorter than a block keeps position 0, as in the reference: its labels end early.
        candidates = supervised & (jnp.arange(length) <= max(length - block_size, 0))
        needed = block_size - 1
    elif rule == "specforge":
        candidates = supervised & jnp.pad(supervised[:, 1:], ((0, 0), (0, 1)))
        needed = 1
    else:
        raise ValueError(f"anchor_rule must be 'nemo' or 'specforge', found {rule!r}")
    return candidates if doc_remaining is None else candidates & (doc_remaining >= needed)


def sample_anchors(key: jax.Array, candidates: jax.Array, *, num_anchors: int) -> Anchors:
    """Draws anchors uniformly without replacement into a static number of slots.

    Args:
        candidates: bool [B, S].
        num_anchors: N; more than the candidates leaves slots unused.
    """
    batch, length = candidates.shape
    drawn = min(num_anchors, length)
    # How many candidates there are is data, and no shape may depend on it: all positions are drawn,
    # and 2 is above every draw from [0, 1), so that candidates come first.
    ranks = jnp.where(candidates, jax.random.uniform(key, (batch, length)), 2.0)
    order = jnp.argsort(ranks, axis=1)[:, :drawn]
    keep = jnp.take_along_axis(candidates, order, axis=1)
    # Sorted, so that neighbouring blocks see much the same context, which the kernels' tiles live
    # on. `length` is past every anchor: unused slots go last and are known by it.
    anchors = jnp.sort(jnp.where(keep, order, length), axis=1)
    anchors = jnp.pad(anchors, ((0, 0), (0, num_anchors - drawn)), constant_values=length)
    keep = anchors < length
    return Anchors(jnp.where(keep, anchors, 0).astype(jnp.int32), keep)


def make_blocks(
    input_ids: jax.Array,
    loss_mask: jax.Array,
    anchors: Anchors,
    *,
    cfg: DraftConfig,
    packing: Packing | None = None,
    prefix_lengths: jax.Array | None = None,
) -> Blocks:
    """Cuts the blocks that start at the anchors.

    Prediction m is the token `1 + m` after the anchor.

    Args:
        input_ids: int [B, S].
        loss_mask: [B, S], supervised tokens, or the share in which each is.
        anchors: of the blocks.
        cfg: the draft.
        packing: documents of packed rows; labels stop at the end of the anchor's document.
        prefix_lengths: int32 [B, N], how many positions of each block show their real token and are
            not supervised; None shows the anchor alone.
    Source: NeMo AutoModel 0.7.0, `_create_noise_embed`, `_create_vp_noise_embed` and
    `_build_block_targets`.
    """
    starts, keep = anchors
    length = input_ids.shape[1]
    offsets = jnp.arange(cfg.block_size, dtype=jnp.int32)
    predictions = jnp.arange(cfg.num_predictions, dtype=jnp.int32)

    shown = jnp.ones_like(starts) if prefix_lengths is None else prefix_lengths
    index = starts[..., None] + offsets
    real = (offsets < shown[..., None]) & keep[..., None] & (index < length)
    read = _gather(input_ids, jnp.minimum(index, length - 1))
    noise_ids = jnp.where(real, read, cfg.mask_token_id)
    first = starts if packing is None else _gather(packing.position_ids, starts)

    label_index = starts[..., None] + 1 + predictions
    inside = label_index < length
    if packing is not None:
        inside &= 1 + predictions <= _gather(packing.doc_remaining, starts)[..., None]
    if prefix_lengths is not None:
        inside &= 1 + predictions >= prefix_lengths[..., None]
    # Past the end of the row any token will do: the mask is 0 there.
    clamped = jnp.minimum(label_index, length - 1)
    supervised = _gather(loss_mask, clamped).astype(jnp.float32)
    return Blocks(
        noise_ids=noise_ids.astype(jnp.int32),
        positions=first[..., None] + offsets,
        previous_ids=_gather(input_ids, jnp.minimum(label_index - 1, length - 1)),
        target_ids=_gather(input_ids, clamped),
        mask=jnp.where(keep[..., None] & inside, supervised, 0.0),
    )


def sample_prefix_lengths(
    key: jax.Array, shape: tuple[int, ...], *, block_size: int, weight_base: float
) -> jax.Array:
    """Draws how many positions of each block show their real token, int32 `shape`.

    A length l of `min(2, K - 1)` to K - 1 is drawn with a probability proportional to
    `weight_base ** l`.

    Args:
        shape: (B, N).
        block_size: K.
        weight_base: positive; below 1 favours short prefixes.
    Source: NeMo AutoModel 0.7.0, `DFlashTrainerModule._sample_prefix_lengths`.
    """
    lengths = jnp.arange(min(2, block_size - 1), block_size, dtype=jnp.int32)
    drawn = jax.random.categorical(key, lengths * jnp.log(weight_base), shape=shape)
    return lengths[drawn]


def document_ids(seq_lens: jax.Array, length: int) -> jax.Array:
    """The document each position of a packed row belongs to, int32 [B, length].

    Args:
        seq_lens: int [B, documents], 0 for padding.
        length: S of the row.

    >>> document_ids(jnp.array([[3, 2, 0]]), 7).tolist()
    [[0, 0, 0, 1, 1, 3, 3]]
    """
    # The first document that ends after a position is its own, so never an empty one. What stands
    # after the last of them gets a number that no document has.
    ends = jnp.cumsum(seq_lens, axis=1)
    ended = ends[:, None, :] <= jnp.arange(length)[None, :, None]
    return jnp.sum(ended, axis=-1).astype(jnp.int32)


def _gather(values: jax.Array, index: jax.Array) -> jax.Array:  # [B, S], [B, ...] -> [B, ...]
    return jax.vmap(lambda row, at: row[at])(values, index)
