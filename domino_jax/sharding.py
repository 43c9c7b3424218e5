"""The mesh, and the one table from logical axes ("embed", "vocab", ..) to the axes of the mesh.

No other file says what an axis of the mesh does; `config/sections.py` has its sizes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# A logical axis that is missing here is an error: to flax it would mean "replicated", silently.
# "batch" goes over "fsdp" too: those devices split the parameters, and each has rows of its own.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "embed": "fsdp",  # D, as input or output
    "mlp": "tensor",
    "experts": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "features": None,  # an input joined of several: C*D, D+G
    "low_rank": None,  # R of a head's correction
    "gru": None,  # G, alone or once a gate
    "norm": None,
    "layers": None,
}


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A device mesh over all devices of all processes.

    Args:
        data: copies of the state, -1 for as many as the devices allow.
        fsdp: parts that the batch and parameters with an "embed" axis are split into.
        tensor: parts that heads, feed-forward width and vocabulary are split into.
        devices: in the place of all devices.
    Raises:
        ValueError: a size is not positive, or the product does not match the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    if fsdp < 1 or tensor < 1 or (data < 1 and data != -1):
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor}: sizes must be positive, "
            "only data may be -1"
        )
    # At least one, so that too many parts are refused below, with the count that they need.
    if data == -1:
        data = max(count // (fsdp * tensor), 1)
    needed = data * fsdp * tensor
    if needed != count:
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} needs {needed} devices, found {count}"
        )
    # The default is Explicit axes, under which Linen layers fail with these rules.
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
    split = [None if axis is None else RULES[axis] for axis in axes]
    return PartitionSpec(*split)


def logical_axes(init: Any, *axes: str) -> Any:
    """An initializer whose parameter carries logical axes; unknown names raise `KeyError`."""
    partition_spec(*axes)
    return nn.with_logical_partitioning(init, axes)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks the compiler to lay out `x` by logical axes, one per dimension.

    Nothing happens without a mesh. An axis whose length the mesh does not divide stays whole.
    Inside `split_over_batch` rows are split already.

    Raises:
        KeyError: an unknown logical axis.
        ValueError: the number of axes is not the rank of `x`.
    """
    spec = partition_spec(*axes)
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} logical axes {axes} for an array of shape {x.shape}")
    # The names are checked above, also where there is no mesh: a typo should not wait for one.
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.auto_axes:
        return x
    return jax.lax.with_sharding_constraint(x, _fitted(spec, x.shape, mesh))


def axis_size(axis: str, mesh: Mesh | AbstractMesh | None = None) -> int:
    """How many parts a mesh splits a logical axis into; `mesh` is the one that is set by default.

    1 without a mesh, and where each device has its own part already.

    Raises:
        KeyError: an unknown logical axis.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    (axes,) = partition_spec(axis)
    return 1 if mesh.empty else _parts(_unsplit(axes, mesh), mesh)


def parameter_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of parameters from the logical axes its initializers gave them.

    An axis whose length the mesh does not divide stays whole.

    Args:
        boxed: variables as `init` or `jax.eval_shape` of it returns them, boxes included.
        mesh: of `make_mesh`.
    """

    def sharding(leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, PartitionSpec())
        spec = partition_spec(*leaf.names)
        return NamedSharding(mesh, _fitted(spec, leaf.value.shape, mesh))

    return jax.tree.map(sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def _unsplit(axes: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The mesh axes that no `shard_map` around this code has split already."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(name for name in names if name not in mesh.manual_axes)


def _parts(names: tuple[str, ...], mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _fitted(
    spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """The spec without mesh axes that are split already or do not divide an axis of `shape`."""
    fitted: list[tuple[str, ...] | None] = []
    for axes, size in zip(spec, shape, strict=True):
        names = _unsplit(axes, mesh)
        fitted.append(names if names and size % _parts(names, mesh) == 0 else None)
    return PartitionSpec(*fitted)


def split_over_batch(
    function: Callable[..., tuple[Any, Any]], *, by_row: tuple[bool, ...]
) -> Callable[..., Any]:
    """A function that devices run on their own rows of the batch, with one sum over it at the end.

    A loop inside adds up on each device, where the compiler would otherwise sum over devices in
    every turn. Heads and vocabulary stay the compiler's to split.

    Args:
        function: returns what belongs to rows (arrays with the batch in front) and sums over rows.
            Where no mesh divides the rows it runs as it is.
        by_row: of each argument, whether its arrays have the batch in front; the others are shared.
    """

    def split(*arguments: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        with_rows = [x for x, own in zip(arguments, by_row, strict=True) if own]
        rows = jax.tree.leaves(with_rows)[0].shape[0]
        if mesh.empty or axis_size("batch") == 1 or rows % axis_size("batch"):
            return function(*arguments)
        (names,) = partition_spec("batch")
        own = PartitionSpec(names)
        shared = PartitionSpec()

        def run(*arguments: Any) -> Any:
            of_rows, sums = function(*arguments)
            return of_rows, jax.lax.psum(sums, names)

        # Unchecked: a loop that begins with zeros, the same on all devices, ends with what differs
        # between them, which the check takes for a mistake.
        on_each = jax.shard_map(
            run,
            in_specs=tuple(own if of_rows else shared for of_rows in by_row),
            out_specs=(own, shared),
            axis_names={names} if isinstance(names, str) else set(names),
            check_vma=False,
        )
        return on_each(*arguments)

    return split


def split_over_devices(
    function: Callable[..., Any], *, inputs: Any, outputs: Any
) -> Callable[..., Any]:
    """A function that each device runs on its own part of the arrays; the same without a mesh.

    For work in which no part needs another: loops then end where the device's own data says, and
    nothing is summed over devices.

    Args:
        function: of arrays (or trees of them), traceable.
        inputs: for each argument, a `PartitionSpec` of logical axes for each of its arrays.
        outputs: likewise of its result. An axis whose length the mesh does not divide stays whole.
    Raises:
        KeyError: an unknown logical axis.
    """

    def specs(axes: Any, arrays: Any, mesh: AbstractMesh) -> Any:
        return jax.tree.map(
            lambda names, x: _fitted(partition_spec(*names), x.shape, mesh), axes, arrays
        )

    def split(*arrays: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return function(*arrays)
        # Specs of results must be known before the call, and which axes divide follows from shapes.
        results = jax.eval_shape(function, *arrays)
        run = jax.shard_map(
            function,
            in_specs=specs(inputs, arrays, mesh),
            out_specs=specs(outputs, results, mesh),
            check_vma=False,  # as in `split_over_batch`
        )
        return run(*arrays)

    return split
