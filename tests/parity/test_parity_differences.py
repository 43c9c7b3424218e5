"""The deliberate differences from NeMo AutoModel 0.7.0 that docs/parity.md lists, a test for each.

Each test runs NeMo to show its behaviour, then this project's.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nemo_loop import draft_tensors, nemo_loop, training_lines, twin
from reference import (
    check_close,
    check_metrics,
    dflash_config,
    draft_config,
    make_step,
    nemo_step,
    nemo_trainer,
    our_step,
    random_anchors,
    random_batch,
    random_params,
)
from tiny import quiet

from domino_jax.base.errors import InputError
from domino_jax.config.sections import LossConfig
from domino_jax.objective.curriculum import get_lambda_base
from domino_jax.training.prepare import prepare


def distance(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Distance of all tensors together, relative to the norm of the expected ones."""
    square = sum(np.sum(np.square(found[name] - x)) for name, x in expected.items())
    return math.sqrt(square / sum(np.sum(np.square(x)) for x in expected.values()))


def test_micro_batches_are_weighted_by_their_loss_weight(target: Path, tmp_path: Path) -> None:
    """Two of them give NeMo's update of one large batch; NeMo itself averages their means."""
    rate = {"learning_rate": 5e-3}
    large = {"data": {"batch_size": 16}, "optimizer": rate, "train": {"checkpoint_every": 30}}
    split = large | {"data": {"batch_size": 8}, "optimizer": rate | {"grad_accumulation": 2}}
    config = twin(tmp_path, target, "ours", **split)
    training_lines(config)
    ours = draft_tensors(config, 30)
    one_batch = nemo_loop(twin(tmp_path, target, "large", **large)).parameters[-1]
    check_close(ours, one_batch, relative=1e-5)
    averaged = nemo_loop(twin(tmp_path, target, "split", **split)).parameters[-1]
    assert distance(averaged, one_batch) > 0.005


def test_lambda_counts_batches_without_an_update(target: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "data": {"batch_size": 1},
        "mesh": {"data": 1, "fsdp": 1, "tensor": 8},
        "train": {"steps": 12, "checkpoint_every": 12},
    }
    configs = [twin(tmp_path, target, name, **sections) for name in ("ours", "theirs")]
    # Its answer begins where no block fits into the row any more.
    turns = [{"role": "user", "content": "a " * 18}, {"role": "assistant", "content": "b"}]
    without_anchor = json.dumps({"messages": turns}) + "\n"
    for config in configs:
        rows = Path(str(config.data.train))
        lines = rows.read_text().splitlines(keepends=True)
        rows.write_text("".join(lines[:12]) + 12 * without_anchor)
    ours = training_lines(configs[0])
    theirs = nemo_loop(configs[1])
    updates = sum(line["updates"] for line in ours)
    assert 2 < updates == len(theirs.parameters) < 10
    by_batch = [get_lambda_base(step, 12, 1.0, 1.0) for step in range(12)]
    np.testing.assert_allclose([line["lambda_base"] for line in ours], by_batch, atol=1e-6)
    np.testing.assert_allclose(theirs.lambdas, by_batch[: len(theirs.lambdas)], atol=1e-6)
    # The learning rate counts updates in both.
    trained = [line["learning_rate"] for line in ours if line["updates"]]
    np.testing.assert_allclose(trained, theirs.rates, rtol=1e-6)


def test_the_logged_learning_rate_is_that_of_the_update(target: Path, tmp_path: Path) -> None:
    """NeMo's log line has the rate of the update to come."""
    sections = {"train": {"steps": 4, "checkpoint_every": 4}}
    ours = training_lines(twin(tmp_path, target, "ours", **sections))
    theirs = nemo_loop(twin(tmp_path, target, "theirs", **sections))
    np.testing.assert_allclose([line["learning_rate"] for line in ours], theirs.rates, rtol=1e-6)
    np.testing.assert_allclose(theirs.logged_rates[:-1], theirs.rates[1:], rtol=1e-6)


def test_steps_run_over_the_end_of_an_epoch(target: Path, tmp_path: Path) -> None:
    """24 rows in steps of 16: NeMo ends each epoch with a smaller step, here it goes on."""
    from nemo_automodel.recipes.llm._spec_train_utils import optim_steps_per_epoch

    sections = {"optimizer": {"grad_accumulation": 2}, "train": {"steps": None, "epochs": 3}}
    run = prepare(twin(tmp_path, target, "ours", **sections), reporter=quiet()).inputs
    assert 3 * optim_steps_per_epoch(24 // 8, 2) == 6
    assert run.last_step == 3 * 24 // 16 == 4


@pytest.mark.parametrize("gamma", [0.0, -2.0])
def test_a_gamma_that_is_not_positive_means_no_decay(gamma: float) -> None:
    """NeMo's DFlash divides by it: NaN at 0, weights that grow along the block below."""
    config = dflash_config()
    params, batch = random_params(config), random_batch(config)
    anchors = random_anchors(config, batch, slots=11)
    trainer = nemo_trainer(config, params, batch, loss_decay_gamma=gamma)
    theirs, _ = nemo_step(trainer, batch, anchors=anchors)
    found, gradient = our_step(
        make_step(config, loss_decay_gamma=gamma), config, params, batch, anchors=anchors
    )
    assert (
        math.isnan(theirs["loss"]) if gamma == 0 else theirs["loss_weight"] > theirs["valid_tokens"]
    )
    undecayed = nemo_trainer(config, params, batch, loss_decay_gamma=None)
    expected, expected_gradient = nemo_step(undecayed, batch, anchors=anchors)
    check_metrics(found, expected)
    check_close(gradient, expected_gradient, relative=1e-4)
    with pytest.raises(InputError, match="loss_decay_gamma must be above 0"):
        LossConfig(loss_decay_gamma=gamma)


def test_a_prefix_as_long_as_the_predictions_is_refused() -> None:
    """In NeMo the head then corrects nothing and is never trained."""
    config = draft_config()
    params, batch = random_params(config), random_batch(config)
    trainer = nemo_trainer(config, params, batch)
    trainer.draft_model.pure_draft_prefix_len = config.num_predictions
    theirs, gradient = nemo_step(
        trainer, batch, anchors=random_anchors(config, batch, slots=11), lambda_base=0.5
    )
    assert theirs["final_loss"] == theirs["base_loss"]
    assert not np.any(gradient["embed_proj.2.weight"])
    with pytest.raises(InputError, match="pure_draft_prefix_len 5 leaves the head none of 5"):
        dataclasses.replace(config, pure_draft_prefix_len=5)


def test_a_window_shorter_than_the_block_is_refused() -> None:
    """NeMo trains with it: late positions of a block see no context at all."""
    config = draft_config(sliding_window=5, layer_types=("sliding_attention",) * 2)
    params, batch = random_params(config), random_batch(config)
    trainer = nemo_trainer(config, params, batch)
    trainer.sliding_window = 2
    anchors = random_anchors(config, batch, slots=11)
    assert math.isfinite(nemo_step(trainer, batch, anchors=anchors, lambda_base=0.5)[0]["loss"])
    with pytest.raises(InputError, match="sliding_window 2 must be at least block_size 5"):
        dataclasses.replace(config, sliding_window=2)
