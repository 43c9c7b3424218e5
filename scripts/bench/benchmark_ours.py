"""This project's side on an accelerator, on the weights of `benchmark_weights`.

A step is `training.step.train_step`, the program of a run: float32 masters and moments, bfloat16
compute on an accelerator (float32 on a CPU), the target cut after the last layer that the draft
reads, anchors drawn inside.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmark_sides import Worker
from benchmark_weights import jax_weight
from benchmark_workloads import (
    BETAS,
    CLIP_NORM,
    LAMBDA_BASE,
    LEARNING_RATE,
    LOSS_DECAY_GAMMA,
    Setting,
)
from flax.traverse_util import flatten_dict, unflatten_dict

from domino_jax.config.model import DecoderConfig, DraftConfig
from domino_jax.draft.backbone import DraftModel
from domino_jax.draft.blocks import anchor_candidates, sample_anchors
from domino_jax.draft.build import init_variables
from domino_jax.interop.hf import hf_tensors
from domino_jax.kernels.causal_attention import implementation_for
from domino_jax.objective.modules import build_trainer
from domino_jax.target.decoder import Target
from domino_jax.target.load import TABLES, expected_tensors
from domino_jax.training.step import Batch, Program, initial_state, train_step

SEED = 0


def default_dtype() -> str:
    """What a run computes in on this machine."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def target_params(
    config: DecoderConfig, *, stacked: bool = False, only: tuple[str, ...] = ()
) -> Any:
    """A target's parameters in its compute type.

    Args:
        config: the target, which may be cut.
        stacked: layers stacked, as training wants them; apart, as decoding does.
        only: the top names that are wanted; all when empty.
    """
    leaves: dict[tuple[str, ...], jax.Array] = {}
    layers: dict[tuple[str, ...], tuple[list[str], tuple[int, ...]]] = {}
    for path, (name, shape) in expected_tensors(config).items():
        if only and path[0] not in only:
            continue
        if stacked and path[0].startswith("layers_"):
            layers.setdefault(path[1:], ([], shape))[0].append(name)
        else:
            leaves[path] = jax_weight(name, shape, config.dtype)
    for path, (names, shape) in layers.items():
        leaves["layers", "layer", *path] = jax_weight(names, shape, config.dtype)
    return unflatten_dict(leaves)


def draft_params(config: DraftConfig) -> Any:
    """A draft's float32 parameters."""
    shapes = jax.eval_shape(lambda: init_variables(DraftModel(config), jax.random.key(0)))
    paths = flatten_dict(nn.meta.unbox(shapes)["params"])
    # The checkpoint's name of each parameter, found by a number that it stands for.
    numbers, leaves = {}, {}
    for index, (path, leaf) in enumerate(paths.items()):
        numbers[path] = np.broadcast_to(np.float32(index), leaf.shape)
    tensors = hf_tensors(config, unflatten_dict(numbers))
    names = {int(tensor.flat[0]): name for name, tensor in tensors.items()}
    for index, (path, leaf) in enumerate(paths.items()):
        leaves[path] = jax_weight("draft." + names[index], leaf.shape, "float32")
    return unflatten_dict(leaves)


def drawn_anchors(config: DraftConfig, setting: Setting, *, steps: int) -> dict[str, np.ndarray]:
    """The anchors that `train_step` draws in its first steps, for the other side.

    Returns:
        `anchors` int32 and `keep` bool, both [steps, 1, N].
    """
    module = build_trainer(config)
    everything = jnp.ones((1, setting.length), bool)
    candidates = anchor_candidates(everything, block_size=config.block_size)

    def draw(step: jax.Array) -> tuple[jax.Array, jax.Array]:
        micro_batch = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), step), 0)
        streams = {"anchors": micro_batch}
        key = module.apply({}, method=lambda m: m.make_rng("anchors"), rngs=streams)
        return sample_anchors(key, candidates, num_anchors=setting.num_anchors)

    anchors, keep = jax.vmap(draw)(jnp.arange(steps))
    return {"anchors": np.asarray(anchors, np.int64), "keep": np.asarray(keep)}


def recipe_step(
    config: DraftConfig,
    target: DecoderConfig,
    *,
    input_ids: np.ndarray,
    online: bool,
    num_anchors: int,
    chunk_blocks: int,
) -> Worker:
    """One optimisation step after another, and what to say at the end.

    Args:
        config: the Domino draft.
        target: its target.
        input_ids: int [1, S], all supervised.
        online: run the target in the step; otherwise its states are given.
        num_anchors: N.
        chunk_blocks: memory bound of the vocabulary loss.
    """
    device, depth = jax.devices()[0], max(config.target_layer_ids) + 1
    attention = implementation_for(
        device.platform, dtype=target.dtype, head_dim=target.head_dim, packed=False
    )
    program = Program(
        trainer=build_trainer(
            config,
            num_anchors=num_anchors,
            loss_decay_gamma=LOSS_DECAY_GAMMA,
            chunk_blocks=chunk_blocks,
            recompute=device.platform != "cpu",
        ),
        target=Target(
            target,
            capture=config.target_layer_ids,
            depth=depth,
            scan_layers=True,
            attention=attention,
        ),
        optimizer=optax.chain(
            optax.clip_by_global_norm(CLIP_NORM),
            optax.adamw(LEARNING_RATE, b1=BETAS[0], b2=BETAS[1], weight_decay=0.0),
        ),
        curriculum=optax.constant_schedule(LAMBDA_BASE),
        seed=SEED,
    )
    # Weights of the layers that run only; the target itself knows its whole depth.
    cut = dataclasses.replace(target, num_hidden_layers=depth)
    frozen = target_params(cut, stacked=True, only=() if online else TABLES)
    ids = jnp.asarray(input_ids[None], jnp.int32)
    features = None
    if not online:
        width = len(config.target_layer_ids) * config.hidden_size
        features = jax_weight("features", (*ids.shape, width), target.dtype, std=1.0)
    batch = Batch(ids, jnp.ones(ids.shape, bool), features=features)
    held = [jax.jit(functools.partial(initial_state, program))(draft_params(config))]
    jitted = jax.jit(functools.partial(train_step, program), donate_argnums=0)
    compiled = jitted.lower(*held, frozen, batch).compile()

    def step() -> float:
        held[0], sums = compiled(held[0], frozen, batch)
        jax.block_until_ready(held)
        return float(sums["loss_sum"] / sums["loss_weight"])

    def finish() -> dict[str, Any]:
        return {
            "peak_bytes": peak_bytes(),
            "platform": device.platform,
            "device": device.device_kind,
            "dtype": target.dtype,
            "versions": {"jax": jax.__version__},
            "step_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }

    return step, finish


def peak_bytes() -> int | None:
    """The most memory of the device that jax has held at once; None on a CPU."""
    statistics = jax.devices()[0].memory_stats()
    return statistics["peak_bytes_in_use"] if statistics else None


def matrix_product(x: np.ndarray) -> Callable[[], Any]:
    """x @ x on the device."""
    on_device = jax.device_put(x)
    product = jax.jit(lambda x: x @ x)
    return lambda: product(on_device).block_until_ready()
