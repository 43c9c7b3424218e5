"""Names of places, and what is said where their compilers are missing."""

import pytest

from domino_jax.base.errors import InputError
from domino_jax.plan import topology
from domino_jax.plan.topology import missing_compiler, parse_device_spec


@pytest.mark.parametrize(
    ("name", "sides", "is_tpu"), [("v5p:2x2x2", (2, 2, 2), True), ("h100:16", (16,), False)]
)
def test_a_topology_is_a_chip_and_its_sides(
    name: str, sides: tuple[int, ...], is_tpu: bool
) -> None:
    spec = parse_device_spec(name)
    assert (spec.sides, spec.is_tpu) == (sides, is_tpu)


NO_TPUS = ("v5p", "v5p:", "v5p:2x2", "v5e:2x2x2", "v7:2x2", "v6e:2x-4", "v6e:02x4", "v6e:2x4x")


@pytest.mark.parametrize("name", ["", *NO_TPUS, "h100", "h100:0", "h100:2x2", "h100:12"])
def test_other_names_are_refused_with_the_syntax(name: str) -> None:
    syntax = "come in multiples of 8" if name == "h100:12" else "expected v4:AxBxC, v5e:AxB"
    with pytest.raises(InputError, match=syntax):
        parse_device_spec(name)


@pytest.mark.parametrize(
    ("name", "lacking", "package", "extra"),
    [
        ("v5p:2x2x2", "libtpu", "libtpu", "plan-tpu"),
        ("h100:1", "jax_cuda13_plugin", "jax-cuda13-plugin", "plan-gpu"),
        ("h100:1", "nvidia.cudnn", "nvidia-cudnn-cu13", "plan-gpu"),
    ],
)
def test_a_missing_compiler_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, lacking: str, package: str, extra: str
) -> None:
    monkeypatch.setattr(topology, "_is_installed", lambda module: module != lacking)
    spec = parse_device_spec(name)
    expected = f"planning for {spec.chip} needs {package}: pip install 'domino-jax[{extra}]'"
    assert missing_compiler(spec) == expected
    monkeypatch.setattr(topology, "_is_installed", lambda module: True)
    assert missing_compiler(spec) is None
