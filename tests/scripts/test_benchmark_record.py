"""A benchmark's figures are printed and appended with all that makes them comparable."""

import importlib.metadata
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import benchmark_record
import pytest
from benchmark_record import record, revision, tree_state

DEVICE = {"platform": "gpu", "device": "NVIDIA H100"}


def test_results_are_appended_with_machine_versions_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmark_step.py", "--rounds", "3"])
    path = tmp_path / "history/steps.jsonl"
    for seconds in (1.5, 1.25):
        record(path, {"seconds": seconds}, device=DEVICE | {"seconds": 1})
    assert capsys.readouterr().out == path.read_text(encoding="utf-8")
    first, second = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert [line["figures"] for line in (first, second)] == [{"seconds": 1.5}, {"seconds": 1.25}]
    assert tree_state(revision()).items() <= first.items()
    assert first["command"] == ["benchmark_step.py", "--rounds", "3"]
    hardware = first["hardware"]
    assert hardware.pop("cores") == os.cpu_count() and hardware.pop("processor")
    assert hardware == DEVICE
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


def test_every_benchmark_records_and_no_file_is_made_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record(None, {"seconds": 1.0}, device=DEVICE)
    assert list(tmp_path.iterdir()) == []
    for path in Path(benchmark_record.__file__).parent.glob("benchmark_*.py"):
        text = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":\n' in text:
            assert "add_record_option(parser)" in text, path.name
