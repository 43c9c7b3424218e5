"""A program carries the forms of the platform it is lowered for, whatever machine traces it.

A training step and a decoding cycle are lowered for a CPU, a TPU and a GPU on this machine, with no
such device and no compiler for it. The CPU's forms must be in the first and in neither of the
others.
"""

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import draft_config, target_config

from domino_jax.decoding.decoder import Weights, make_decoder
from domino_jax.decoding.speculate import advance, start
from domino_jax.draft.backbone import DraftModel
from domino_jax.draft.build import boxed_parameters
from domino_jax.objective.curriculum import lambda_base_schedule
from domino_jax.objective.modules import build_trainer
from domino_jax.target.decoder import Target
from domino_jax.training.step import Batch, Program, initial_state, train_step

CONFIG = draft_config(
    num_hidden_layers=1, num_target_layers=4, target_layer_ids=(0, 2), dtype="bfloat16"
)
TARGET = Target(target_config(CONFIG), capture=CONFIG.target_layer_ids)
# The scopes of the CPU's implementations, and in which of the two programs each is read.
STEP_FORMS = {"cpu_largest", "cpu_expansion", "cpu_transposed"}
CYCLE_FORMS = {"cpu_largest", "cpu_few_rows"}


def shapes_of(model: nn.Module, *arguments: Any) -> Any:
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *arguments))["params"]


def draft_shapes() -> Any:
    return nn.meta.unbox(boxed_parameters(CONFIG))


def traced_step() -> Any:
    target = dataclasses.replace(TARGET, scan_layers=True)
    program = Program(
        trainer=build_trainer(CONFIG, num_anchors=16, loss_decay_gamma=7.0, chunk_blocks=2),
        target=target,
        optimizer=optax.adamw(1e-3),
        curriculum=lambda_base_schedule(10),
    )
    ids = jax.ShapeDtypeStruct((1, 2, 32), jnp.int32)
    batch = Batch(ids, jax.ShapeDtypeStruct(ids.shape, bool))
    state = jax.eval_shape(functools.partial(initial_state, program), draft_shapes())
    step = jax.jit(functools.partial(train_step, program))
    return step.trace(state, shapes_of(target, jnp.zeros((1, 4), jnp.int32)), batch)


def traced_cycle() -> Any:
    decoder = make_decoder(TARGET, DraftModel(CONFIG))
    weights = Weights(shapes_of(TARGET, jnp.zeros((1, 4), jnp.int32)), draft_shapes())
    read = functools.partial(start, decoder, prompts=[np.arange(3)], max_new_tokens=9, cache_len=80)
    return advance.trace(
        decoder, weights, jax.eval_shape(read, weights), cycles=jax.ShapeDtypeStruct((), jnp.int32)
    )


@pytest.mark.parametrize(
    ("trace", "implementations"),
    [(traced_step, STEP_FORMS), (traced_cycle, CYCLE_FORMS)],
    ids=["step", "cycle"],
)
def test_a_program_has_the_forms_of_its_own_platform(trace: Any, implementations: set[str]) -> None:
    traced = trace()
    text = {platform: lowered(traced, platform) for platform in ("cpu", "tpu", "cuda")}
    assert set(re.findall(r"cpu_\w+", text["cpu"])) == implementations
    assert barriers(text["cpu"]) > barriers(text["tpu"]) == barriers(text["cuda"])
    # A step on a TPU attends in kernels: of the target, of the blocks, and the blocks' backward.
    kernels = {platform: text[platform].count("@tpu_custom_call") for platform in text}
    assert kernels["cpu"] == kernels["cuda"] == 0 and (kernels["tpu"] >= 3) == (
        trace is traced_step
    )
    for platform in ("tpu", "cuda"):
        assert not re.findall(r"cpu_\w+", text[platform])
        # Those that are left keep `jax.checkpoint`'s recomputation apart, on every platform.
        assert barriers(text[platform]) == barriers(text[platform], of="remat")


def lowered(traced: Any, platform: str) -> str:
    return traced.lower(lowering_platforms=(platform,)).as_text(debug_info=True)


def barriers(text: str, *, of: str = "") -> int:
    """Barriers of a program whose place in the code says `of`."""
    specs = dict(re.findall(r'^(#loc\d+) = loc\("([^"]*)"', text, re.MULTILINE))
    found = re.findall(r"stablehlo\.optimization_barrier .* loc\((#loc\d+)\)", text)
    return sum(of in specs[spec] for spec in found)
