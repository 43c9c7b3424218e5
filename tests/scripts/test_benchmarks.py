"""The benchmarks of real size, on widths of seconds: they must run wherever a GPU is at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from domino_jax.training.flops import step_flops

SCRIPTS = Path(__file__).parent.parent.parent / "scripts/bench"
# What the machines with a GPU lack: nothing that runs there may import it.
ABSENT = ("grain", "array_record", "gguf", "platformdirs", "datasets")


def run(name: str, words: list[str], tmp_path: Path) -> dict[str, Any]:
    """The figures of a script that runs where `ABSENT` cannot be imported; it records them."""
    for package in ABSENT:
        module = tmp_path / f"{package}.py"
        module.write_text(f"raise ModuleNotFoundError('no {package}', name='{package}')\n")
    # One device, and programs compiled in a hurry.
    one_device = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    environment = {**os.environ, "XLA_FLAGS": one_device}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(SCRIPTS.parents[1])])
    words = [*words, "--record", str(tmp_path / "record.jsonl")]
    command = [sys.executable, str(SCRIPTS / name), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    line = json.loads(done.stdout.splitlines()[-1])
    assert line == json.loads((tmp_path / "record.jsonl").read_text(encoding="utf-8"))
    assert line["hardware"]["platform"] == line["hardware"]["device"] == "cpu"
    assert line["command"] == [name, *words]
    return line["figures"]


@pytest.mark.parametrize(
    ("workload", "anchors", "teraflops"),
    [("qwen3-8b", 256, 65.5), ("qwen3-8b", 512, 101.7), ("qwen3-4b", 256, 36.8)],
)
def test_step_flops_count_what_is_useful(workload: str, anchors: int, teraflops: float) -> None:
    from benchmark_workloads import WORKLOADS, draft_config, target_config

    target = target_config(WORKLOADS[workload].shape, dtype="bfloat16", tiny=False)
    draft = draft_config(target)
    parts = step_flops(draft, WORKLOADS[workload].length, anchors, target=target)
    assert sum(parts.values()) == pytest.approx(teraflops * 1e12, rel=2e-3)
    assert draft.target_layer_ids == (1, 9, 17, 25, 33)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_sides_make_the_same_weights(dtype: str) -> None:
    import torch
    from benchmark_weights import fill_torch, jax_weight

    shape = (30, 700)
    theirs = torch.empty(shape, dtype=getattr(torch, dtype))
    fill_torch("layers.0.mlp.up_proj.weight", theirs, piece=5000)
    ours = jax_weight("layers.0.mlp.up_proj.weight", shape, dtype)
    np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs.float().numpy())
    assert np.std(theirs.float().numpy()) == pytest.approx(0.02, rel=0.01)

    stacked = jax_weight(["a.weight", "b.weight"], (3, 5), dtype)
    np.testing.assert_array_equal(stacked[1], jax_weight("b.weight", (3, 5), dtype))
    assert not np.array_equal(stacked[0], stacked[1])
    assert np.all(np.asarray(jax_weight("model.norm.weight", (7,), dtype)) == 1)


@pytest.mark.parametrize(
    ("workload", "mode", "dtype", "tolerance"),
    [
        ("specforge", "draft", "float32", 1e-6),
        ("qwen3-8b", "online", "float32", 1e-6),
        ("qwen3-4b", "online", "bfloat16", 2e-3),  # whose head is the embedding
    ],
)
def test_both_sides_take_the_same_steps(
    workload: str, mode: str, dtype: str, tolerance: float
) -> None:
    import benchmark_nemo
    import benchmark_ours
    from benchmark_workloads import draft_config, settings, target_config

    (setting,) = settings(workload, anchors=[256], modes=[mode], tiny=True)
    target = target_config(setting.shape, dtype=dtype, tiny=True)
    draft = draft_config(target)
    row = np.random.default_rng(0).integers(0, draft.mask_token_id, (1, setting.length))
    online = mode == "online"
    drawn = benchmark_ours.drawn_anchors(draft, setting, steps=2)
    ours, our_words = benchmark_ours.recipe_step(
        draft, target, input_ids=row, online=online, num_anchors=setting.num_anchors, chunk_blocks=2
    )
    nemo, nemo_words = benchmark_nemo.recipe_step(
        draft, target, input_ids=row, online=online, compiled=False, **drawn
    )
    steps = np.array([[ours(), nemo()] for _ in range(2)])
    np.testing.assert_allclose(steps[:, 0], steps[:, 1], rtol=tolerance)
    assert our_words()["dtype"] == nemo_words()["dtype"] == dtype


def test_nemo_is_imported_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmark_nemo import importable_without_datasets

    monkeypatch.setitem(sys.modules, "datasets", None)
    with importable_without_datasets():
        from datasets import Dataset
    assert isinstance(Dataset, type) and "datasets" not in sys.modules


class FakeSide:
    """A side whose steps take no time; `steps` until it ends, as for want of memory."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.left, self.last = name, steps, 0.5
        self.seconds: list[float] = []
        self.losses: list[float] = [2.0]

    def step(self, *, measured: bool) -> None:
        from benchmark_sides import SideEnded

        self.left -= 1
        if self.left < 0:
            raise SideEnded(self.name)
        self.seconds.append(self.last)

    def finish(self) -> dict[str, Any]:
        return {"device": "NVIDIA H200", "peak_bytes": 2**30, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("lives", "turns", "has_peer"),
    [
        ((9,), "alternating", True),
        ((2, 9), "each side alone", True),
        ((2, 0), "each side alone", False),
    ],
)
def test_each_side_runs_alone_where_both_do_not_fit(
    lives: tuple[int, ...], turns: str, has_peer: bool
) -> None:
    import benchmark_step
    from benchmark_workloads import Setting

    left = list(lives)

    def start(name: str) -> FakeSide:
        return FakeSide(name, 99 if name == "ours" else left.pop(0))

    setting = Setting("qwen3-8b", 512, "online", tiny=False)
    options = SimpleNamespace(no_peer=False, rounds=3)
    figures = benchmark_step.measure(start, setting, options)
    assert figures["turns"] == turns
    assert len(figures["ours"]["all_seconds"]) == 3
    assert ("nemo" in figures) == ("ratio" in figures) == has_peer
    assert figures["ours"]["useful_mfu"] == pytest.approx(101.69e12 / 0.5 / 989e12, rel=1e-3)
    benchmark_step.show(figures)


