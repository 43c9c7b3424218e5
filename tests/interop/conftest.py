"""A draft as other trainers leave it."""

import shutil
from pathlib import Path

import pytest
from exports import CONFIG, params_of

from domino_jax.interop.hf import save_hf_draft


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved float32 Domino draft without checksums, as other trainers leave it."""
    path = tmp_path_factory.mktemp("saved") / "draft"
    save_hf_draft(path, CONFIG, params_of(CONFIG), dtype="float32")
    (path / "SHA256SUMS").unlink()
    return path


@pytest.fixture
def draft(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    return shutil.copytree(saved, tmp_path / "draft")
