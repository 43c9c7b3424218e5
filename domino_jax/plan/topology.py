"""Device topologies for ahead-of-time compilation.

They are written `v5p:2x2x2`, a slice of TPUs, or `h100:8`, a number of GPUs. The compilers are
wheels that need no device: libtpu, and XLA's CUDA plugin with NVIDIA's ptxas and cuDNN.
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

_DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "h100": 1}
GPUS_PER_HOST = 8
_SYNTAX = "v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB or h100:N, for example v5p:2x2x2"
# Extra -> module -> packages.
_PACKAGES = {
    "plan-tpu": {"libtpu": "libtpu"},
    "plan-gpu": {
        "jax_cuda13_plugin": "jax-cuda13-plugin",
        "jax_plugins.xla_cuda13": "jax-cuda13-pjrt",
        "nvidia.cu13": "nvidia-cuda-nvcc and nvidia-cublas",
        "nvidia.cudnn": "nvidia-cudnn-cu13",
    },
}
# What libtpu asks the cloud about otherwise; a plan opens no chip and may run beside a program
# that does.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class DeviceSpec:
    """A topology by its name, as parsed: `chip` and the devices along each side."""

    name: str
    chip: str
    sides: tuple[int, ...]

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu compiles for it."""
        return self.chip != "h100"


@dataclass(frozen=True)
class Compiler:
    """The described devices of a topology and the compiler for them, named by its `version`."""

    spec: DeviceSpec
    devices: Sequence[jax.Device]
    version: str
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_device_spec(name: str) -> DeviceSpec:
    """Reads a topology.

    Raises:
        InputError: no such topology; the message tells how one is written.

    >>> parse_device_spec("v5p:2x2x4")
    DeviceSpec(name='v5p:2x2x4', chip='v5p', sides=(2, 2, 4))
    """
    chip, _, shape = name.partition(":")
    sides = re.findall(r"[1-9]\d*", shape)
    if "x".join(sides) != shape or len(sides) != _DIMENSIONS.get(chip):
        raise InputError(f"--on {name!r}: expected {_SYNTAX}")
    spec = DeviceSpec(name, chip, tuple(map(int, sides)))
    count = math.prod(spec.sides)
    if not spec.is_tpu and count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        raise InputError(f"--on {name}: beyond one host, GPUs come in multiples of {GPUS_PER_HOST}")
    return spec


def missing_compiler(spec: DeviceSpec) -> str | None:
    """The missing package of a topology's compiler and how to install it; None if all is there."""
    extra = "plan-tpu" if spec.is_tpu else "plan-gpu"
    for module, package in _PACKAGES[extra].items():
        if not _is_installed(module):
            return f"planning for {spec.chip} needs {package}: pip install 'domino-jax[{extra}]'"
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that holds it
        return False


def compiler_for(spec: DeviceSpec) -> Compiler:
    """The compiler of a topology and its described devices.

    Call it in a process whose jax has CPUs only: then the CUDA plugin is registered without being
    asked whether this machine has a GPU.

    Raises:
        InputError: the compiler is not installed, or knows no such topology.
    """
    if lacking := missing_compiler(spec):
        raise InputError(lacking)
    import jax
    import jax.numpy as jnp
    from jax.experimental.topologies import get_topology_desc

    jax.devices("cpu")  # registers the plugins
    jnp.zeros(())  # and what this process computes itself stays there
    described = _tpu(spec) if spec.is_tpu else _gpus(spec)
    try:
        devices = get_topology_desc(**described).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # Of many lines the first: a message of this program is one.
        said = str(error).strip().partition("\n")[0]
        raise InputError(f"--on {spec.name}: no such topology: {said[:300]}") from error
    if spec.is_tpu:
        return Compiler(spec, devices, _versions("libtpu"))
    version = _versions("jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-cudnn-cu13")
    # Autotuning would time candidates on a device.
    return Compiler(spec, devices, version, {"xla_gpu_autotune_level": 0})


def _versions(*packages: str) -> str:
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


def _tpu(spec: DeviceSpec) -> dict[str, Any]:
    """The arguments of `get_topology_desc`."""
    # Defaults: what a user has set for a TPU of theirs stays.
    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{spec.chip}-{math.prod(spec.sides)}")
    return {"platform": "tpu", "topology_name": spec.name}


def _gpus(spec: DeviceSpec) -> dict[str, Any]:
    """The arguments of `get_topology_desc`."""
    (count,) = spec.sides
    per_host = min(count, GPUS_PER_HOST)
    description = files("domino_jax.plan") / f"{spec.chip}.txtpb"
    return {
        "platform": "cuda",
        "topology_name": spec.chip,
        "target_config": description.read_text(encoding="utf-8"),
        "topology": f"1x{count // per_host}x{per_host}",  # partitions x hosts x GPUs
    }
