"""Locks: one owner at a time, named to all others, whatever becomes of it."""

import errno
import json
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import filelock
import pytest
from directories import leftovers
from lock_owner import lock_owner

from domino_jax.base import lock
from domino_jax.base.errors import InputError
from domino_jax.base.lock import LOCK, Owner, lock_beside, lock_inside, release_all


def run_lock(directory: Path) -> AbstractContextManager[None]:
    return lock_inside(directory, command="domino train")


def record(file: Path, **changed: object) -> Path:
    """A lock file that an ended process of this host left, or another host's."""
    owner = Owner(os.uname().nodename, 4711, "2026-12-01T10:00:00+01:00", "domino train")
    file.write_text(json.dumps(vars(owner) | changed))
    return file


def refusal(taken: AbstractContextManager[None]) -> str:
    with pytest.raises(InputError) as caught, taken:
        pass
    return str(caught.value)


def test_a_lock_names_its_owner_and_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    with run_lock(run):
        assert leftovers(tmp_path) == ["runs", "runs/first", f"runs/first/{LOCK}"]
        found = json.loads((run / LOCK).read_text())
    assert (found["host"], found["pid"]) == (os.uname().nodename, os.getpid())
    assert found["command"] == "domino train" and re.match(r"20\d\d-\d\d-\d\dT", found["started"])
    assert not leftovers(tmp_path)
    with pytest.raises(KeyError), run_lock(run):
        (run / "config.yaml").touch()
        raise KeyError
    assert leftovers(tmp_path / "runs") == ["first", "first/config.yaml"]
    with lock_beside(tmp_path / "a.jsonl", command="domino prompts"):
        assert (tmp_path / ".a.jsonl.lock").is_file()
    assert leftovers(tmp_path) == ["runs", "runs/first", "runs/first/config.yaml"]


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    with lock_owner(tmp_path, f"run/{LOCK}") as owner:
        found = refusal(run_lock(tmp_path / "run"))
        assert re.fullmatch(
            rf"{tmp_path}/run: another process writes it: `first`, process {owner.pid} on "
            rf"{os.uname().nodename}, since 20[-\dT:+]+; wait until it ends, or stop it",
            found,
        )
        assert leftovers(tmp_path) == ["run", f"run/{LOCK}"]
        owner.kill()  # SIGKILL
        owner.wait()
        assert (tmp_path / "run" / LOCK).is_file()
        with run_lock(tmp_path / "run"):
            assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert leftovers(tmp_path) == ["run"]


def test_two_names_of_one_place_share_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "name").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    with lock_beside(Path("draft"), command="domino export"):
        for name in (tmp_path / "name" / "draft", Path("../real/./draft")):
            assert "domino export" in refusal(lock_beside(name, command="domino import"))
    # ".." leaves the directory that a link leads to, not the link's own.
    (tmp_path / "real" / "inner").mkdir()
    (tmp_path / "into").symlink_to(tmp_path / "real" / "inner")
    with lock_beside(tmp_path / "into" / ".." / "draft", command="domino export"):
        assert "domino export" in refusal(lock_beside(Path("draft"), command="domino import"))
    (tmp_path / "real" / "inner").rmdir()
    (tmp_path / "into").unlink()
    with run_lock(tmp_path / "real"):
        assert "domino train" in refusal(run_lock(tmp_path / "name"))
    with lock_beside(Path(), command="domino export"):
        assert leftovers(tmp_path) == [".real.lock", "name", "real"]
    # `..` of a link is the parent of the directory that it leads to.
    (tmp_path / "real" / "inner").mkdir()
    (tmp_path / "link").symlink_to("real/inner")
    with lock_beside(tmp_path / "link" / ".." / "draft", command="domino export"):
        assert (tmp_path / "real" / ".draft.lock").is_file()


def test_the_lock_of_another_host_is_for_a_person_to_remove(tmp_path: Path) -> None:
    file = record(tmp_path / LOCK, host="node7")
    before = file.read_bytes()
    assert refusal(run_lock(tmp_path)) == (
        f"{tmp_path}: another process writes it: `domino train`, process 4711 on node7, since "
        "2026-12-01T10:00:00+01:00; wait until it ends, or stop it; if that process is gone, "
        f"remove {file}"
    )
    assert file.read_bytes() == before
    file.unlink()
    with run_lock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["{", "[]", "7", '{"host": 3}', "\x1b[2J" * 2000, "\xff", " "])
def test_a_damaged_record_is_no_owner_that_may_be_ignored(tmp_path: Path, text: str) -> None:
    file = tmp_path / LOCK
    file.write_bytes(text.encode("latin-1"))
    said = refusal(run_lock(tmp_path))
    assert f"and {file} does not name it; wait" in said and said.endswith(f"remove {file}")
    assert said.isprintable() and file.read_bytes() == text.encode("latin-1")


def test_an_empty_lock_file_is_that_of_a_process_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "RECORD_SECONDS", 0.1)
    (tmp_path / LOCK).touch()
    with run_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


