"""Meshes over the eight fake devices, and the one table from logical to mesh axes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from domino_jax.kernels.block_attention import ContextSpan, block_attention
from domino_jax.kernels.causal_attention import causal_attention
from domino_jax.sharding import (
    RULES,
    constrain,
    logical_axes,
    make_mesh,
    parameter_shardings,
    partition_spec,
    split_over_batch,
)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": 8}, (1, 8, 1)),
        ({"data": -1, "tensor": 8}, (1, 1, 8)),
    ],
)
def test_make_mesh_takes_all_devices(sizes: dict[str, int], shape: tuple[int, ...]) -> None:
    mesh = make_mesh(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert mesh.axis_types == (AxisType.Auto,) * 3  # Linen layers fail on explicit axes


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "mesh data=3 fsdp=1 tensor=1 needs 3 devices, found 8"),
        ({"fsdp": 3}, "mesh data=2 fsdp=3 tensor=1 needs 6 devices, found 8"),
        ({"fsdp": 16}, "mesh data=1 fsdp=16 tensor=1 needs 16 devices, found 8"),
        ({"fsdp": 0}, "mesh data=-1 fsdp=0 tensor=1: sizes must be positive, only data may be -1"),
        ({"fsdp": -2, "tensor": -4}, "sizes must be positive"),
        ({"data": -2, "fsdp": -4}, "sizes must be positive"),
    ],
)
def test_make_mesh_refuses_what_does_not_fit(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_rules_name_mesh_axes_only() -> None:
    named = [
        axis
        for rule in RULES.values()
        for axis in ((rule,) if isinstance(rule, str) else rule or ())
    ]
    assert set(named) == set(make_mesh().axis_names)


def test_partition_spec_follows_the_rules() -> None:
    assert partition_spec("batch", None, "mlp") == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert partition_spec() == PartitionSpec()


def test_unknown_logical_axis_is_an_error() -> None:
    for call in (
        lambda: partition_spec("batch", "lenght"),
        lambda: logical_axes(nn.initializers.ones, "lenght"),
        lambda: constrain(jnp.ones((8, 2)), "batch", "lenght"),
    ):
        with pytest.raises(KeyError, match=r"unknown logical axes \['lenght'\]; known: \['batch'"):
            call()


def test_constrain_wants_one_axis_per_dimension() -> None:
    with pytest.raises(
        ValueError, match=r"2 logical axes \('batch', 'length'\) for an array of shape \(8, 2, 4\)"
    ):
        constrain(jnp.ones((8, 2, 4)), "batch", "length")


def test_constrain_without_a_mesh_is_the_identity() -> None:
    x = jnp.ones((8, 2))
    assert constrain(x, "batch", "length") is x


@pytest.mark.parametrize("wrap", [jax.jit, lambda function: function])
def test_constrain_under_a_mesh_lays_out(wrap) -> None:
    x = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        y = wrap(lambda x: constrain(x + 1, "batch", "mlp"))(x)
    assert y.sharding.is_equivalent_to(
        NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor")), 2
    )
    assert y.addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(y, x + 1)


@pytest.mark.parametrize("wrap", [jax.jit, lambda function: function])
def test_constrain_keeps_an_axis_whole_that_does_not_divide(wrap) -> None:
    with jax.set_mesh(make_mesh(data=4, tensor=2)):
        y = wrap(lambda x: constrain(x, "batch", "mlp"))(jnp.ones((3, 6)))
    assert y.addressable_shards[0].data.shape == (3, 3)


class Parts(nn.Module):
    @nn.compact
    def __call__(self) -> None:
        ones = nn.initializers.ones
        self.param("weight", logical_axes(ones, "mlp", "embed"), (6, 8))
        self.param("odd", logical_axes(ones, "mlp", "embed"), (7, 8))
        self.param("scale", logical_axes(ones, "norm"), (8,))
        self.param("plain", ones, (8,))


@pytest.mark.parametrize("init", [Parts().init, lambda key: jax.eval_shape(Parts().init, key)])
def test_parameter_shardings_follow_the_logical_axes(init) -> None:
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    shardings = parameter_shardings(init(jax.random.key(0)), mesh)
    expected = {
        "weight": PartitionSpec("tensor", "fsdp"),
        "odd": PartitionSpec(None, "fsdp"),  # 7 rows do not divide by 2
        "scale": PartitionSpec(None),
        "plain": PartitionSpec(),
    }
    assert shardings == {
        "params": {name: NamedSharding(mesh, spec) for name, spec in expected.items()}
    }
    placed = jax.device_put(nn.unbox(Parts().init(jax.random.key(0))), shardings)
    assert placed["params"]["weight"].addressable_shards[0].data.shape == (3, 2)
    assert placed["params"]["odd"].addressable_shards[0].data.shape == (7, 2)


def test_the_batch_may_be_split_over_one_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """jax turns a tuple of one axis into its name."""
    monkeypatch.setitem(RULES, "batch", ("data",))
    run = split_over_batch(lambda x: (2 * x, x.sum()), by_row=(True,))
    with jax.set_mesh(make_mesh(data=8)):
        doubled, total = jax.jit(run)(jnp.arange(16.0))
    np.testing.assert_array_equal(doubled, 2 * np.arange(16.0))
    assert float(total) == 120


@pytest.mark.parametrize("attention", ["block", "causal"])
def test_positions_stay_whole_whatever_length_means(
    monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    """Another layout of activations must not make a query see a part of its context only."""
    keys = jax.random.split(jax.random.key(0), 5)
    context = [jax.random.normal(key, (2, 2, 16, 4)) for key in keys[:2]]
    queries = jax.random.normal(keys[2], (2, 2, 16, 4))
    own = [jax.random.normal(key, (2, 2, 16, 4)) for key in keys[3:]]
    ends = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32)[:, None] * 4, (2, 4, 1))
    span = ContextSpan(jnp.zeros_like(ends), ends)

    def run(*arrays: jax.Array) -> jax.Array:
        if attention == "causal":
            return causal_attention(arrays[0], arrays[1], arrays[2])
        q, k, v, own_k, own_v = arrays
        return block_attention(q, (k, v), (own_k, own_v), span=span)

    expected = jax.jit(run)(queries, *context, *own)
    monkeypatch.setitem(RULES, "length", "tensor")
    with jax.set_mesh(make_mesh(data=1, tensor=8)):
        found = jax.jit(run)(queries, *context, *own)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
