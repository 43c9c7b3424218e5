"""A plan must not need the machine that it is made for: a compiler is content with a description.

A place is written `v5p:2x2x2`, a slice of TPUs by its topology, or `h100:8`, a number of GPUs. The
compilers are wheels that need no device: libtpu, and XLA's CUDA plugin with NVIDIA's ptxas and
cuDNN.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from domino_jax.base.errors import InputError

# jax is imported where a compiler is made: the command line parses `--on` without it.
if TYPE_CHECKING:
    import jax

TPU_DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
GPUS_PER_HOST = 8
_SYNTAX = "v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB or h100:N, for example v5p:2x2x2"
# What libtpu asks the cloud or a person about otherwise; a plan opens no chip, so it may run beside
# what does.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class DeviceSpec:
    """A place by its name, as parsed: `chip` and the devices along each side."""

    name: str
    chip: str
    sides: tuple[int, ...]

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu compiles for it."""
        return self.chip in TPU_DIMENSIONS


@dataclass(frozen=True)
class Compiler:
    """The described devices of a place and what compiles for them.

    `version` names the compiler; a plan of another one is another plan.
    """

    devices: Sequence[jax.Device]
    version: str
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_device_spec(name: str) -> DeviceSpec:
    """Reads a place.

    Raises:
        InputError: no such place; the message tells how one is written.

    >>> parse_device_spec("v5p:2x2x4")
    Place(name='v5p:2x2x4', chip='v5p', sides=(2, 2, 4))
    """
    chip, _, shape = name.partition(":")
    dimensions = TPU_DIMENSIONS.get(chip, 1 if chip == "h100" else 0)
    sides = shape.split("x")
    if not dimensions or len(sides) != dimensions or not all(map(_is_size, sides)):
        raise InputError(f"--on {name!r}: expected {_SYNTAX}")
    spec = DeviceSpec(name, chip, tuple(map(int, sides)))
    count = math.prod(spec.sides)
    if not spec.is_tpu and count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        raise InputError(f"--on {name}: beyond one host, GPUs come in multiples of {GPUS_PER_HOST}")
    return spec


def _is_size(text: str) -> bool:
    return re.fullmatch(r"[1-9]\d*", text) is not None


def missing_compiler(spec: DeviceSpec) -> str | None:
    """The package that planning for a place lacks, with the command that brings it; else None."""
    extra = "plan-tpu" if spec.is_tpu else "plan-gpu"
    needed = {"libtpu": "libtpu"}
    if not spec.is_tpu:
        needed = {
            "jax_cuda13_plugin": "jax-cuda13-plugin",
            "jax_plugins.xla_cuda13": "jax-cuda13-pjrt",
            "nvidia.cu13": "nvidia-cuda-nvcc and nvidia-cublas",
            "nvidia.cudnn": "nvidia-cudnn-cu13",
        }
    for module, package in needed.items():
        if not _is_installed(module):
            return f"planning for {spec.chip} needs {package}: pip install 'domino-jax[{extra}]'"
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that holds it
        return False


def compiler_for(spec: DeviceSpec) -> Compiler:
    """The described devices of a place.

    Call it in a process whose jax has CPUs only: then the CUDA plugin is registered without being
    asked whether this machine has a GPU.

    Raises:
        InputError: the compiler is not installed, or knows no such topology.
    """
    lacking = missing_compiler(spec)
    if lacking is not None:
        raise InputError(lacking)
    import jax
    import jax.numpy as jnp

    jax.devices("cpu")  # registers the plugins
    jnp.zeros(())  # and what this process computes itself stays there
    try:
        return _tpu(spec) if spec.is_tpu else _gpus(spec)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # Of many lines the first: a message of this program is one.
        said = str(error).strip().partition("\n")[0]
        raise InputError(f"--on {spec.name}: no such topology: {said[:300]}") from error


def _tpu(spec: DeviceSpec) -> Compiler:
    from jax.experimental import topologies

    # Defaults: what a user has set for a TPU of theirs stays.
    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{spec.chip}-{math.prod(spec.sides)}")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=spec.name)
    return Compiler(topology.devices, f"libtpu {importlib.metadata.version('libtpu')}")


def _gpus(spec: DeviceSpec) -> Compiler:
    from jax.experimental import topologies

    (count,) = spec.sides
    per_host = min(count, GPUS_PER_HOST)
    description = files("domino_jax.plan") / f"{spec.chip}.txtpb"
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name=spec.chip,
        target_config=description.read_text(encoding="utf-8"),
        topology=f"1x{count // per_host}x{per_host}",  # partitions x hosts x GPUs
    )
    packages = ("jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-cudnn-cu13")
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    # Autotuning would time candidates on a device.
    return Compiler(topology.devices, ", ".join(versions), {"xla_gpu_autotune_level": 0})
