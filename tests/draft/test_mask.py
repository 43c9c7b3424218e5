"""Who may look where: the context spans against a loop over queries and keys."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from reference import draft_config, random_anchors, random_batch, slow_document_ids, slow_mask

from domino_jax.draft.mask import context_span, layer_spans

LENGTH, SIZE = 24, 3


def slots_of(packed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    batch = random_batch(draft_config(), length=LENGTH, packed=packed)
    anchors, keep = random_anchors(draft_config(block_size=SIZE), batch, slots=9)
    anchors[0, 0] = 0  # a real anchor that has no context
    anchors[~keep] = 7  # whatever an unused slot holds, it sees no context
    assert not np.all(keep)
    return anchors, keep, batch.packing.get("seq_lens")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 3, 6])
def test_context_span_and_nemo_equal_the_loop(packed: bool, window: int | None) -> None:
    import torch
    from nemo_automodel.components.attention.dflash_mask import create_dflash_sdpa_mask

    anchors, keep, seq_lens = slots_of(packed)
    expected = slow_mask(anchors, keep, seq_lens, length=LENGTH, size=SIZE, window=window)
    span = context_span(anchors, keep, seq_lens=seq_lens, block_size=SIZE, window=window)
    chex.assert_type(list(span), jnp.int32)
    places = np.arange(LENGTH)
    found = (span.first[..., None] <= places) & (places < span.end[..., None])
    found = np.broadcast_to(found, (*anchors.shape, SIZE, LENGTH))
    context = expected[..., :LENGTH]
    np.testing.assert_array_equal(found.reshape(context.shape), context)

    documents = {}
    if packed:
        ids = torch.tensor(slow_document_ids(seq_lens, LENGTH))
        at_anchors = torch.gather(ids, 1, torch.tensor(anchors.astype(np.int64)))
        documents = {"ctx_doc_id": ids, "anchor_doc_id": at_anchors}
    shape = (torch.tensor(anchors), torch.tensor(keep), LENGTH, SIZE, "cpu", torch.float32)
    nemo = create_dflash_sdpa_mask(*shape, **documents, sliding_window=window)
    np.testing.assert_array_equal(nemo[:, 0].numpy() == 0, expected)


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
