"""Launchers of several processes, recognised before anything is written."""

import pytest

from domino_jax.base.errors import InputError
from domino_jax.processes import check_single_process

BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
RANKS = (
    ({**BATCH_SCRIPT, "SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS='4': 4 processes"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE='2': 2 processes"),
    ({"PMI_SIZE": "8", "PMI_RANK": "0"}, "PMI_SIZE='8': 8 processes"),
    ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES='2': 2 processes"),
    ({"JAX_PROCESS_COUNT": "2"}, "JAX_PROCESS_COUNT='2': 2 processes"),
    ({"JAX_COORDINATOR_ADDRESS": "n0:1234"}, "'n0:1234': several processes"),
    ({"NUM_PROCESSES": "3", "COORDINATOR_ADDRESS": "job-0"}, "NUM_PROCESSES='3': 3 processes"),
    ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE='2': 2 processes"),
    ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, "TPU_WORKER_HOSTNAMES='t-0,t-1': 2 processes"),
    ({"TPU_PROCESS_ADDRESSES": "a:1,b:1,c:1"}, "TPU_PROCESS_ADDRESSES='a:1,b:1,c:1': 3 processes"),
    ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "t-0"}, "MEGASCALE_NUM_SLICES='2': 2"),
)
ALONE = (
    {},
    BATCH_SCRIPT,  # the script itself runs once
    {**BATCH_SCRIPT, "SLURM_STEP_NUM_TASKS": "1"},
    {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1", "MEGASCALE_NUM_SLICES": "1"},
    {"JAX_COORDINATOR_ADDRESS": "localhost:1234", "JAX_NUM_PROCESSES": "1"},
    {"TPU_WORKER_HOSTNAMES": "localhost"},
    # Of a slice, this process has its own host alone.
    {"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_PROCESS_ADDRESSES": "localhost:8476"},
    {"WORLD_SIZE": "2"},
    {"NUM_PROCESSES": "16"},  # of some other program
    {"WORLD_SIZE": "4", "RANK": "", "NUM_PROCESSES": "2", "COORDINATOR_ADDRESS": ""},
    {"PMI_SIZE": "", "OMPI_COMM_WORLD_SIZE": "many", "JAX_COORDINATOR_ADDRESS": ""},
    {"JOB_COMPLETION_INDEX": "3", "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
)


@pytest.mark.parametrize(("environment", "found"), RANKS, ids=lambda value: str(value)[:40])
def test_ranks_are_refused(environment: dict[str, str], found: str) -> None:
    with pytest.raises(InputError) as caught:
        check_single_process("domino train", environment)
    said = str(caught.value)
    assert found in said
    assert "`domino train` runs in one; start it once (srun --ntasks=1), or unset " in said


@pytest.mark.parametrize("environment", ALONE, ids=str)
def test_a_single_process_is_accepted(environment: dict[str, str]) -> None:
    check_single_process("domino train", environment)
