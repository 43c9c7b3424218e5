"""Who may look where: the dense mask and the context mask against a loop over queries and keys."""

import itertools

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from nemo_automodel.components.attention.dflash_mask import create_dflash_sdpa_mask
from reference import draft_config, random_anchors, random_batch, slow_document_ids

from domino_jax.draft.mask import block_mask, context_mask

LENGTH, SIZE = 24, 3


def slow_mask(anchors: np.ndarray, keep: np.ndarray, seq_lens: np.ndarray | None) -> np.ndarray:
    rows, slots = anchors.shape
    documents = None if seq_lens is None else slow_document_ids(seq_lens, LENGTH)
    mask = np.zeros((rows, slots * SIZE, LENGTH + slots * SIZE), bool)
    for b, n, k in itertools.product(range(rows), range(slots), range(SIZE)):
        a = anchors[b, n]
        for j in range(LENGTH):
            same = documents is None or documents[b, j] == documents[b, a]
            mask[b, n * SIZE + k, j] = keep[b, n] and j < a and same
        for other in range(SIZE):
            mask[b, n * SIZE + k, LENGTH + n * SIZE + other] = True
    return mask


@pytest.mark.parametrize("packed", [False, True])
def test_block_mask_equals_the_loop_and_nemo(packed: bool) -> None:
    batch = random_batch(draft_config(), length=LENGTH, packed=packed)
    anchors, keep = random_anchors(draft_config(block_size=SIZE), batch, slots=9)
    anchors[0, 0] = 0  # a real anchor that has no context
    anchors[~keep] = 7  # whatever an unused slot holds, it sees no context
    seq_lens = batch.packing.get("seq_lens")
    expected = slow_mask(anchors, keep, seq_lens)
    found = block_mask(anchors, keep, context_len=LENGTH, block_size=SIZE, seq_lens=seq_lens)
    chex.assert_type(found, bool)
    np.testing.assert_array_equal(found, expected)
    assert not np.all(keep)
    assert np.all(np.any(found, axis=-1))  # no empty softmax row

    documents = {}
    if packed:
        ids = torch.tensor(slow_document_ids(seq_lens, LENGTH))
        at_anchors = torch.gather(ids, 1, torch.tensor(anchors.astype(np.int64)))
        documents = {"ctx_doc_id": ids, "anchor_doc_id": at_anchors}
    shape = (torch.tensor(anchors), torch.tensor(keep), LENGTH, SIZE, "cpu", torch.float32)
    np.testing.assert_array_equal(found, create_dflash_sdpa_mask(*shape, **documents)[:, 0].numpy() == 0)


def test_context_mask_ends_strictly_before_the_anchor() -> None:
    found = context_mask(jnp.array([[0, 1, 5, 5]]), jnp.array([[True, True, True, False]]), context_len=6)
    assert found.sum(axis=-1).tolist() == [[0, 1, 5, 0]]
    assert not found[0, 2, 5] and found[0, 2, 4]


def test_context_mask_stays_in_the_document() -> None:
    lens = jnp.array([[3, 4]])
    found = context_mask(jnp.array([[1, 3, 5]]), jnp.ones((1, 3), bool), context_len=8, seq_lens=lens)
    assert [np.flatnonzero(row).tolist() for row in found[0]] == [[0], [], [3, 4]]
