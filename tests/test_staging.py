"""Directories that appear whole or not at all."""

import errno
from pathlib import Path

import pytest

from domino_jax.files import remove_unfinished, whole_directory, write_error
from domino_jax.strict import InputError


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_whole_directory_appears_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "new" / "deep", tmp_path / "empty"):
        with whole_directory(place) as beside:
            (beside / "file").write_text("text")
            assert not place.exists() or not names(place)
        assert names(place) == ["file"] and names(place.parent) in (["deep"], ["empty", "new"])


def test_whole_directory_leaves_nothing_of_a_failure(tmp_path: Path) -> None:
    place = tmp_path / "draft"
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*draft'$") as caught,
        whole_directory(place) as beside,
    ):
        (beside / "file").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(beside / "file"))
    assert caught.value.errno == errno.ENOSPC and not names(tmp_path)
    # Of something else, which only happened to be read inside, the name stays.
    with pytest.raises(FileNotFoundError, match=r"'.*elsewhere'$"), whole_directory(place):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(KeyError), whole_directory(place):
        raise KeyError
    assert not names(tmp_path)
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "mine").write_text("")
    with (
        pytest.raises(InputError, match="draft: already there and not an empty directory"),
        whole_directory(place),
    ):
        raise AssertionError
    assert names(place) == ["mine"]


def test_remove_unfinished_is_for_a_process_that_ends(tmp_path: Path) -> None:
    # What a body has written is gone; the body, which a real process would not end, cannot
    # publish it.
    with pytest.raises(FileNotFoundError), whole_directory(tmp_path / "draft") as beside:
        (beside / "file").write_text("half")
        remove_unfinished()
        assert not beside.exists()
    assert not names(tmp_path)


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ("write() failed: Disk quota exceeded; writing x; at byte 57344", errno.EDQUOT),
        ("RESOURCE_EXHAUSTED: Error writing local file: [Read-only file system]", errno.EROFS),
        ("something else\nin two lines", errno.EIO),
    ],
)
def test_write_error_reads_what_libraries_say(said: str, number: int) -> None:
    error = write_error(RuntimeError(said), Path("states"))
    assert isinstance(error, OSError) and (error.errno, error.filename) == (number, "states")
    assert "\n" not in (error.strerror or "")