def measured_step(tmp_path: Path, *words: str) -> dict[str, Any]:
    words = ("--workload", "qwen3-8b", "--anchors", "256", "--tiny", "--rounds", "1", *words)
    setting = run("benchmark_step.py", [*words], tmp_path)
    assert (setting["length"], setting["anchors"], setting["tiny"]) == (64, 4, True)
    assert setting["ours"]["samples_per_second"] > 0
    # Nobody publishes a peak of this machine: it is measured.
    assert setting["peak_flops_per_second"] > 0 and setting["ours"]["peak_bytes"] > 2**20
    return setting


def test_a_step_is_measured_alone(tmp_path: Path) -> None:
    setting = measured_step(tmp_path, "--modes", "draft", "--no-peer")
    assert "nemo" not in setting


@pytest.mark.slow  # its parts are above, and the steps of both sides
def test_a_step_is_measured_beside_nemo(tmp_path: Path) -> None:
    import nemo_automodel  # noqa: F401

    setting = measured_step(tmp_path, "--modes", "online")
    assert setting["turns"] == "alternating" and setting["first_loss_difference"] < 1e-6
    assert setting["ratio"] == setting["nemo"]["seconds"] / setting["ours"]["seconds"]
    assert setting["nemo"]["versions"]["nemo-automodel"] == "0.7.0"


@pytest.mark.slow
def test_decoding_is_measured_beside_transformers_and_nemo(tmp_path: Path) -> None:
    import nemo_automodel  # noqa: F401

    words = ["--shape", "qwen3-4b", "--tiny", "--limit", "1"]
    words += ["--max-new-tokens", "6", "--batch-sizes", "1"]
    report = run("benchmark_decode.py", words, tmp_path)
    assert set(report["ways"]) == {"plain", "domino", "dflash", "transformers", "nemo"}
    for way in report["ways"].values():
        assert way["answers_equal_to_plain"] == 1
        assert way["seconds_per_verification"] > 0
    assert set(report["cycle"]) == {"domino", "dflash"}
