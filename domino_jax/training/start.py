"""The state that a run starts with: a fresh draft, its target's top or an earlier draft.

A draft with its moments need not fit one device, so whichever start it is, each device makes or
receives its own part alone:

    fresh           made by one program, in its layout
    init_from       read by the host, split from there
    target's top    the copied layers read into their parts, put together in the draft's layout
"""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from domino_jax.config.model import DraftConfig
from domino_jax.draft.backbone import DraftModel
from domino_jax.draft.build import init_variables
from domino_jax.interop.start import starting_params
from domino_jax.target.decoder import Target
from domino_jax.target.load import load_sharded_target
from domino_jax.training.program import abstract_state
from domino_jax.training.step import Program, TrainState, initial_state


def state_at_start(
    program: Program,
    config: DraftConfig,
    mesh: Mesh,
    *,
    layers_from: Path | None,
    init_from: str | None,
) -> TrainState:
    """The state of step 0 over the mesh, its optimiser included.

    Args:
        program: of the run.
        config: the draft.
        mesh: of the run.
        layers_from: directory of the target that the draft starts as the top of, or None.
        init_from: a checkpoint that the draft starts as, or None.
    Raises:
        InputError: one of the two cannot be read, or does not fit.
    """
    # The last number of int32: steps fold their own into the same seed, and none comes that far.
    key = jax.random.fold_in(jax.random.key(program.seed), np.iinfo(np.int32).max)
    layout = jax.tree.map(lambda x: x.sharding, abstract_state(program, config, mesh))
    fresh = jax.jit(
        lambda: nn.meta.unbox(init_variables(DraftModel(config), key))["params"],
        out_shardings=layout.params,
    )
    if init_from is None:
        params = fresh()
    else:
        # By callback: each device asks for its own part of what the host holds.
        params = jax.tree.map(
            lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, x.__getitem__),
            starting_params(init_from, config),
            layout.params,
        )
    if layers_from is not None:
        first = _first_copied(config)
        copied = {("norm", "weight")}
        for name, *rest in flatten_dict(layout.params):
            if name.startswith("layers_"):
                copied.add((f"layers_{first + int(name.removeprefix('layers_'))}", *rest))
        # Apart, because a draft names each of its layers; in float32, because they become masters.
        apart = Target(replace(program.target.cfg, dtype="float32"))
        top = load_sharded_target(layers_from, apart, mesh, only=copied.__contains__).params
        # Jitted with its layout: no device holds more than its share.
        with_top = functools.partial(draft_from_target, config)
        params = jax.jit(with_top, out_shardings=layout.params)(params, top)
    state = functools.partial(initial_state, program)
    return jax.jit(state, out_shardings=layout)(params)


def draft_from_target(config: DraftConfig, params: Any, target_params: Any) -> Any:
    """A draft that starts as the top of its target.

    Its layers and final norm are the target's last ones, and its context is the last captured state
    as the first of those layers would read it; the other captured states start without weight:

        features [B, S, C*D]    first captured   ..   last captured
        fc [D, C*D]             0                ..   identity

    Args:
        config: the draft.
        params: fresh parameters, float32; what the target lacks (q and k norms of a Llama, the
            head) stays, and so does the feed-forward part below experts. What the draft lacks
            (biases) is left out.
        target_params: the target's, layers apart; what a draft does not copy may be absent.
    Returns:
        A tree like `params`.
    """
    first = _first_copied(config)
    copied = {"norm": target_params["norm"]}
    for index in range(config.num_hidden_layers):
        name = f"layers_{index}"
        layer = target_params[f"layers_{first + index}"]
        # By the draft's own names: what only one of the two has is neither lost nor added.
        fresh = flatten_dict(params[name])
        known = flatten_dict(layer)
        leaves = {path: known.get(path, leaf) for path, leaf in fresh.items()}
        copied[name] = unflatten_dict(leaves)
    copied["hidden_norm"] = target_params[f"layers_{first}"]["input_layernorm"]
    width = config.hidden_size
    captured = len(config.target_layer_ids)
    last = (captured - 1) * width
    copied["fc"] = {"weight": jnp.eye(width, captured * width, k=last)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {**params, **copied})


def _first_copied(config: DraftConfig) -> int:
    """The target's layer that the first layer of a draft starts as."""
    return config.num_target_layers - config.num_hidden_layers