class _AnotherUser:
    """`os.open` and `os.unlink` as they answer a user who does not own the lock files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, reads: bool, removes: bool) -> None:
        opened, unlinked = os.open, os.unlink

        def open_(file: Path, flags: int, mode: int = 0o777) -> int:
            if Path(file).exists() and (flags & os.O_RDWR or not reads):
                if flags & os.O_EXCL:
                    raise FileExistsError(errno.EEXIST, "File exists", str(file))
                raise PermissionError(errno.EACCES, "Permission denied", str(file))
            return opened(file, flags, mode)

        def unlink(file: Path) -> None:
            if not removes:
                raise PermissionError(errno.EPERM, "Operation not permitted", str(file))
            unlinked(file)

        monkeypatch.setattr(os, "open", open_)
        monkeypatch.setattr(os, "unlink", unlink)


def test_the_lock_of_another_user_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lock_owner(tmp_path, LOCK), monkeypatch.context() as patched:
        _AnotherUser(patched, reads=True, removes=True)
        assert "`first`, process " in refusal(run_lock(tmp_path))
    with monkeypatch.context() as patched:
        _AnotherUser(patched, reads=True, removes=True)
        with run_lock(tmp_path):  # of a process that was killed
            pass
    record(tmp_path / LOCK)
    for reads in (True, False):
        with monkeypatch.context() as patched:
            _AnotherUser(patched, reads=reads, removes=False)
            assert refusal(run_lock(tmp_path)) == (
                f"{tmp_path}: this user may not read or remove the lock file {tmp_path / LOCK}; "
                "if its process is gone, let its owner remove it"
            )


def test_what_is_no_lock_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("bytes")
    makes: tuple[Callable[[Path], object], ...] = (
        lambda file: file.symlink_to("precious"),
        lambda file: file.symlink_to("nowhere"),
        os.mkfifo,
        os.mkdir,
    )
    for index, make in enumerate(makes):
        file = tmp_path / f".{index}{LOCK}"
        make(file)
        said = refusal(lock_beside(tmp_path / str(index), command="domino prompts"))
        assert said == f"{file}: not a regular file, expected a lock file; remove it"
    assert (tmp_path / "precious").read_text() == "bytes"
    assert not (tmp_path / "nowhere").exists()


def test_an_output_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "draft"
    with pytest.raises(NotADirectoryError) as taken:
        lock_beside(below, command="domino export").__enter__()
    assert taken.value.filename == str(below)
    with pytest.raises(InputError) as address:
        lock_beside("gs://bucket/run", command="domino export")
    assert str(address.value) == (
        "gs://bucket/run: an address; expected a directory of this machine"
    )
    assert leftovers(tmp_path) == ["file"]


def test_missing_parents_are_made_for_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "own.jsonl"
    with lock_beside(path, command="domino prompts"):
        path.write_text("a prompt")
    assert leftovers(tmp_path) == ["a", "a/b", "a/b/own.jsonl"]
    with lock_beside(tmp_path / "c" / "own.jsonl", command="domino prompts"):
        assert (tmp_path / "c").is_dir()
    assert not (tmp_path / "c").exists()


def test_a_full_disk_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched, pytest.raises(OSError) as caught:
        patched.setattr(os, "pwrite", full)
        run_lock(tmp_path / "new" / "run").__enter__()
    assert caught.value.filename == str(tmp_path / "new" / "run")
    assert not leftovers(tmp_path)
    with run_lock(tmp_path / "new"):
        pass


def test_without_system_locks_the_file_itself_is_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> bool:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(filelock, "lock_descriptor", missing)
    with run_lock(tmp_path):
        said = refusal(run_lock(tmp_path))
        assert f"process {os.getpid()} on" in said and said.endswith(f"remove {tmp_path / LOCK}")
    with run_lock(tmp_path):
        pass


def test_a_lock_is_never_shared(tmp_path: Path) -> None:
    """Against the race of an owner that removes its file while another process opens it."""
    inside: list[int] = []
    taken: list[int] = []
    wrong: list[object] = []

    end = time.monotonic() + 60

    def work(number: int) -> None:
        while len(taken) < 60 and time.monotonic() < end:
            try:
                with run_lock(tmp_path / "run"):
                    inside.append(number)
                    wrong.extend(inside[:-1])
                    taken.append(number)
                    inside.remove(number)
            except InputError:
                pass
            except OSError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(taken) >= 60
    # A directory that one thread made and the next one used may stay, empty.
    assert leftovers(tmp_path) in ([], ["run"])


def test_a_lock_file_that_its_owner_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path / LOCK)
    flock = lock._flock
    with ExitStack() as third:

        def late(descriptor: int) -> bool | None:
            """The owner ends and a third process begins, after the file was opened."""
            monkeypatch.setattr(lock, "_flock", flock)
            (tmp_path / LOCK).unlink()
            third.enter_context(run_lock(tmp_path))
            return flock(descriptor)

        monkeypatch.setattr(lock, "_flock", late)
        assert f"process {os.getpid()} on" in refusal(run_lock(tmp_path))


def test_a_lock_file_that_somebody_replaced_stays(tmp_path: Path) -> None:
    with ExitStack() as locks:
        locks.enter_context(run_lock(tmp_path))
        (tmp_path / LOCK).unlink()
        other = record(tmp_path / LOCK, host="node7").read_bytes()
    assert (tmp_path / LOCK).read_bytes() == other


def test_release_all_is_for_a_process_that_ends(tmp_path: Path) -> None:
    with run_lock(tmp_path / "run"), lock_beside(tmp_path / "a", command="domino prompts"):
        release_all()
        assert not leftovers(tmp_path)
        # From now on another process may have them; the first owner's end leaves them alone.
        record(tmp_path / ".a.lock", host="node7")
    assert leftovers(tmp_path) == [".a.lock"]


def test_a_waiting_process_reports_the_owner_once(tmp_path: Path) -> None:
    path, said = tmp_path / "targets" / "toy", []
    done = threading.Event()

    def second() -> None:
        with lock_beside(path, command="fetch toy", waits=said.append):
            done.set()

    with lock_beside(path, command="fetch toy"):
        thread = threading.Thread(target=second)
        thread.start()
        assert not done.wait(0.5)
    assert done.wait(10)
    thread.join()
    (line,) = said
    assert line.startswith(f"{path}: another process writes it: `fetch toy`, process {os.getpid()}")
    assert line.endswith("; waiting until it ends") and not leftovers(tmp_path)
