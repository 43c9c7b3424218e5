"""The parts of a step's program: shapes and layouts of its arguments, memory, target.

A plan compiles the very program of a run, on machines that are not here. So shapes and layouts are
known before there are arrays:

    state     parameters, moments, average    split as each parameter is; counts replicated
    target    parameters, compute type        split likewise; tables alone for captured states
    batch     [A, B, ...]                     B over the devices, A scanned by the step
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from optax.tree_utils import tree_map_params

from domino_jax.base.chips import CHIPS
from domino_jax.config.model import DecoderConfig, DraftConfig
from domino_jax.draft.build import boxed_parameters
from domino_jax.kernels.causal_attention import implementation_for
from domino_jax.sharding import axis_size, parameter_shardings, partition_spec
from domino_jax.target.decoder import Target
from domino_jax.target.load import TABLES
from domino_jax.target.load import boxed_parameters as boxed_target
from domino_jax.training.step import Batch, Program, TrainState, initial_state, train_step

CPU_LOGITS_MIB = 192.0  # where a step is as fast as with more
LOGITS_SHARE = 1 / 128  # of an accelerator's memory
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """The shape [A, B, S] of a step's token ids."""

    grad_accumulation: int
    batch_size: int
    max_length: int

    @property
    def step_rows(self) -> int:
        """A * B, the batch rows of a step."""
        return self.grad_accumulation * self.batch_size


def default_logits_mib(mesh: Mesh) -> float:
    """The float32 logits, MiB, that suit a device of a mesh (`loss.logits_mib`)."""
    chip = CHIPS.get(mesh.devices.flat[0].device_kind)
    if chip is None:
        return CPU_LOGITS_MIB
    return float(round(chip.memory * LOGITS_SHARE / MIB))


def chunk_blocks(
    draft: DraftConfig, mesh: Mesh, *, batch_size: int, num_anchors: int, logits_mib: float
) -> int:
    """Blocks whose float32 logits take `logits_mib` on a device at most.

    Pieces are of about the same size.
    """
    device_rows = batch_size // axis_size("batch", mesh)
    vocabulary = -(-draft.vocab_size // axis_size("vocab", mesh))
    block = device_rows * draft.num_predictions * vocabulary * 4
    # One block at least, however large. As few pieces as there may be, then evened out: the last
    # one would else be mostly padding.
    chunks = -(-num_anchors // max(int(logits_mib * MIB // block), 1))
    return -(-num_anchors // chunks)


def scanned_target(
    config: DecoderConfig, *, capture: tuple[int, ...], depth: int, mesh: Mesh, packed: bool
) -> Target:
    """The target of whole rows: layers under a scan, attention in the form that suits the devices.

    Args:
        config: the target, its compute type included.
        capture: layers whose outputs are read.
        depth: layers that run.
        mesh: of the run.
        packed: whether rows hold several documents.
    """
    # Of the mesh and not of this process, which may plan for other devices.
    platform = mesh.devices.flat[0].platform
    implementation = implementation_for(
        platform, dtype=config.dtype, head_dim=config.head_dim, packed=packed
    )
    return Target(config, capture=capture, depth=depth, scan_layers=True, attention=implementation)


def abstract_state(program: Program, draft: DraftConfig, mesh: Mesh) -> TrainState:
    """The state of a run as `ShapeDtypeStruct`s with their shardings.

    Moments and average are split as the parameters are, counts are replicated.
    """
    boxed = boxed_parameters(draft)
    split = parameter_shardings(boxed, mesh)
    replicated = NamedSharding(mesh, partition_spec())
    shapes = jax.eval_shape(functools.partial(initial_state, program), nn.meta.unbox(boxed))
    # Only optax knows which leaves of its state are like parameters.
    moments = tree_map_params(
        program.optimizer,
        lambda _, s: s,
        shapes.opt_state,
        split,
        transform_non_params=lambda _: replicated,
    )
    average = None if program.ema_decay is None else split
    shardings = TrainState(replicated, split, moments, average)
    return _laid_out(shapes, shardings)


def abstract_target(model: Target, mesh: Mesh, *, tables_only: bool) -> Any:
    """The target's parameters likewise, in its compute type.

    Args:
        model: with `scan_layers`.
        mesh: of the run.
        tables_only: leave out the layers, where training reads captured states.
    """
    boxed = boxed_target(model)
    shardings = parameter_shardings(boxed, mesh)
    laid_out = _laid_out(nn.meta.unbox(boxed), shardings, dtype=model.cfg.dtype)
    return {name: laid_out[name] for name in laid_out if name in TABLES or not tables_only}


def abstract_batch(
    shape: BatchShape,
    draft: DraftConfig,
    mesh: Mesh,
    *,
    captured: bool,
    target_states: bool,
    documents: int | None,
) -> Batch:
    """The batch of a step likewise.

    Args:
        shape: of its token ids.
        draft: gives the width of captured states.
        mesh: of the run.
        captured: whether it has captured states.
        target_states: whether these include the states after the target's final norm.
        documents: of a packed row at most; None without packing.
    """
    leading = (shape.grad_accumulation, shape.batch_size)
    by_token = (*leading, shape.max_length)

    def of(shape: tuple[int, ...], dtype: Any) -> Any:
        layout = NamedSharding(mesh, partition_spec(None, "batch", *[None] * (len(shape) - 2)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

    ids, mask = of(by_token, np.int32), of(by_token, np.bool_)
    batch = Batch(ids, mask)
    if documents is not None:
        seq_lens = of((*leading, documents), np.int32)
        batch = batch._replace(position_ids=ids, seq_lens=seq_lens, doc_remaining=ids)
    if captured:
        # As captures store them unless told otherwise.
        width = draft.hidden_size
        features = of((*by_token, width * len(draft.target_layer_ids)), jnp.bfloat16)
        batch = batch._replace(features=features)
        if target_states:
            batch = batch._replace(target_states=of((*by_token, width), jnp.bfloat16))
    return batch


class StepArguments(NamedTuple):
    """What a step's program takes: arrays, or their shapes and shardings."""

    state: TrainState
    target_params: Any
    batch: Batch


def traced_step(program: Program, arguments: StepArguments) -> jax.stages.Traced:
    """The step for devices of the arguments' shardings; it consumes its state."""
    # Donated, or old and new state would both be held; in the layout that it came in, because the
    # compiled step takes no other when it is called again.
    layout = jax.tree.map(lambda x: x.sharding, arguments.state)
    step = jax.jit(
        functools.partial(train_step, program), donate_argnums=0, out_shardings=(layout, None)
    )
    return step.trace(*arguments)


def _laid_out(shapes: Any, shardings: Any, dtype: Any = None) -> Any:
    # A type of its own for the target, which is held in the type that it computes in.
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding),
        shapes,
        shardings,
    )
