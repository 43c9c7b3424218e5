"""FLOPs of every matrix product of a traced step, by stage.

What a step recomputes or masks out costs time too, though its useful FLOPs do not show it. So
products are counted before a compiler rewrites them and on all devices together. A loop counts its
turns, a kernel its grid, a choice between platforms the planned one, any other choice its most
expensive branch: a tile that a kernel skips because of the data is counted, so this is what is
executed *at most*.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from domino_jax.base.scopes import stage_of

OTHER = "other"
_PLATFORMS = {"gpu": ("cuda", "gpu"), "tpu": ("tpu",), "cpu": ("cpu",)}


@dataclass(frozen=True)
class Product:
    """One matrix product: FLOPs of one, and how often it runs.

    `float32`: both sides are, and not to be multiplied in fewer bits.
    """

    flops: int
    times: int
    float32: bool
    path: str

    @property
    def total_flops(self) -> int:
        """Of all its runs."""
        return self.flops * self.times


def products(traced: jax.stages.Traced, *, platform: str, unknown_trip_count: int) -> list[Product]:
    """Every matrix product of a program.

    Args:
        traced: the program.
        platform: of the planned devices, as jax names it.
        unknown_trip_count: of a loop whose length only data knows, at most.
    """
    walk = _Walk(_PLATFORMS[platform], unknown_trip_count)
    return list(walk.of_jaxpr(traced.jaxpr.jaxpr, "", 1))


def flops_by_stage(found: list[Product]) -> dict[str, float]:
    """FLOPs of all products by the stage they belong to, `OTHER` for those outside of all."""
    total: Counter[str] = Counter()
    for product in found:
        total[stage_of(product.path) or OTHER] += product.total_flops
    return {stage: float(flops) for stage, flops in total.items()}


@dataclass(frozen=True)
class _Walk:
    """Goes through a program's equations and those inside them."""

    platforms: tuple[str, ...]
    unknown_trip_count: int

    def of_jaxpr(self, jaxpr: Any, outside: str, times: int) -> Iterator[Product]:
        """The products of a jaxpr that runs `times` times, under the names `outside` it."""
        for equation in jaxpr.eqns:
            names = str(equation.source_info.name_stack)
            path = f"{outside}/{names}" if names else outside
            flops = _flops(equation)
            if flops is not None:
                path = f"{path}/{equation.primitive.name}"
                yield Product(flops, times, _is_float32(equation), path)
            elif equation.primitive.name == "cond":
                yield from self._chosen_branch(equation.params, path, times)
            else:
                trip_count = self._trip_count(equation)
                for inside in _jaxprs(equation.params):
                    yield from self.of_jaxpr(inside, path, times * trip_count)

    def _trip_count(self, equation: Any) -> int:
        name = equation.primitive.name
        params = equation.params
        if name == "scan":
            return params["length"]
        if name == "while":
            return self.unknown_trip_count
        if name == "pallas_call":  # its program is that of one tile
            return math.prod(params["grid_mapping"].grid)
        if name == "shard_map":
            # Its program is that of one device; axes that were manual outside are counted there.
            return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        return 1

    def _chosen_branch(self, params: dict[str, Any], path: str, times: int) -> Iterator[Product]:
        branches = params["branches"]
        platforms = params.get("branches_platforms")
        if platforms is not None:
            # `jax.lax.platform_dependent` is traced as a choice, of which a program keeps one
            # branch. The default has no names; it is the last one.
            planned = (
                branch
                for branch, named in zip(branches, platforms, strict=True)
                if named is None or set(named) & set(self.platforms)
            )
            return self.of_jaxpr(next(planned).jaxpr, path, times)
        found = [list(self.of_jaxpr(branch.jaxpr, path, times)) for branch in branches]
        return iter(max(found, key=lambda of: sum(product.total_flops for product in of)))


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """The programs that an equation's parameters hold."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(one, "jaxpr", one)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def _is_float32(equation: Any) -> bool:
    # A product that asks for nothing gets all bits, which the verbs set; `DEFAULT` asks for fewer.
    precision = equation.params.get("precision")
    asked = precision if isinstance(precision, tuple) else (precision,)
    fewer_bits = all(one == jax.lax.Precision.DEFAULT for one in asked)
    types = {variable.aval.dtype for variable in equation.invars[:2]}
    return types == {jnp.dtype(jnp.float32)} and not fewer_bits


def _flops(equation: Any) -> int | None:
    """FLOPs of a product, None for an equation that is none."""
    name = equation.primitive.name
    params = equation.params
    if name in ("dot_general", "ragged_dot_general"):
        numbers = params.get("dimension_numbers")
        if numbers is None:
            numbers = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        (contracted, _), _ = numbers
        left = equation.invars[0].aval
        result = equation.outvars[0].aval
        sizes = [left.shape[axis] for axis in contracted]
        return 2 * result.size * math.prod(sizes)
    # cuDNN's: two products of every query with every key. Forward alone, for the target is frozen.
    if name.startswith("dot_product_attention_fwd"):
        queries, keys = (variable.aval.shape for variable in equation.invars[:2])
        batch, length, heads, width = queries
        return 4 * batch * length * keys[1] * heads * width
    return None
