"""Eight fake CPU devices, no network, and the real small target that several tests share."""

import os
from pathlib import Path

import pytest

# Before JAX starts, which reads them once.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct, converted once into the user's cache."""
    from domino_jax.target.gguf import resolve_target

    return resolve_target("smollm2-135m-instruct")
