"""Drafts that start as the top of their target."""

import dataclasses
from collections import Counter
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, quiet, run_config

from domino_jax.config.run import load_config
from domino_jax.formats.safetensors import StoredTensor
from domino_jax.target.decoder import Target
from domino_jax.target.load import load_target
from domino_jax.training.prepare import prepare
from domino_jax.training.run import Run
from domino_jax.training.start import draft_from_target


@pytest.fixture(scope="module")
def fresh(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose draft starts at random."""
    path = run_config(tmp_path_factory.mktemp("fresh"), target)
    return prepare(load_config(path), reporter=quiet())


def test_draft_from_target_starts_as_the_top_of_the_target(target: Path, fresh: Run) -> None:
    params, loaded = jax.device_get(fresh.state.params), load_target(target)
    started = jax.device_get(draft_from_target(fresh.inputs.record.config, params, loaded.params))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, started)
    chex.assert_trees_all_equal(started["layers_0"], jax.device_get(loaded.params["layers_3"]))
    chex.assert_trees_all_equal(started["norm"], jax.device_get(loaded.params["norm"]))
    states = (
        np.random.default_rng(0).standard_normal((2, 2 * CONFIG.hidden_size)).astype(np.float32)
    )
    np.testing.assert_array_equal(
        states @ started["fc"]["weight"].T, states[:, CONFIG.hidden_size :]
    )
    assert started["head"] is params["head"] or np.array_equal(
        started["head"]["embed_proj_2"], params["head"]["embed_proj_2"]
    )


def test_draft_from_target_takes_what_a_dense_draft_has(fresh: Run) -> None:
    params = jax.device_get(fresh.state.params)
    mixture = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    config = dataclasses.replace(CONFIG, attention_bias=True, **mixture)
    boxed = Target(config).init(jax.random.key(3), jnp.zeros((1, 2), jnp.int32))["params"]
    theirs = jax.device_get(nn.meta.unbox(boxed))
    started = jax.device_get(draft_from_target(fresh.inputs.record.config, params, theirs))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, started)
    chex.assert_trees_all_equal(started["layers_0"]["mlp"], params["layers_0"]["mlp"])
    for name in ("q_proj", "o_proj"):
        weight = theirs["layers_3"]["self_attn"][name]["weight"]
        np.testing.assert_array_equal(started["layers_0"]["self_attn"][name]["weight"], weight)


def test_a_run_starts_as_the_top_of_its_target_and_reads_no_more_of_it(
    target: Path, fresh: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_config(tmp_path, target)
    read, names = StoredTensor.read, []

    def noted(tensor: StoredTensor, part: tuple[slice, ...] = ()) -> np.ndarray:
        names.append(tensor.name)
        return read(tensor, part)

    monkeypatch.setattr(StoredTensor, "read", noted)
    start, devices = "draft.init_layers_from_target=true", ("mesh.fsdp=8", "mesh.data=1")
    config = load_config(path, [start, "dtype=bfloat16", *devices])
    run = prepare(config, reporter=quiet())
    counts = Counter(names)
    # Three layers run; of the fourth, and of the final norm, the draft has its copy in float32.
    whole = load_target(target).params
    expected = draft_from_target(fresh.inputs.record.config, fresh.state.params, whole)
    chex.assert_trees_all_equal(*jax.device_get((run.state.params, expected)))
    layout = run.state.params["layers_0"]["mlp"]["up_proj"]["weight"].sharding
    assert not layout.is_fully_replicated
    assert any(".layers.3." in name for name in counts)
    assert counts["model.embed_tokens.weight"] == 8 and counts["model.norm.weight"] == 2
