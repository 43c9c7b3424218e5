"""The step: micro-batches equal one batch, 8 devices equal 1, nothing moves without an anchor."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from doubles import slow_after
from jax.sharding import NamedSharding
from reference import dflash_config, draft_config, target_config
from tiny import stack_layers

from domino_jax.config.sections import OptimizerConfig
from domino_jax.draft.backbone import DraftModel
from domino_jax.draft.build import init_variables
from domino_jax.objective.curriculum import lambda_base_schedule
from domino_jax.objective.metrics import DominoStepMetrics
from domino_jax.objective.modules import build_trainer
from domino_jax.sharding import make_mesh, parameter_shardings, partition_spec
from domino_jax.target.decoder import Target
from domino_jax.training.metrics import metric_means, metric_sums
from domino_jax.training.optimizer import learning_rate_schedule, make_optimizer, updates_done
from domino_jax.training.step import Batch, Program, batch_metrics, initial_state, train_step

CONFIG = draft_config(num_target_layers=6, target_layer_ids=(1, 3))
TARGET = Target(target_config(CONFIG), capture=CONFIG.target_layer_ids, scan_layers=True)


def adamw(**changes: Any) -> optax.GradientTransformation:
    """The optimiser of a run of 10 steps with the default settings, or with others."""
    settings = vars(OptimizerConfig(**changes))
    rates = ("learning_rate", "warmup_ratio", "min_lr_ratio")
    schedule = learning_rate_schedule(total_steps=10, **{name: settings[name] for name in rates})
    rest = ("b1", "b2", "weight_decay", "max_grad_norm")
    return make_optimizer(schedule, **{name: settings[name] for name in rest})


def make_program(**changes: Any) -> Program:
    fields: dict[str, Any] = {
        "trainer": build_trainer(CONFIG, num_anchors=4, loss_decay_gamma=7.0),
        "target": TARGET,
        # Its trace after one step is the gradient, to the bit.
        "optimizer": optax.sgd(1.0, momentum=0.9),
        "curriculum": lambda_base_schedule(10),
    }
    return Program(**{**fields, **changes})


@pytest.fixture(scope="module")
def target_params() -> Any:
    apart = Target(TARGET.cfg, capture=TARGET.capture)
    init = jax.jit(lambda: apart.init(jax.random.key(2), jnp.zeros((1, 4), jnp.int32)))
    return stack_layers(nn.meta.unbox(init())["params"])


@pytest.fixture(scope="module")
def draft_variables() -> Any:
    return jax.jit(lambda: init_variables(DraftModel(CONFIG), jax.random.key(3)))()["params"]


@pytest.fixture(scope="module")
def draft_params(draft_variables: Any) -> Any:
    return nn.meta.unbox(draft_variables)


def make_batch(micro_batches: int, rows: int, *, length: int = 24) -> Batch:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, CONFIG.vocab_size, (micro_batches, rows, length)).astype(np.int32)
    return Batch(jnp.asarray(ids), jnp.asarray(rng.random(ids.shape) < 0.8))


def stepped(program: Program, params: Any, target_params: Any, batch: Batch) -> Any:
    """The state and the sums of the first step."""
    step = jax.jit(functools.partial(train_step, program))
    return step(initial_state(program, params), target_params, batch)


def first_gradient(program: Program, params: Any, target_params: Any, batch: Batch) -> Any:
    return stepped(program, params, target_params, batch)[0].opt_state[0].trace


@pytest.mark.pitfall(
    "averages biased by short batches",
    seen="training/step.py: the mean of the micro-batches' gradients",
)
def test_micro_batches_give_the_gradient_of_one_large_batch(
    target_params: Any, draft_params: Any
) -> None:
    # A slot for every candidate, so that both divisions of the rows train on the same blocks.
    whole = make_batch(1, 6)
    trainer = build_trainer(CONFIG, num_anchors=whole.input_ids.shape[-1], loss_decay_gamma=7.0)
    program = make_program(trainer=trainer)
    divided = jax.tree.map(lambda x: x.reshape(3, 2, -1), whole)
    one = first_gradient(program, draft_params, target_params, whole)
    three = first_gradient(program, draft_params, target_params, divided)
    chex.assert_trees_all_close(one, three, rtol=1e-5, atol=1e-7)


def test_layers_that_recompute_have_the_same_gradient(
    target_params: Any, draft_params: Any
) -> None:
    gradients = []
    for recompute in (False, True):
        trainer = build_trainer(CONFIG, num_anchors=4, loss_decay_gamma=7.0, recompute=recompute)
        program = make_program(trainer=trainer)
        gradients.append(first_gradient(program, draft_params, target_params, make_batch(1, 2)))
    chex.assert_trees_all_close(*gradients, rtol=1e-5, atol=1e-7)
    assert optax.tree.norm(gradients[0]) > 0


@pytest.mark.pitfall(
    "a batch without anchors still moves the weights through the moments",
    seen="training/step.py: every finite update taken",
)
@pytest.mark.parametrize(("data", "fsdp", "tensor"), slow_after(1, [(2, 2, 2), (8, 1, 1)]))
def test_eight_devices_equal_one(
    target_params: Any, draft_variables: Any, data: int, fsdp: int, tensor: int
) -> None:
    program, params, batch = make_program(), nn.meta.unbox(draft_variables), make_batch(1, 8)
    alone, sums = stepped(program, params, target_params, batch)
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    with jax.set_mesh(mesh):
        ids = jnp.zeros((1, 4), jnp.int32)
        boxed = jax.eval_shape(TARGET.init, jax.random.key(0), ids)["params"]
        spread_target = jax.device_put(target_params, parameter_shardings(boxed, mesh))
        spread = jax.device_put(params, parameter_shardings(draft_variables, mesh))
        rows = jax.device_put(batch, NamedSharding(mesh, partition_spec(None, "batch", "length")))
        step = jax.jit(functools.partial(train_step, program))
        together, spread_sums = step(initial_state(program, spread), spread_target, rows)
        # Nothing to learn from, or nothing finite: one decision on all devices.
        nothing = rows._replace(loss_mask=jnp.zeros_like(rows.loss_mask))
        table = spread_target["embed_tokens"]
        for spoilt, poison, reason in (
            (nothing, 1.0, "batches_without_anchor"),
            (rows, jnp.nan, "skipped_nonfinite"),
        ):
            frozen = {**spread_target, "embed_tokens": table * poison}
            kept, counts = step(together, frozen, spoilt)
            assert float(counts[reason]) == 1
            assert_only_the_step_moved(together, kept)
    assert len(rows.input_ids.sharding.device_set) == 8
    if fsdp > 1:
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(spread))
    chex.assert_trees_all_close(jax.device_get(sums), jax.device_get(spread_sums), rtol=1e-5)
    gradients = [jax.device_get(after.opt_state[0].trace) for after in (alone, together)]
    for one, eight in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert np.linalg.norm(one - eight) <= 1e-5 * np.linalg.norm(one)


@pytest.mark.pitfall(
    "shapes that depend on the data: recompilation late in an epoch",
    seen="training/step.py: the step counter turned into float32 by the first step",
)
def test_one_trace_serves_many_steps(target_params: Any, draft_params: Any) -> None:
    program = make_program(optimizer=adamw())
    traces = []

    def step(*args: Any) -> Any:
        traces.append(1)
        return train_step(program, *args)

    compiled = jax.jit(step)
    state, lambdas = initial_state(program, draft_params), []
    for _ in range(4):
        lambdas.append(float(program.curriculum(state.step)))
        state, _ = compiled(state, target_params, make_batch(1, 4))
    assert len(traces) == 1 and int(state.step) == 4
    assert lambdas == pytest.approx([1.0, 0.8, 0.6, 0.4])


def assert_only_the_step_moved(before: Any, after: Any) -> None:
    assert int(after.step) == int(before.step) + 1
    chex.assert_trees_all_equal(after.replace(step=before.step), before)


@pytest.mark.pitfall(
    "no valid anchor in a batch: crash or hang",
    seen=(
        "training/step.py: divided by the loss weight alone; training/metrics.py: such a batch "
        "not counted"
    ),
)
@pytest.mark.pitfall(
    "a batch without anchors still moves the weights through the moments",
    seen="training/step.py: every finite update taken",
)
def test_a_batch_without_anchors_moves_nothing_and_is_counted(
    target_params: Any, draft_params: Any
) -> None:
    """Neither through AdamW's moments, filled by a step before, nor through its weight decay."""
    optimizer = adamw(weight_decay=0.1, warmup_ratio=0.0)
    program, batch = make_program(optimizer=optimizer, ema_decay=0.5), make_batch(1, 4)
    step = jax.jit(functools.partial(train_step, program))
    start = initial_state(program, draft_params)
    state, sums = step(start, target_params, batch)
    assert float(sums["updates"]) == 1 and int(updates_done(state.opt_state)) == 1
    nothing = batch._replace(loss_mask=jnp.zeros_like(batch.loss_mask))
    after, sums = step(state, target_params, nothing)
    assert_only_the_step_moved(state, after)
    assert float(sums["batches_without_anchor"]) == 1 and float(sums["loss_sum"]) == 0
    assert float(sums["updates"]) == float(sums["skipped_nonfinite"]) == 0
    assert metric_means(sums)["loss"] == 0
    again, sums = step(after, target_params, batch)  # and it goes on
    assert float(sums["updates"]) == 1
    assert int(updates_done(again.opt_state)) == 2 and int(again.step) == 3


