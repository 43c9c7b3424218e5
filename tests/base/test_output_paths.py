"""Paths of outputs: each that cannot be made or written is refused in one line."""

from pathlib import Path

import pytest

from domino_jax.base.errors import InputError
from domino_jax.base.output_paths import check_output_directory, nearest_existing


def test_nearest_existing_is_the_path_or_a_directory_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert nearest_existing(tmp_path) == tmp_path
    assert nearest_existing("runs/first") == tmp_path


def test_a_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_output_directory("run_dir", tmp_path / "runs" / "first")
    run = tmp_path / "file" / "run"
    for directory, found in (
        (run, f"{run}: {tmp_path}/file is not a directory; give another run_dir"),
        ("gs://b/run", "gs://b/run: an address; expected a directory of this machine"),
        (Path("gs://b/run"), "gs:/b/run: an address; expected a directory of this machine"),
    ):
        with pytest.raises(InputError) as refused:
            check_output_directory("run_dir", directory)
        assert str(refused.value) == f"run_dir: {found}"
