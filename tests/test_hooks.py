"""A commit is checked by what the build server checks before it tests."""

from pathlib import Path

import yaml

TOP = Path(__file__).parent.parent


def commands_of_the_suite() -> list[str]:
    """The lines of scripts/test that `run` a module, up to the tests."""
    lines = (TOP / "scripts/test").read_text(encoding="utf-8").splitlines()
    words = [line.removeprefix("run ") for line in lines if line.startswith("run ")]
    first_test = next(index for index, line in enumerate(words) if line.startswith("pytest"))
    return words[:first_test]


def test_hooks_run_what_the_suite_runs_before_its_tests() -> None:
    settings = yaml.safe_load((TOP / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (repository,) = settings["repos"]
    assert repository["repo"] == "local"
    found = []
    for hook in repository["hooks"]:
        # Of the whole tree by its own environment: neither a download nor a choice of files.
        assert hook["language"] == "system" and hook["pass_filenames"] is False
        found.append(hook["entry"].removeprefix(".venv/bin/python -m "))
    assert found == commands_of_the_suite() and len(found) == 3
