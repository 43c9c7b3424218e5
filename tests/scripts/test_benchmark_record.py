"""A benchmark's figures are appended with all that makes them comparable."""

import importlib.metadata
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from benchmark_record import record, revision, tree_state

SCRIPTS = Path(__file__).parent.parent.parent / "scripts/bench"
DEVICE = {"platform": "gpu", "device": "NVIDIA H100"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_results_are_appended_with_machine_versions_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmark_step.py", "--rounds", "3"])
    path = tmp_path / "history/steps.jsonl"
    for seconds in (1.5, 1.25):
        record(path, {"seconds": seconds}, device=DEVICE)
    first, second = lines(path)
    assert [line["figures"] for line in (first, second)] == [{"seconds": 1.5}, {"seconds": 1.25}]
    assert tree_state(revision()).items() <= first.items()
    assert first["command"] == ["benchmark_step.py", "--rounds", "3"]
    assert first["hardware"]["cores"] == os.cpu_count() and first["hardware"]["processor"]
    assert {name: first["hardware"][name] for name in DEVICE} == DEVICE
    assert set(first["versions"]) == {"jax", "jaxlib", "numpy"}
    assert first["versions"]["jax"] == importlib.metadata.version("jax")
    passed = datetime.now(UTC) - datetime.fromisoformat(first["date"])
    assert abs(passed.total_seconds()) < 60


@pytest.mark.parametrize(
    ("described", "name", "clean"),
    [("abc1234", "abc1234", True), ("abc1234-dirty", "abc1234", False), ("unknown",) * 2 + (None,)],
)
def test_a_result_says_of_which_tree_it_is(described: str, name: str, clean: bool | None) -> None:
    assert tree_state(described) == {"revision": name, "clean": clean}


def test_nothing_is_recorded_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record(None, {"seconds": 1.0}, device=DEVICE)
    assert list(tmp_path.iterdir()) == []


def test_every_benchmark_that_prints_figures_records_them() -> None:
    for path in SCRIPTS.glob("benchmark_*.py"):
        text = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":\n' in text:
            assert "add_record_option(parser)" in text, path.name


def test_a_step_that_is_measured_is_recorded(tmp_path: Path) -> None:
    words = ["--workload", "qwen3-8b", "--anchors", "256", "--modes", "draft", "--tiny"]
    words += ["--no-peer", "--rounds", "1", "--record", str(tmp_path / "steps.jsonl")]
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "benchmark_step.py"), *words],
        env={
            **os.environ,
            "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (printed,) = json.loads(done.stdout.splitlines()[-1])["settings"]
    (line,) = lines(tmp_path / "steps.jsonl")
    assert printed.items() <= line["figures"].items() and line["figures"]["tiny"]
    assert line["hardware"]["platform"] == line["hardware"]["device"] == "cpu"
    assert line["command"] == ["benchmark_step.py", *words]
