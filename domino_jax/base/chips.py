"""What the makers publish of the chips that a run is trained on.

A speed says little until it is held against what the chip could do: plans and the figures of a run
take their yardstick from here. A chip that is not listed has none.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One device as jax counts devices.

    `flops`: dense bfloat16 operations per second; `memory`: bytes of its memory; `bandwidth`: of
    it, bytes per second.
    """

    flops: float
    memory: int
    bandwidth: float


_GIB = 2**30
_V5E = Chip(197e12, 16 * _GIB, 0.82e12)
_V5P = Chip(459e12, 95 * _GIB, 2.765e12)
_V6E = Chip(918e12, 32 * _GIB, 1.64e12)
_H100 = Chip(989e12, 80 * _GIB, 3.35e12)
# By the name that jax gives the chip (`device_kind`), for some of them in two spellings. Sources:
# cloud.google.com/tpu/docs (v4, v5e, v5p, v6e) and NVIDIA's data sheets of A100, H100 SXM and H200,
# figures without sparsity.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * _GIB, 1.2e12),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * _GIB, 1.555e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * _GIB, 2.039e12),
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H200": Chip(989e12, 141 * 10**9, 4.8e12),
}
