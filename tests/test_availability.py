"""A missing package skips the tests that import it, nothing else; a platform that is set stays."""

import os
import runpy
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


def test_only_what_imports_a_missing_package_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "test_top.py").write_text(AT_TOP)
    (tmp_path / "test_inside.py").write_text(INSIDE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = accelerator\n")
    options = ["-p", "availability", "-p", "no:cacheprovider", "-rsf", "-q"]
    done = subprocess.run(
        [sys.executable, "-c", f"{WITHOUT} import pytest; pytest.main({options})"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    printed = done.stdout
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
def test_a_platform_that_is_set_stays(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    # First set, so that the variables are as before after the test.
    monkeypatch.setenv("JAX_PLATFORMS", given or "")
    monkeypatch.setenv("XLA_FLAGS", "")
    del os.environ["XLA_FLAGS"]
    if given is None:
        del os.environ["JAX_PLATFORMS"]
    runpy.run_path(str(TESTS / "conftest.py"))
    fake = f"{QUICK} --xla_force_host_platform_device_count=8"
    assert os.environ["JAX_PLATFORMS"] == (given or "cpu")
    assert os.environ.get("XLA_FLAGS", "").split() == ([] if given == "cuda" else fake.split())