@pytest.mark.pitfall(
    "a NaN is trained on, saved, and the good checkpoints are rotated away",
    seen="training/step.py: taken whatever loss and norm are; sums of a skipped step added up",
)
def test_one_micro_batch_that_is_not_finite_skips_the_step(
    target_params: Any, draft_params: Any
) -> None:
    program, batch = make_program(ema_decay=0.5), make_batch(3, 2)
    width = CONFIG.hidden_size * len(CONFIG.target_layer_ids)
    rng = np.random.default_rng(1)
    features = rng.standard_normal((*batch.input_ids.shape, width)).astype(np.float32)
    step = jax.jit(functools.partial(train_step, program))
    start = initial_state(program, draft_params)
    state, good = step(start, target_params, batch._replace(features=jnp.asarray(features)))
    features[1, 0, 0, 0] = np.inf
    after, sums = step(state, target_params, batch._replace(features=jnp.asarray(features)))
    assert_only_the_step_moved(state, after)
    assert float(sums["skipped_nonfinite"]) == 1 and float(sums["updates"]) == 0
    # What it measured does not spoil the window that it lies in.
    window = metric_means(jax.tree.map(jnp.add, good, sums))
    alone = metric_means(good)
    assert window == {**alone, "skipped_nonfinite": 1.0}
    assert np.isnan(metric_means(sums)["loss"]) and np.isnan(metric_means(sums)["grad_norm"])


