"""A packed row trains as its conversations alone do, target included.

A packed run resumes with the same bits.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import draft_config, random_params, target_config
from saved_bits import final_bits
from tiny import Heard, quiet, run_config, stack_layers
from whole_run import train

from domino_jax.base.errors import Interrupted
from domino_jax.config.run import load_config
from domino_jax.data.conversations import Row
from domino_jax.data.pipeline import heldout_batches
from domino_jax.draft.blocks import document_ids
from domino_jax.objective.modules import build_trainer
from domino_jax.target.decoder import Target
from domino_jax.training.prepare import prepare

CONFIG = draft_config(num_target_layers=6, target_layer_ids=(1, 3))
LENGTHS, ROOM = (13, 8, 11), 36


def frozen_target() -> tuple[Target, Any]:
    """The target and its stacked parameters, large enough for each layer to show."""
    shape = target_config(CONFIG)
    variables = Target(shape).init(jax.random.key(2), jnp.zeros((1, 4), jnp.int32))
    params = nn.meta.unbox(variables)["params"]
    larger = jax.tree.map(lambda x: x * (4.0 if x.ndim == 2 else 1.0), params)
    return Target(shape, capture=CONFIG.target_layer_ids, scan_layers=True), stack_layers(larger)


def summed_loss(lm_head: jax.Array) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A batch's loss and its weight, both as sums over its blocks, from the tokens on."""
    target, frozen = frozen_target()
    trainer = build_trainer(CONFIG, loss_decay_gamma=7.0)

    @jax.jit
    def summed(params: Any, batch: dict[str, Any], anchors: jax.Array) -> Any:
        ids, names = batch["input_ids"], ("position_ids", "seq_lens", "doc_remaining")
        packing = {name: batch[name] for name in names if name in batch}
        documents = document_ids(batch["seq_lens"], ROOM) if packing else None
        positions = batch.get("position_ids")
        states = target.apply({"params": frozen}, ids, positions, documents=documents).features
        metrics = trainer.apply(
            {"params": {"draft_model": params}},
            ids,
            states,
            batch["loss_mask"],
            lm_head,
            frozen["embed_tokens"],
            lambda_base=0.3,
            **packing,
            anchor_positions=anchors,
            block_keep_mask=jnp.ones(anchors.shape, bool),
        )
        return metrics.loss * metrics.loss_weight, metrics.loss_weight

    return summed


def test_a_packed_row_equals_its_conversations_alone() -> None:
    rng = np.random.default_rng(0)
    rows = [Row(rng.integers(0, 100, n).astype(np.int32), rng.random(n) < 0.8) for n in LENGTHS]
    head = jnp.asarray(rng.standard_normal((CONFIG.vocab_size, CONFIG.hidden_size)), jnp.float32)
    loss_and_gradient = jax.value_and_grad(summed_loss(head), has_aux=True)
    params = random_params(CONFIG)

    def measured(packs: Any, anchors: list[list[int]]) -> Any:
        size = len(anchors)
        batch = next(heldout_batches(rows, packs=packs, batch_size=size, max_length=ROOM))
        values = loss_and_gradient(params, batch, jnp.asarray(anchors, jnp.int32))
        return jax.tree.map(np.asarray, values)

    # The last block of each starts where it just fits, so that its labels reach over the end of its
    # conversation.
    alone = [[2, 5, n - CONFIG.block_size] for n in LENGTHS]
    begins = np.cumsum([0, *LENGTHS[:-1]])
    together = [
        [int(begin) + anchor for begin, row in zip(begins, alone, strict=True) for anchor in row]
    ]
    (loss, weight), grads = measured(None, alone)
    (packed_loss, packed_weight), packed_grads = measured([(0, 1, 2)], together)
    np.testing.assert_allclose(packed_weight, weight, rtol=1e-6)
    assert weight > 10
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (grads, packed_grads)), strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(one)


PACKED: dict[str, Any] = {"data": {"max_length": 64, "packing": True}, "train": {"log_every": 1}}


@pytest.mark.slow
def test_a_packed_run_interrupted_ends_with_the_same_bits(target: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for directory in (whole, parts):
        directory.mkdir()
    train(load_config(run_config(whole, target, **PACKED)), reporter=quiet())
    config = load_config(run_config(parts, target, **PACKED))
    asked = iter(range(100))
    with pytest.raises(Interrupted, match="stopped at step 3 of 6"):
        train(config, reporter=quiet(), stop_requested=lambda: next(asked) + 1 >= 3)
    train(config, reporter=quiet())
    chex.assert_trees_all_equal(final_bits(whole / "run", 6), final_bits(parts / "run", 6))


def test_epochs_and_waste_are_counted_in_packed_rows(target: Path, tmp_path: Path) -> None:
    path = run_config(tmp_path, target, data=PACKED["data"], train={"steps": None, "epochs": 4})
    shares = []
    for packing, count in (("false", "24 rows"), ("true", "rows packed from 24")):
        words = [f"data.packing={packing}", f"run_dir={tmp_path / packing}"]
        heard = Heard()
        run = prepare(load_config(path, words), reporter=heard).inputs
        line = next(line for line in heard.text.splitlines() if line.startswith("training: "))
        assert count in line
        shares.append(float(line.partition("(")[2].partition("%")[0]))
        assert run.last_step == 4 * run.rows.epoch_rows // 8
    assert run.rows.epoch_rows == 11
    tokens = sum(len(row.input_ids) for row in run.rows.rows)
    assert shares == pytest.approx(
        [100 * (1 - tokens / (64 * 24)), 100 * (1 - tokens / (64 * 11))], abs=0.06
    )
