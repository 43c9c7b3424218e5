"""docs/extend.md holds: its programs and commands run, its listings apply to the package."""

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from commands import run_commands
from documents import TOP, apply_listings, commands, page, programs, section
from house import complaints
from safetensors.flax import load_file

from domino_jax.base.errors import InputError
from domino_jax.target.decoder_keys import read_decoder_config

PAGE = page("docs/extend.md")
LOSS, HEAD, TARGET = (section(PAGE, f"Your own {part}") for part in ("loss", "head", "target"))
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="listings are applied by git")


def run(directory: Path, package: Path, names: list[str], lines: list[str]) -> str:
    """Runs programs and then commands in a directory with a package; returns what they log."""
    words = [[name] for name in names]
    # A script of the page's own stands for the command.
    words += [shlex.split(line.removeprefix("python ")) for line in lines]
    told = run_commands(words, directory, paths=(package, directory, TOP / "tests/support"))
    assert [code for code, _, _ in told] == [0] * len(words), told
    return "".join(log for _, _, log in told)


@pytest.fixture
def place(tmp_path: Path) -> SimpleNamespace:
    """A directory with `config.yaml`, a target in `DIR`, and a copy of the package beside them."""
    tiny.run_config(tmp_path, tiny.write_target(tmp_path / "DIR"), train={"steps": 1})
    package = tmp_path / "copy"
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(TOP / "domino_jax", package / "domino_jax", ignore=unwanted)
    return SimpleNamespace(directory=tmp_path, package=package)


def write(text: str, directory: Path) -> list[str]:
    """Writes the programs of a section, and returns their names."""
    found = programs(text)
    for name, body in found.items():
        (directory / name).write_text(body, encoding="utf-8")
    return list(found)


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face directory, in float32."""
    found = load_file(directory / "model.safetensors")
    return {name: np.asarray(tensor, np.float32) for name, tensor in found.items()}


def test_a_loss_of_ones_own_trains_from_python_and_from_the_command(place: SimpleNamespace) -> None:
    assert write(LOSS, place.directory) == ["focal.py", "check_focal.py", "my_domino.py"]
    run(place.directory, TOP, ["check_focal.py"], commands(LOSS))
    recorded = (place.directory / "runs/focal/config.yaml").read_text()
    assert "loss_type: focal" in recorded and "focus: 1.5" in recorded
    _, line, *_ = (place.directory / "runs/focal/metrics.jsonl").read_text().splitlines()
    assert np.isfinite(json.loads(line)["loss"])


def extend(text: str, package: Path) -> None:
    """Applies the listings of a section; the package then keeps its own rules still."""
    apply_listings(text, package)
    top = package / "domino_jax"
    assert not [wrong for path in top.rglob("*.py") for wrong in complaints(path, top)]


@needs_git
def test_a_head_of_ones_own_trains_goes_out_and_comes_back(place: SimpleNamespace) -> None:
    extend(HEAD, place.package)
    names = write(HEAD, place.directory)
    told = run(place.directory, place.package, names, commands(HEAD))
    assert "8 tokens, tau" in told
    settings = json.loads((place.directory / "DRAFT/config.json").read_text())
    assert settings["dflash_config"]["projector_type"] == "linear"
    stored = tensors(place.directory / "DRAFT")
    assert stored["linear_head.0.weight"].shape == (8, 16)
    assert stored["linear_head.1.weight"].shape == (len(tiny.WORDS), 8)
    assert not [name for name in stored if "prefix_gru" in name]


@needs_git
def test_a_target_of_ones_own_trains_and_decodes(place: SimpleNamespace) -> None:
    settings = place.directory / "DIR/config.json"
    renamed = json.loads(settings.read_text()) | {"model_type": "sandwich"}
    with pytest.raises(InputError, match="model_type is 'sandwich'"):
        settings.write_text(json.dumps(renamed))
        read_decoder_config(settings.parent, dtype="float32")

    extend(TARGET, place.package)
    (place.directory / "sandwich.py").write_text(
        "import dataclasses, json, pathlib, tiny\n"
        "tiny.CONFIG = dataclasses.replace(tiny.CONFIG, attention_output_norm=True)\n"
        "tiny.write_target(pathlib.Path('DIR'))\n"
        f"pathlib.Path('DIR/config.json').write_text({json.dumps(renamed)!r})\n"
    )
    told = run(place.directory, place.package, ["sandwich.py"], commands(TARGET))
    assert "8 tokens, tau" in told
    norms = [name for name in tensors(settings.parent) if "post_self_attn_layernorm" in name]
    assert len(norms) == tiny.CONFIG.num_hidden_layers