def test_anchors_differ_between_steps_and_repeat_with_the_seed(
    target_params: Any, draft_params: Any
) -> None:
    batch, program = jax.tree.map(lambda x: x[0], make_batch(1, 4)), make_program()

    @jax.jit
    def loss(step: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0), step)
        metrics = batch_metrics(
            program, draft_params, target_params, batch, key=key, lambda_base=0.5
        )
        return metrics.loss

    assert loss(0) == loss(0) != loss(1)


def test_ema_follows_the_draft(target_params: Any, draft_params: Any) -> None:
    program = make_program(ema_decay=0.75)
    after, _ = stepped(program, draft_params, target_params, make_batch(1, 4))
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, draft_params, after.params)
    chex.assert_trees_all_close(after.ema, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.pitfall(
    "averages biased by short batches",
    seen=(
        "training/metrics.py: mean of the batches' losses; of their acceptance lengths; of their "
        "base accuracies"
    ),
)
def test_metric_means_weigh_by_tokens_and_blocks(target_params: Any, draft_params: Any) -> None:
    """Two batches of different size: the means of their sums are those of one batch of both."""
    program, key = make_program(), jax.random.key(0)
    rows = jax.tree.map(lambda x: x[0], make_batch(1, 5))
    # Four tokens are all that comes and is predicted: some guesses are right.
    rows = rows._replace(input_ids=rows.input_ids % 4)
    few = np.arange(CONFIG.vocab_size)[:, None] < 4
    target_params = {**target_params, "lm_head": target_params["lm_head"] * few}
    head = draft_params["head"]
    params = {**draft_params, "head": {**head, "embed_proj_2": head["embed_proj_2"] * few}}

    @jax.jit
    def measured(batch: Batch) -> DominoStepMetrics:
        return batch_metrics(program, params, target_params, batch, key=key, lambda_base=0.25)

    parts = [measured(jax.tree.map(lambda x: x[:1], rows))]
    parts.append(measured(jax.tree.map(lambda x: x[1:], rows)))
    joined = metric_means(jax.tree.map(jnp.add, *map(metric_sums, parts)))

    def average(mean: str, weight: str) -> float:
        return np.average(
            [getattr(x, mean) for x in parts], weights=[getattr(x, weight) for x in parts]
        )

    assert parts[0].valid_blocks < parts[1].valid_blocks
    for names, weight, bound in (
        (("loss", "final_loss", "base_loss"), "loss_weight", 1e-5),
        (("accept_len", "base_accept_len"), "valid_blocks", 1e-6),
        (("accuracy", "base_accuracy"), "valid_tokens", 1e-5),
    ):
        for name in names:
            assert abs(getattr(parts[0], name) - getattr(parts[1], name)) > 1e-3, name
            assert joined[name] == pytest.approx(average(name, weight), rel=bound), name


def test_dflash_takes_the_same_step(target_params: Any) -> None:
    config = dflash_config(num_target_layers=6, target_layer_ids=(1, 3))
    program = make_program(trainer=build_trainer(config, num_anchors=4))
    init = jax.jit(lambda: init_variables(DraftModel(config), jax.random.key(0)))
    params = nn.meta.unbox(init())["params"]
    _, sums = stepped(program, params, target_params, make_batch(1, 4))
    assert "final_loss_sum" not in sums and metric_means(sums)["loss"] > 0


@pytest.mark.parametrize(
    ("total_steps", "warmup_ratio"), [(100, 0.04), (30, 0.13), (50, 0.0), (7, 1.0), (1, 0.5)]
)
def test_learning_rate_equals_nemos_schedule(total_steps: int, warmup_ratio: float) -> None:
    """Beyond the last update too, where an extended run goes on."""
    from nemo_automodel.recipes.llm._spec_train_utils import make_warmup_cosine_schedule

    warmup = max(1, int(warmup_ratio * total_steps))
    expected = make_warmup_cosine_schedule(warmup, total_steps, 0.1)
    schedule = learning_rate_schedule(
        learning_rate=2e-3, warmup_ratio=warmup_ratio, min_lr_ratio=0.1, total_steps=total_steps
    )
    updates = np.arange(total_steps + 3)
    rates = [2e-3 * expected(k) for k in updates]
    np.testing.assert_allclose(jax.vmap(schedule)(updates), rates, rtol=1e-5)
    assert float(schedule(0)) == pytest.approx(2e-3 / warmup)


def test_the_optimizer_is_clipped_adamw() -> None:
    """Against a plain loop over one weight: a gradient of norm 10 counts as norm 1."""
    schedule = learning_rate_schedule(
        learning_rate=1e-2, warmup_ratio=0.0, min_lr_ratio=0.1, total_steps=10
    )
    optimizer = make_optimizer(schedule, b1=0.9, b2=0.95, weight_decay=0.1, max_grad_norm=1.0)
    weight, mean, square = np.array([3.0, -2.0]), np.zeros(2), np.zeros(2)
    params = jnp.array(weight, jnp.float32)
    state = optimizer.init(params)
    for step in range(5):
        gradient = np.array([6.0, 8.0]) * (-1) ** step
        updates, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        clipped = gradient / 10
        mean, square = 0.9 * mean + 0.1 * clipped, 0.95 * square + 0.05 * clipped**2
        unbiased, root = mean / (1 - 0.9 ** (step + 1)), np.sqrt(square / (1 - 0.95 ** (step + 1)))
        weight = weight - float(schedule(step)) * (unbiased / (root + 1e-8) + 0.1 * weight)
    np.testing.assert_allclose(params, weight, rtol=1e-5)
