"""Mutation check: one fault at a time in a copy of the package, whose tests should notice it.

    .venv/bin/python scripts/reliability/mutations.py --only "end of turn left out of the loss"

Half an hour for all faults of mutations.yaml on two cores. Prints caught, survived or timeout for
each, and writes them as JSON where --out names a file.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

REPO = Path(__file__).resolve().parents[2]
FAULTS = Path(__file__).with_suffix(".yaml")
TIMEOUT = 400  # seconds, for the tests of one fault
OUTCOMES = {0: "survived", 1: "caught", 2: "caught", -signal.SIGKILL: "timeout"}  # 2: no import


def environment(copy: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",  # else that of a file of the same size and second is taken
        "JAX_COMPILATION_CACHE_DIR": str(copy.parent / "programs"),  # of all runs
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": str(copy.parent / "cache"),  # not the user's, where faulty code writes
    }


def run_tests(python: Path, copy: Path, tests: list[str], timeout: float | None) -> dict:
    """Outcome, seconds and the failed test; the output is in tests.log beside the copy."""
    words = [python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    began = time.monotonic()
    with (copy.parent / "tests.log").open("w") as log:
        process = subprocess.Popen(
            words, cwd=copy, env=environment(copy), stdout=log, stderr=log, start_new_session=True
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what the tests started
    outcome = OUTCOMES.get(process.wait(), f"error {process.returncode}")
    by = re.findall(r"^(?:FAILED|ERROR) (tests/\S+)", Path(log.name).read_text(), re.MULTILINE)
    return {"outcome": outcome, "seconds": round(time.monotonic() - began, 1), "by": by}


def check(python: Path, copy: Path, faults: list[dict]) -> Iterator[dict]:
    """The outcome of each fault, after the tests have passed without any."""
    for fault in faults:
        if (count := (copy / fault["file"]).read_text().count(fault["old"])) != 1:
            raise SystemExit(f"{fault['name']}: `old` is {count} times in {fault['file']}")
    words = [python, "-c", "import domino_jax; print(domino_jax.__file__, end='')"]
    found = subprocess.check_output(words, cwd="/", env=environment(copy), text=True)
    if not Path(found).is_relative_to(copy):
        raise SystemExit(f"imported {found}, the editable installation, not the copy in {copy}")
    every = list(dict.fromkeys(test for fault in faults for test in fault["tests"]))
    if (sound := run_tests(python, copy, every, None))["outcome"] != "survived":
        raise SystemExit("without a fault:\n" + (copy.parent / "tests.log").read_text()[-3000:])
    print(f"without a fault all chosen tests pass, {sound['seconds']} s", flush=True)
    for fault in faults:
        whole = (place := copy / fault["file"]).read_text()
        place.write_text(whole.replace(fault["old"], fault["new"]))
        result = run_tests(python, copy, fault["tests"], TIMEOUT)
        place.write_text(whole)
        print(f"{result['outcome']:9}{result['seconds']:7.1f} s  {fault['name']}", flush=True)
        yield {"name": fault["name"]} | result


def copied(scratch: str) -> Path:
    """A copy of the files that git tracks."""
    copy = Path(scratch) / "copy"
    for name in subprocess.check_output(["git", "ls-files"], cwd=REPO, text=True).splitlines():
        if (REPO / name).is_file():  # else it is tracked and deleted
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, copy / name)
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults of these names")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    options = parser.parse_args()
    faults = yaml.safe_load(FAULTS.read_text())
    faults = [fault for fault in faults if not options.only or fault["name"] in options.only]
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        results = list(check(REPO / ".venv/bin/python", copied(scratch), faults))
    print(f"{sum(one['outcome'] == 'caught' for one in results)} of {len(results)} faults caught")
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
