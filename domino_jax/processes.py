"""Launchers of several processes, recognised by the environment variables that they set.

A verb runs in one process: several ranks would each write the same files. Nothing here starts
`jax.distributed`, so `jax.process_count()` is 1 in each rank, and only the launcher's variables
show the others. No jax here: ranks are refused before it is imported.
"""

import os
import re
from collections.abc import Mapping

from domino_jax.base.errors import InputError, shown

# Variable of a number of processes -> a variable that must be set too, where the name alone is
# ambiguous. SLURM_NTASKS is no such variable: a batch script that runs once has it as well.
COUNTS: Mapping[str, str | None] = {
    "SLURM_STEP_NUM_TASKS": None,  # a step of srun
    "OMPI_COMM_WORLD_SIZE": None,  # Open MPI
    "PMI_SIZE": None,  # MPICH, Intel MPI
    "JAX_NUM_PROCESSES": None,  # Kubeflow Trainer
    "JAX_PROCESS_COUNT": None,  # XPK
    "NUM_PROCESSES": "COORDINATOR_ADDRESS",  # JAXJob of Kubeflow
    "WORLD_SIZE": "RANK",  # torchrun, PyTorchJob of Kubeflow
    "MEGASCALE_NUM_SLICES": None,  # TPU slices of a JobSet
}
# Hosts of a TPU slice, separated by commas; libtpu and jax read the first that is set.
HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
COORDINATOR = "JAX_COORDINATOR_ADDRESS"  # read by jax.distributed.initialize


def check_single_process(command: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises `InputError` if the environment announces several processes.

    Args:
        command: of each process, for the message.
        environment: variables of this process.
    """
    for name, count in _announced(environment).items():
        if count is None or count > 1:
            launched = "several processes" if count is None else f"{count} processes"
            raise InputError(
                f"{name}={shown(environment[name])}: {launched} were launched; `{command}` runs in "
                f"one; start it once (srun --ntasks=1), or unset {name} if it is alone"
            )


def _announced(environment: Mapping[str, str]) -> Mapping[str, int | None]:
    """Number of processes by the variable that announces it; None if it shows no number."""
    counts: dict[str, int | None] = {}
    for name, companion in COUNTS.items():
        value = environment.get(name, "")
        if re.fullmatch("[0-9]{1,9}", value) and (companion is None or environment.get(companion)):
            counts[name] = int(value)
    hosts = next((name for name in HOSTS if name in environment), None)
    if hosts is not None:
        counts[hosts] = len(environment[hosts].split(","))
    # Next to a count, the coordinator may be that of a single process.
    if environment.get(COORDINATOR) and not counts:
        counts[COORDINATOR] = None
    return counts
