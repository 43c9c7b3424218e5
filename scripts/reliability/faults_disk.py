"""Full disks: one fills up while nobody looks, and what lies on it must still be whole.

So every verb that writes is run on a small file system of its own, at several sizes.

The harness mounts a tmpfs, which needs the right to do so (root, or `unshare --map-root-user
--mount scripts/reliability/faults disk`); where it has not, the part says so and did not hold.

    size        4 KiB ........ a little less than what the verb writes
    outcome     one `error:` line that names a path on the disk, exit code 2, nothing half-written
    then        the disk is enlarged, the same words resume and end with the bits of an
                undisturbed process
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from faults_damage import STEPS, stopped_place
from faults_kills import VERBS
from faults_place import Case, Place, all_cases, cleared, difference, directory_bits, in_turn, left
from faults_verdict import BAD_INPUT, DONE, completion, crash, refusal

PAGE, FILLER = 4096, "filler"
# The words of each verb and what they leave on the disk.
WORDS: dict[str, tuple[tuple[str, ...], str]] = {
    "train": (("train", "config.yaml", STEPS, "run_dir=disk/run"), "run"),
    "regenerate": (
        ("regenerate", "prompts.jsonl", "disk/answers.jsonl", *VERBS["regenerate"][0][3:]),
        "answers.jsonl",
    ),
    "capture": (("capture", "config.yaml", "disk/states"), "states"),
    "evaluate": (
        ("evaluate", "disk/trained", "prompts.jsonl", *VERBS["evaluate"][0][3:]),
        "trained/evaluation.json",
    ),
    "export": (("export", "run", "disk/draft", "--dtype", "float32"), "draft"),
    "import": (("import", "draft", "disk/imported", "--target", "target"), "imported"),
}


def full_disks(place: Place, count: int) -> Iterator[Case]:
    """Each verb in turn, on disks that hold more and more of what it writes."""
    base = stopped_place(place)
    refused = _mount(base / "probe", PAGE)
    if refused is not None:
        yield Case("disk", "a tmpfs", f"could not run: {refused}")
        return
    _unmount(base / "probe")
    undisturbed, bytes_written = {}, {}
    for verb in list(WORDS)[:count]:
        directory = _with_disk(place, base, verb, 2**27)
        before = shutil.disk_usage(directory / "disk").used
        outcome = place.filling.run(directory, *WORDS[verb][0])
        assert outcome.code == DONE, outcome.log
        undisturbed[verb] = left(directory / "disk", WORDS[verb][1], outcome)
        bytes_written[verb] = (before, shutil.disk_usage(directory / "disk").used)
        _unmount(directory / "disk")

    def case(index: int, verb: str) -> Case:
        return _case(place, base, index, verb, bytes_written[verb], undisturbed[verb])

    yield from all_cases("disk", in_turn(WORDS, count, case), count)


def _case(
    place: Place, base: Path, index: int, verb: str, written: tuple[int, int], undisturbed: object
) -> Case:
    rng = place.random(5, index)
    before, after = written
    # The first case of a verb has no room at all; the others have some of what it needs.
    share = 0.0 if index < len(WORDS) else float(rng.uniform(0, 0.95))
    room = PAGE * int((after - before) * share / PAGE)
    directory = _with_disk(place, base, verb, before + PAGE + room)
    (directory / "disk" / FILLER).write_bytes(bytes(PAGE))  # a tmpfs of no size has no limit
    words, name = WORDS[verb]
    kept = directory_bits(directory / "disk")
    fault, kind = None, "refused"
    outcome = place.processes().run(directory, *words)
    if outcome.code == DONE:
        kind = "fitted"  # older checkpoints make room for newer ones
    else:
        fault = crash(outcome) or refusal(outcome, names="disk", code=BAD_INPUT)
        fault = fault or _half_written(directory / "disk", verb, kept)
    if fault is None:
        enlarged = ["mount", "-o", f"remount,size={2**27}", directory / "disk"]
        subprocess.run(enlarged, check=True)
        outcome = place.processes().run(directory, *words) if kind == "refused" else outcome
        fault = completion(outcome, start="with room again it")
        if fault is None:
            found = difference(undisturbed, left(directory / "disk", name, outcome))
            fault = found and f"with room again it leaves something else: {found}"
    _unmount(directory / "disk")
    needed = f"{verb} with {room} bytes free, {after - before} needed"
    return Case("disk", needed, cleared(directory, fault), kind)


def _half_written(disk: Path, verb: str, kept: dict[str, str]) -> str | None:
    """What a refused verb left that it should not have."""
    found = directory_bits(disk)
    changed = [name for name, digest in kept.items() if found.get(name) != digest]
    if changed:
        return f"{changed[0]} was there before and is not as it was"
    beside = [
        str(path.relative_to(disk))
        for path in disk.rglob("*")
        if re.search(r"^\..*\.[0-9a-f]{8}$|tmp", path.name)
    ]
    if beside:
        return f"{beside[0]} is left behind"
    if verb in ("export", "import", "evaluate"):  # whole or not at all
        new = sorted(path.name for path in disk.iterdir() if path.name not in ("trained", FILLER))
        return f"{new[0]} is left behind" if new else None
    answers = disk / WORDS["regenerate"][1]
    return f"{answers.name} is there though it is not whole" if answers.exists() else None


def _with_disk(place: Place, base: Path, verb: str, size: int) -> Path:
    directory = place.copy(base)
    refused = _mount(directory / "disk", size)
    assert refused is None, refused
    if verb == "evaluate":
        # Room for the run first, then the rest is filled up by the size.
        shutil.copytree(directory / "run", directory / "disk" / "trained")
    return directory


def _mount(path: Path, size: int) -> str | None:
    path.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "faults", str(path)]
    try:
        result = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"mount: {error.strerror}"
    return None if result.returncode == 0 else result.stderr.strip() or "mount failed"


def _unmount(path: Path) -> None:
    subprocess.run(["umount", "--lazy", str(path)], check=True)
