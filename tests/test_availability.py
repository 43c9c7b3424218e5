"""A missing package skips the tests that import it, nothing else; a platform that is set stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
WITHOUT = "import sys; sys.modules |= {'torch': None, 'grain': None}; "
AT_TOP = "import torch\n\ndef test_never(): raise AssertionError"
INSIDE = """
import pytest
from domino_jax.data.pipeline import row_batches

@pytest.fixture
def reference():
    import torch.nn

def test_fixture(reference): raise AssertionError
def test_itself():
    from torch import nn
def test_neither(): pass
def test_another(): import not_a_package
def test_of_the_package(): row_batches([[]], batch_size=1, max_length=1, seed=0)
@pytest.mark.accelerator
def test_device(): raise AssertionError
"""


def run(program: str, *, platform: str | None, directory: Path) -> str:
    """What a Python in `directory` prints that finds the tests' folder, JAX_PLATFORMS as given."""
    own = ("JAX_PLATFORMS", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *sys.path])
    if platform is not None:
        environment["JAX_PLATFORMS"] = platform
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_only_what_imports_a_missing_package_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "test_top.py").write_text(AT_TOP)
    (tmp_path / "test_inside.py").write_text(INSIDE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = accelerator\n")
    options = ["-p", "availability", "-p", "no:cacheprovider", "-rsf", "-q"]
    program = f"{WITHOUT} import pytest; pytest.main({options})"
    printed = run(program, platform="cpu", directory=tmp_path)
    assert "1 passed, 4 skipped" in printed and "2 failed" in printed
    assert "FAILED test_inside.py::test_another" in printed
    assert "FAILED test_inside.py::test_of_the_package" in printed  # it needs grain: never a reason
    assert "test_top.py:1: needs torch, which scripts/test installs on Python 3.11" in printed
    assert "needs a GPU or TPU: JAX_PLATFORMS=cuda pytest -m accelerator" in printed


QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_use_fusion_emitters=false"
)


@pytest.mark.parametrize("given", [None, "cpu", "cuda"])
def test_a_platform_that_is_set_stays(tmp_path: Path, given: str | None) -> None:
    variables = "os.environ['JAX_PLATFORMS'], os.environ.get('XLA_FLAGS')"
    printed = run(f"import conftest, os; print({variables})", platform=given, directory=tmp_path)
    fake = "None" if given == "cuda" else f"{QUICK} --xla_force_host_platform_device_count=8"
    assert printed.split() == [given or "cpu", *fake.split()]
