"""Random weights that jax and torch make alike on their own device, from nothing but their names.

Two sides that start from other weights have losses that cannot be compared, and a file that both
read is 16 GB for an 8B target. So a weight is a hash of its tensor's name and of its place in it:
integers and exact steps only, up to one product that both round alike.
"""

import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

STD = 0.02
WORD = 0xFFFFFFFF
FACTORS = (0x85EBCA6B, 0xC2B2AE35)  # of MurmurHash3's last mixing step
TORCH_PIECE = 1 << 26  # without unsigned arithmetic in torch an element takes 8 bytes


def is_norm(name: str) -> bool:
    """Whether a tensor is the weight of a norm, which is one everywhere."""
    return name.endswith("norm.weight")


def jax_weight(
    names: str | Sequence[str], shape: Sequence[int], dtype: str, *, std: float = STD
) -> jax.Array:
    """The tensor of a name, or those of several stacked on a first axis, on the default device.

    Args:
        names: one name, or one for each layer.
        shape: of one tensor, at most 2**32 elements.
        dtype: of the result; float32 values are rounded to it.
        std: standard deviation of the even distribution around 0.
    """
    stacked = () if isinstance(names, str) else (len(names),)
    if is_norm(names if isinstance(names, str) else names[0]):
        return jnp.ones((*stacked, *shape), dtype)
    salts = salt(names) if isinstance(names, str) else [salt(name) for name in names]
    return _spread(jnp.asarray(np.array(salts, np.uint32)), tuple(shape), dtype, width(std))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _spread(salts: jax.Array, shape: tuple[int, ...], dtype: str, width: float) -> jax.Array:
    spec = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    mixed = _mixed(_mixed(spec) ^ salts.reshape(*salts.shape, *(1 for _ in shape)))
    even = (mixed >> 8).astype(jnp.float32) * jnp.float32(2.0**-24) - jnp.float32(0.5)
    return (even * jnp.float32(width)).astype(dtype)


def _mixed(x: jax.Array) -> jax.Array:
    for shift, factor in ((16, FACTORS[0]), (13, FACTORS[1])):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def fill_torch(name: str, tensor: Any, *, std: float = STD, piece: int = TORCH_PIECE) -> None:
    """Writes the same values as `jax_weight` into a contiguous torch tensor, on its own device.

    `piece` elements are hashed at a time.
    """
    import torch

    with torch.no_grad():
        if is_norm(name):
            tensor.fill_(1.0)
            return
        flat = tensor.view(-1)
        for begin in range(0, flat.numel(), piece):
            part = flat[begin : begin + piece]
            spec = torch.arange(begin, begin + part.numel(), device=tensor.device)
            mixed = _torch_mixed(_torch_mixed(spec) ^ salt(name))
            even = (mixed >> 8).to(torch.float32) * 2.0**-24 - 0.5
            part.copy_(even * width(std))


def _torch_mixed(x: Any) -> Any:
    for shift, factor in ((16, FACTORS[0]), (13, FACTORS[1])):
        x = ((x ^ (x >> shift)) * factor) & WORD  # right however the product overflows
    return x ^ (x >> 16)


def salt(name: str) -> int:
    """A number of 32 bits for a name."""
    return zlib.crc32(name.encode())


def width(std: float) -> float:
    """From the lowest to the highest value of an even distribution, as a float32."""
    return float(np.float32(std * math.sqrt(12.0)))
