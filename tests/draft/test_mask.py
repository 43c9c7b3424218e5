"""Who may look where: the dense mask and the context spans against a loop over queries and keys."""

import itertools

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from reference import draft_config, random_anchors, random_batch, slow_document_ids

from domino_jax.draft.mask import block_mask, context_span, layer_spans

LENGTH, SIZE = 24, 3


def slow_mask(
    anchors: np.ndarray,
    keep: np.ndarray,
    seq_lens: np.ndarray | None,
    *,
    window: int | None = None,
    causal: bool = False,
) -> np.ndarray:
    rows, slots = anchors.shape
    documents = None if seq_lens is None else slow_document_ids(seq_lens, LENGTH)
    mask = np.zeros((rows, slots * SIZE, LENGTH + slots * SIZE), bool)
    for b, n, k in itertools.product(range(rows), range(slots), range(SIZE)):
        a = anchors[b, n]
        for j in range(LENGTH):
            same = documents is None or documents[b, j] == documents[b, a]
            near = window is None or (a + k) - j < window
            mask[b, n * SIZE + k, j] = keep[b, n] and j < a and same and near
        for other in range(k + 1 if causal else SIZE):
            mask[b, n * SIZE + k, LENGTH + n * SIZE + other] = True
    return mask


def slots_of(packed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    batch = random_batch(draft_config(), length=LENGTH, packed=packed)
    anchors, keep = random_anchors(draft_config(block_size=SIZE), batch, slots=9)
    anchors[0, 0] = 0  # a real anchor that has no context
    anchors[~keep] = 7  # whatever an unused slot holds, it sees no context
    assert not np.all(keep)
    return anchors, keep, batch.packing.get("seq_lens")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 3, 6])
def test_block_mask_equals_the_loop_and_nemo(packed: bool, window: int | None) -> None:
    import torch
    from nemo_automodel.components.attention.dflash_mask import create_dflash_sdpa_mask

    anchors, keep, seq_lens = slots_of(packed)
    found = block_mask(
        anchors, keep, context_len=LENGTH, block_size=SIZE, seq_lens=seq_lens, window=window
    )
    chex.assert_type(found, bool)
    np.testing.assert_array_equal(found, slow_mask(anchors, keep, seq_lens, window=window))
    assert np.all(np.any(found, axis=-1))  # no empty softmax row

    documents = {}
    if packed:
        ids = torch.tensor(slow_document_ids(seq_lens, LENGTH))
        at_anchors = torch.gather(ids, 1, torch.tensor(anchors.astype(np.int64)))
        documents = {"ctx_doc_id": ids, "anchor_doc_id": at_anchors}
    shape = (torch.tensor(anchors), torch.tensor(keep), LENGTH, SIZE, "cpu", torch.float32)
    nemo = create_dflash_sdpa_mask(*shape, **documents, sliding_window=window)
    np.testing.assert_array_equal(found, nemo[:, 0].numpy() == 0)


def test_block_mask_causal_in_the_block_is_specforges_sliding_layer() -> None:
    anchors, keep, _ = slots_of(packed=False)
    found = block_mask(anchors, keep, context_len=LENGTH, block_size=SIZE, window=4, causal=True)
    np.testing.assert_array_equal(found, slow_mask(anchors, keep, None, window=4, causal=True))
    # SpecForge's own words: context from `anchor + k - (window - 1)` on, own block up to k.
    a, first_query = anchors[0, 3], 3 * SIZE
    for k in range(SIZE):
        seen = np.flatnonzero(found[0, first_query + k])
        context = list(range(max(a + k - 3, 0), a))
        assert seen.tolist() == [
            *context,
            *range(LENGTH + first_query, LENGTH + first_query + k + 1),
        ]


def test_layer_spans_holds_each_type_once() -> None:
    anchors, keep, _ = slots_of(packed=False)
    kinds = ("sliding_attention", "full_attention", "sliding_attention")
    config = draft_config(num_hidden_layers=3, block_size=SIZE, sliding_window=4, layer_types=kinds)
    found = layer_spans(config, anchors, keep)
    assert list(found) == ["full_attention", "sliding_attention"]
    chex.assert_shape(list(found["full_attention"]), (*anchors.shape, 1))
    chex.assert_shape(found["sliding_attention"].first, (*anchors.shape, SIZE))
    windowed = context_span(anchors, keep, block_size=SIZE, window=4)
    chex.assert_trees_all_equal(found["sliding_attention"], windowed)


@pytest.mark.pitfall("context up to and with the anchor", seen="draft/mask.py: the anchor included")
def test_context_span_ends_strictly_before_the_anchor() -> None:
    found = context_span(jnp.array([[0, 1, 5, 5]]), jnp.array([[True, True, True, False]]))
    chex.assert_type(list(found), jnp.int32)
    assert found.first.tolist() == [[[0], [0], [0], [0]]]
    assert found.end.tolist() == [[[0], [1], [5], [0]]]


def test_context_span_stays_in_the_document() -> None:
    lens = jnp.array([[3, 4]])
    found = context_span(jnp.array([[1, 3, 5]]), jnp.ones((1, 3), bool), seq_lens=lens)
    assert found.first.tolist() == [[[0], [3], [3]]] and found.end.tolist() == [[[1], [3], [5]]]
