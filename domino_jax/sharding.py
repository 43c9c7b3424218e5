"""The only file that names mesh axes: what each logical axis of a parameter or activation is split over."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# A logical axis that is missing here is an error, never a silent "replicated".
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "embed": "fsdp",
    "mlp": "tensor",
    "experts": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "features": None,
    "low_rank": None,
    "gru": None,
    "norm": None,
    "layers": None,
}


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A device mesh over all devices of all processes.

    Args:
        data: copies of the state, -1 for as many as the devices allow.
        fsdp: parts each parameter is split into; these devices also split the batch.
        tensor: parts that heads, feed-forward width and vocabulary are split into.
        devices: in the place of all devices.
    Returns:
        `Mesh` with axes "data", "fsdp", "tensor".
    Raises:
        ValueError: a size is not positive, or the product does not match the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    if fsdp < 1 or tensor < 1 or (data < 1 and data != -1):
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor}: sizes must be positive, only data may be -1"
        )
    if data == -1:
        data = max(count // (fsdp * tensor), 1)
    needed = data * fsdp * tensor
    if needed != count:
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} needs {needed} devices, found {count}"
        )
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=kinds, devices=devices)


def partition_spec(*axes: str | None) -> PartitionSpec:
    """The mesh axes of an array with these logical axes, None for an axis that is never split.

    Raises:
        KeyError: a logical axis is not in `RULES`.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise KeyError(f"unknown logical axes {unknown}; known: {sorted(RULES)}")
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def logical_axes(init: Any, *axes: str) -> Any:
    """An initializer whose parameter carries logical axes; unknown names raise `KeyError`."""
    partition_spec(*axes)
    return nn.with_logical_partitioning(init, axes)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks the compiler to lay out `x` by logical axes, one per dimension; nothing happens without a mesh.

    An axis whose length the mesh does not divide stays whole. Inside `split_over_batch` rows are split already.

    Raises:
        KeyError: an unknown logical axis.
        ValueError: the number of axes is not the rank of `x`.
    """
    spec = partition_spec(*axes)
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} logical axes {axes} for an array of shape {x.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.auto_axes:
        return x
    return jax.lax.with_sharding_constraint(x, _fitted(spec, x.shape, mesh))


def parts_of(axis: str, mesh: Mesh | AbstractMesh | None = None) -> int:
    """How many parts a mesh splits a logical axis into, 1 without a mesh or where each device has its own part.

    Args:
        axis: the logical axis.
        mesh: the one that is set when not given.
    Raises:
        KeyError: an unknown logical axis.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    (names,) = partition_spec(axis)
    return 1 if mesh.empty else _parts(names, mesh)


def parameter_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of parameters from the logical axes its initializers gave them.

    An axis whose length the mesh does not divide stays whole.

    Args:
        boxed: variables as `init` or `jax.eval_shape` of it returns them, boxes included.
        mesh: the mesh of `make_mesh`.
    Returns:
        A tree of `NamedSharding` like the unboxed parameters.
    """

    def sharding(leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, _fitted(partition_spec(*leaf.names), leaf.value.shape, mesh))

    return jax.tree.map(sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def _parts(axes: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names if name not in mesh.manual_axes)


def _fitted(
    spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    def fitted(axes: str | tuple[str, ...] | None, size: int) -> tuple[str, ...] | None:
        names = (axes,) if isinstance(axes, str) else axes or ()
        left = tuple(name for name in names if name not in mesh.manual_axes)
        return left if left and size % _parts(left, mesh) == 0 else None

    return PartitionSpec(*(fitted(axes, size) for axes, size in zip(spec, shape, strict=True)))


def split_over_batch(
    function: Callable[..., tuple[Any, Any]], *, by_row: tuple[bool, ...]
) -> Callable[..., Any]:
    """A function that the devices run on their own rows of the batch, with one sum over the batch at its end.

    A loop inside adds up on each device, where the compiler would otherwise sum over devices in every turn. Heads and
    vocabulary stay the compiler's to split.

    Args:
        function: returns what belongs to rows (arrays with the batch in front) and sums over rows.
        by_row: of each argument, whether its arrays have the batch in front; the others are shared.
    Returns:
        A function of the same arguments and result; `function` itself where no mesh divides the rows.
    """

    def split(*arguments: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        rows = jax.tree.leaves([x for x, own in zip(arguments, by_row, strict=True) if own])[
            0
        ].shape[0]
        if mesh.empty or parts_of("batch") == 1 or rows % parts_of("batch"):
            return function(*arguments)
        (names,) = partition_spec("batch")
        own, shared = PartitionSpec(names), PartitionSpec()

        def run(*arguments: Any) -> Any:
            of_rows, sums = function(*arguments)
            return of_rows, jax.lax.psum(sums, names)

        return jax.shard_map(
            run,
            in_specs=tuple(own if of_rows else shared for of_rows in by_row),
            out_specs=(own, shared),
            axis_names=set(names),
            check_vma=False,
        )(*arguments)

    return split


def split_over_devices(
    function: Callable[..., Any], *, inputs: Any, outputs: Any
) -> Callable[..., Any]:
    """A function that each device runs on its own part of the arrays; the same function without a mesh.

    For work in which no part needs another: loops then end where the device's own data says, and nothing is summed
    over devices.

    Args:
        function: of arrays (or trees of them), traceable.
        inputs: the logical axes of each array, one tuple of names per array, in a tuple of the arguments.
        outputs: likewise of its result. An axis whose length the mesh does not divide stays whole.
    Returns:
        A function of the same arguments and result.
    Raises:
        KeyError: an unknown logical axis.
    """

    def specs(axes: Any, arrays: Any, mesh: AbstractMesh) -> Any:
        flat = jax.tree.leaves(arrays)
        named = jax.tree.leaves(axes, is_leaf=lambda leaf: type(leaf) is tuple and _is_axes(leaf))
        fitted = [
            _fitted(partition_spec(*names), x.shape, mesh)
            for names, x in zip(named, flat, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(arrays), fitted)

    def split(*arrays: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return function(*arrays)
        results = jax.eval_shape(function, *arrays)
        run = jax.shard_map(
            function,
            in_specs=specs(inputs, arrays, mesh),
            out_specs=specs(outputs, results, mesh),
            check_vma=False,
        )
        return run(*arrays)

    return split


def _is_axes(leaf: tuple[Any, ...]) -> bool:
    return all(axis is None or isinstance(axis, str) for axis in leaf)
