"""Directories of tiny models, and one that is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch_models import tiny, tiny_gguf, vocabulary

from domino_jax.target.load import LoadedTarget, load_target

__all__ = ["tiny", "tiny_gguf", "vocabulary"]


@pytest.fixture(scope="module")
def llama(tiny: Callable[..., Any]) -> Path:
    return tiny("llama", tied=True).directory


@pytest.fixture(scope="module")
def qwen3(tiny: Callable[..., Any]) -> Path:
    return tiny("qwen3", tied=False).directory


@pytest.fixture(scope="module")
def loaded(tiny: Callable[..., Any]) -> LoadedTarget:
    return load_target(tiny("qwen3", tied=False).directory)
