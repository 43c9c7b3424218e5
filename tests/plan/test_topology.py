"""Names of places, and what is said where their compilers are missing."""

import pytest

from domino_jax.base.errors import InputError
from domino_jax.plan import topology
from domino_jax.plan.topology import missing_compiler, parse_device_spec


def test_a_place_is_a_chip_and_its_sides() -> None:
    assert (
        parse_device_spec("v5p:2x2x2").sides == (2, 2, 2) and parse_device_spec("v5p:2x2x2").is_tpu
    )
    assert parse_device_spec("h100:16").sides == (16,) and not parse_device_spec("h100:16").is_tpu


TPUS = ("v5p", "v5p:", "v5p:2x2", "v5e:2x2x2", "v7:2x2", "v6e:2x-4")


@pytest.mark.parametrize("name", ["", *TPUS, "h100", "h100:0", "h100:2x2"])
def test_what_is_no_place_is_told_how_one_is_written(name: str) -> None:
    with pytest.raises(InputError, match="expected v4:AxBxC, v5e:AxB"):
        parse_device_spec(name)


def test_more_gpus_than_a_host_has_come_in_hosts() -> None:
    with pytest.raises(InputError, match="come in multiples of 8"):
        parse_device_spec("h100:12")


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
