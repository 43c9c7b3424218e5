"""Fake CPU devices, no network, and the real small target that several tests share."""

import hashlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest
from availability import pytest_make_collect_report, pytest_runtest_call, pytest_runtest_setup
from filelock import FileLock
from pitfalls import pytest_addoption, pytest_cmdline_main

TOP = Path(__file__).parent.parent

__all__ = [
    "pytest_addoption",
    "pytest_cmdline_main",
    "pytest_make_collect_report",
    "pytest_runtest_call",
    "pytest_runtest_setup",
]

# Before JAX starts, which reads them once. A platform that is set stays: its devices are real.
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    # Most tests compile longer than they run. The least optimised machine code, in one piece and
    # without fusion emitters, compiles in a quarter of the time.
    quick = [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_force_host_platform_device_count=8",
    ]
    os.environ["XLA_FLAGS"] = " ".join([*quick, os.environ.get("XLA_FLAGS", "")])  # later words win
os.environ["HF_HUB_OFFLINE"] = "1"


def compiled_programs() -> Path:
    """A directory of compiled programs for these versions on this processor.

    Tests train the same tiny drafts again and again, in this process and in others: a program that
    one of them compiled is read by all others, and by the next run of the suite.
    """
    versions = [f"{name}-{version(name)}" for name in ("jax", "jaxlib")]
    # Machine code of a processor may hold instructions that another one lacks.
    cpuinfo = Path("/proc/cpuinfo")
    described = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    instructions = sorted(set(re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", described, re.M)))
    processor = hashlib.sha256("".join(instructions).encode()).hexdigest()[:12]
    return TOP / ".pytest_cache" / "programs" / "-".join([*versions, processor])


if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = compiled_programs()
    # Changed code leaves programs behind; a run has 130 MiB of them. JAX's own bound on the size
    # looks at every file for each program that it adds: 0.4 s at the end of the suite.
    if sum(file.stat().st_size for file in programs.glob("*")) > 2 * 2**30:
        shutil.rmtree(programs)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Torch's tensors are tiny here, and two workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A machine with an accelerator may lack it; no check of a device needs it.
with suppress(ModuleNotFoundError):
    import hypothesis

    # The same examples every time, and no time limit per example: a busy machine is not a failure.
    hypothesis.settings.register_profile("project", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("project")


@pytest.fixture(autouse=True, scope="module")
def drop_compiled_programs() -> Iterator[None]:
    """Drops them after each module: a whole run would hold too many memory maps.

    A compiled program holds memory maps, and a process on Linux may have 65,530 of them.
    """
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of SmolLM2-135M-Instruct, converted once into the user's cache."""
    from domino_jax.target.resolve import resolve_target

    # Beside the directories of all workers: the first one converts, the others wait.
    with FileLock(tmp_path_factory.getbasetemp().parent / "smollm2.lock"):
        return resolve_target("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny target that the tests of a file share."""
    from tiny import write_target

    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def domino(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
):
    """The command in this process: words -> exit code, stdout, stderr."""
    from domino_jax.cli import command, measurement

    # What another state of the code answered must not be what this one is held against.
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(measurement, "user_cache", lambda name, *, needs: cache / name)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["domino", *map(str, words)])
        try:
            command()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run
