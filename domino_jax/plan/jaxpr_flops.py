"""What a step recomputes or masks out costs time too, though its useful FLOPs do not show it.

So every matrix product of a traced step is counted, by stage, before a compiler rewrites them and
on all devices together. A loop counts its turns, a kernel its grid, a choice between platforms the
planned one, any other choice its most expensive branch: a tile that a kernel skips because of the
data is counted, so this is what is executed *at most*.
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


@dataclass(frozen=True)
class _Scope:
    """Where a walk stands: names so far, and how often what is there runs."""

    path: str
    times: int


def products(traced: jax.stages.Traced, *, platform: str, unknown_trip_count: int) -> list[Product]:
    """Every matrix product of a program.

    Args:
        traced: the program.
        platform: of the planned devices, as jax names it.
        unknown_trip_count: of a loop whose length only data knows, at most.
    """
    walk = _Walk(_PLATFORMS[platform], unknown_trip_count)
    return list(walk.of_jaxpr(traced.jaxpr.jaxpr, _Scope("", 1)))


def flops_by_stage(found: list[Product]) -> dict[str, float]:
    """FLOPs of all products by the stage they belong to, `OTHER` for those outside of all."""
    total: Counter[str] = Counter()
    for product in found:
        total[stage_of(product.path) or OTHER] += product.flops * product.times
    return {stage: float(flops) for stage, flops in total.items()}


def float32_flops(found: list[Product]) -> float:
    """FLOPs of all products of float32 with float32."""
    return float(sum(product.flops * product.times for product in found if product.float32))


class _Walk:
    """Goes through a program's equations and those inside them."""

    def __init__(self, platforms: tuple[str, ...], unknown_trip_count: int) -> None:
        self._platforms = platforms
        self._unknown_trip_count = unknown_trip_count

    def of_jaxpr(self, jaxpr: Any, at: _Scope) -> Iterator[Product]:
        for equation in jaxpr.eqns:
            names = str(equation.source_info.name_stack)
            path = f"{at.path}/{names}" if names else at.path
            yield from self._of_equation(equation, _Scope(path, at.times))

    def _of_equation(self, equation: Any, at: _Scope) -> Iterator[Product]:
        name = equation.primitive.name
        params = equation.params
        flops = _flops(equation)
        if flops is not None:
            yield Product(flops, at.times, _is_float32(equation), f"{at.path}/{name}")
            return
        if name == "cond":
            yield from self._most_expensive(equation, at)
            return
        trip_count = 1
        if name == "scan":
            trip_count = params["length"]
        elif name == "while":
            trip_count = self._unknown_trip_count
        elif name == "pallas_call":
            # Its program is that of one tile.
            trip_count = math.prod(params["grid_mapping"].grid)
        elif name == "shard_map":
            # Its program is that of one device; axes that were manual outside are counted there.
            sides = [params["mesh"].shape[axis] for axis in params["newly_manual_axes"]]
            trip_count = math.prod(sides)
        for jaxpr in _inside(params):
            yield from self.of_jaxpr(jaxpr, _Scope(at.path, at.times * trip_count))

    def _most_expensive(self, equation: Any, at: _Scope) -> Iterator[Product]:
        branches = equation.params["branches"]
        # `jax.lax.platform_dependent` is traced as a choice, of which a program keeps one branch.
        platforms = equation.params.get("branches_platforms")
        if platforms is not None:
            chosen = next(
                branch
                for branch, named in zip(branches, platforms, strict=True)
                # The default has no names; it is the last one.
                if named is None or set(named) & set(self._platforms)
            )
            yield from self.of_jaxpr(chosen.jaxpr, at)
            return

        def flops(found: list[Product]) -> int:
            return sum(product.flops * product.times for product in found)

        found = [list(self.of_jaxpr(branch.jaxpr, at)) for branch in branches]
        yield from max(found, key=flops)


def _inside(params: dict[str, Any]) -> Iterator[Any]:
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
