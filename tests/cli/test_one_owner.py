"""A verb is the only writer of its output: the second process is refused and writes nothing."""

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import TOP, run_commands
from lock_owner import lock_owner
from trees import SMALLEST

from domino_jax.base.lock import Owner

WITHOUT_JAX = """
import sys
for name in ("jax", "flax", "transformers", "orbax", "matplotlib"):
    sys.modules[name] = None  # importing it fails now
"""
# A command, its output, and its lock file.
VERBS = (
    ("train config.yaml run_dir=run", "run", "run/.lock"),
    ("train config.yaml run_dir=name/run", "name/run", "run/.lock"),
    ("capture config.yaml states", "states", "states/.lock"),
    (
        "regenerate prompts.jsonl answers.jsonl --target target",
        "answers.jsonl",
        ".answers.jsonl.lock",
    ),
    ("prompts own.jsonl --target target --count 2", "own.jsonl", ".own.jsonl.lock"),
    ("export run draft", "draft", ".draft.lock"),
    ("import draft imported --target target", "imported", ".imported.lock"),
    ("target model.gguf converted", "converted", ".converted.lock"),
    ("evaluate run prompts.jsonl --append", "run/evaluation.json", "run/.evaluation.json.lock"),
    ("report run", "run/report.html", "run/.report.html.lock"),
    ("report run --out page.html", "page.html", ".page.html.lock"),
)
LOCKS = sorted({lock for _, _, lock in VERBS})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with what each verb looks for before it imports jax."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SMALLEST))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 1.0}\n')
    (tmp_path / "name").symlink_to(".")
    return tmp_path


def tree(directory: Path) -> dict[str, bytes | None]:
    """The bytes of each file below a directory; None of a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def refusals(place: Path, before: str = "") -> list[str]:
    """The line of each verb, which imports no jax and leaves everything as it is."""
    was = tree(place)
    commands = [["domino", *shlex.split(line)] for line, _, _ in VERBS]
    told = run_commands(commands, place, before=WITHOUT_JAX + before)
    assert tree(place) == was
    for (line, _, _), (code, out, errors) in zip(VERBS, told, strict=True):
        assert (code, out, errors.count("\n")) == (2, "", 1), (line, errors)
        assert errors.startswith("error: ") and len(errors) <= 500, (line, errors)
    return [errors for _, _, errors in told]


def test_the_second_process_is_refused(place: Path) -> None:
    with lock_owner(place, *LOCKS) as owner:
        for (_, output, _), line in zip(VERBS, refusals(place), strict=True):
            found = f"error: {output}: another process writes it: `first`, process {owner.pid} on"
            assert line.startswith(found) and "remove" not in line, line
        owner.kill()  # SIGKILL: the lock files stay
        owner.wait()
    assert all((place / lock).exists() for lock in LOCKS)
    (told,) = run_commands([["domino", "report", "run"]], place)
    assert told == (0, "run/report.html\n", "drawing run/report.html\n")
    assert not (place / "run" / ".report.html.lock").exists()


def test_the_lock_of_another_host_refuses_and_is_named(place: Path) -> None:
    owner = Owner("node7", 4711, "2026-12-01T10:00:00+01:00", "domino train")
    for lock in LOCKS:
        (place / lock).parent.mkdir(exist_ok=True)
        (place / lock).write_text(json.dumps(vars(owner)))
    for (_, output, lock), line in zip(VERBS, refusals(place), strict=True):
        found = f"error: {output}: another process writes it: `domino train`, process 4711 on node7"
        assert line.startswith(found) and "; if that process is gone, remove " in line
        named = Path(line.removesuffix("\n").rpartition("remove ")[2])
        assert os.path.samefile(place / named, place / lock)


def test_a_rank_is_refused(place: Path) -> None:
    ranks = "import os; os.environ['SLURM_STEP_NUM_TASKS'] = '2'\n"
    for (verb, *_), line in zip(VERBS, refusals(place, ranks), strict=True):
        found = "error: SLURM_STEP_NUM_TASKS='2': 2 processes were launched; "
        assert line.startswith(f"{found}`domino {verb.split()[0]}` runs in one; start it once")


# Commands that race with themselves, their output, and the files that are compared.
RACES = (
    ("train config.yaml run_dir=new", "new", "new/metrics.jsonl"),
    ("capture config.yaml states", "states", "states/*"),
    (
        "regenerate prompts.jsonl answers.jsonl --target target --max-new-tokens 8",
        "answers.jsonl",
        "answers.jsonl*",
    ),
    ("prompts own.jsonl --target target --count 8 --batch-size 8", "own.jsonl", "own.jsonl*"),
    ("export run draft", "draft", "draft/*"),
    (
        "evaluate run prompts.jsonl --append --max-new-tokens 8 --timed 0",
        "run/evaluation.json",
        "run/evaluation.json",
    ),
    ("report run --out page.html", "page.html", "page*"),
)


@pytest.mark.slow
@pytest.mark.parametrize("race", RACES, ids=[line.split()[0] for line, *_ in RACES])
def test_of_two_starts_one_is_refused(
    trained: Path, tmp_path: Path, race: tuple[str, str, str]
) -> None:
    line, output, pattern = race
    place = Path(shutil.copytree(trained, tmp_path / "place"))

    def start() -> subprocess.Popen[str]:
        one_device = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
        paths = {"PYTHONPATH": str(TOP), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        return subprocess.Popen(
            [sys.executable, "-m", "domino_jax", *shlex.split(line)],
            cwd=place,
            env={**os.environ, **paths, "XLA_FLAGS": one_device},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(process: subprocess.Popen[str]) -> tuple[int, str]:
        _, errors = process.communicate(timeout=300)
        return process.returncode, errors

    def taken() -> dict[str, object]:
        """What a start wrote, without dates and times; it is removed."""
        found: dict[str, object] = {}
        for path in place.glob(pattern):
            if path.is_file():
                found[path.name] = path.read_bytes()
            if path.suffix == ".json" and path.parent.name == "run":
                found[path.name] = json.loads(path.read_text())["sets"]["prompts"]["ways"]
        if (place / output).is_dir():
            shutil.rmtree(place / output)
        else:
            (place / output).unlink()
        return found

    code, errors = end(start())
    assert code == 0, errors
    expected = taken()
    assert expected
    chance = random.Random(line)
    for _ in range(2):
        first = start()
        time.sleep(chance.uniform(0, 0.5))
        ends = [end(process) for process in (start(), first)]
        assert sorted(code for code, _ in ends) == [0, 2], ends
        (refused,) = (errors for code, errors in ends if code == 2)
        assert refused.startswith(f"error: {output}: another process writes it: `domino ")
        assert refused.count("\n") == 1
        assert not list(place.rglob("*.lock"))
        assert taken() == expected
