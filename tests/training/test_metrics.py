"""The log of a run: JSON that any reader takes, times apart, resumed where its checkpoint says."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from strict_json import strictly
from tiny import Heard, quiet

from domino_jax.base.errors import InputError
from domino_jax.base.files import write_checksums
from domino_jax.training.log import LogMark, log_notice, read_metrics
from domino_jax.training.metrics import MetricsLog


def opened(
    directory: Path, at: LogMark | None = None, *, step: int = 0, **options: Any
) -> MetricsLog:
    return MetricsLog(
        directory, at=at, step=step, **{"tensorboard": False, "reporter": quiet()} | options
    )


def test_figures_that_are_not_finite_are_null_and_named(tmp_path: Path) -> None:
    figures = {"loss": math.nan, "grad_norm": math.inf, "accept_len": 1.5, "updates": 0.0}
    with opened(tmp_path, tensorboard=True) as log:
        log.write(2, "train", figures)
    (found,) = strictly(tmp_path / "metrics.jsonl")
    odd = {"loss": None, "grad_norm": None, "not_finite": ["loss", "grad_norm"]}
    assert found == {"step": 2, "split": "train"} | figures | odd


def written(directory: Path) -> LogMark:
    """A log of three steps, and where it stood after the second."""
    with opened(directory) as log:
        for step in (1, 2, 3):
            log.write(step, "train", {"loss": 0.5}, timing={"seconds_per_step": 0.1})
            if step == 2:
                mark = log.mark()
        log.write(3, "heldout", {"loss": 0.25})
    return mark


def test_times_stand_apart_and_both_files_drop_what_is_done_again(tmp_path: Path) -> None:
    with opened(tmp_path, written(tmp_path), step=2) as log:
        log.write(3, "train", {"loss": 0.125}, timing={"seconds_per_step": 0.2})
    losses = {line["step"]: line["loss"] for line in read_metrics(tmp_path)}
    assert losses == {1: 0.5, 2: 0.5, 3: 0.125}
    timing = strictly(tmp_path / "timing.jsonl")
    assert {line["step"]: line["seconds_per_step"] for line in timing} == {1: 0.1, 2: 0.1, 3: 0.2}
    assert {line["split"] for line in timing} == {"train"}


def test_a_mark_goes_on_counting(tmp_path: Path) -> None:
    """After two starts it says of the file what a reader finds."""
    mark = written(tmp_path)
    with opened(tmp_path, mark, step=2) as log:
        assert log.mark() == mark
        log.write(3, "train", {"loss": 0.125})
        again = log.mark()
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert again == LogMark(len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.pitfall(
    "the log of a resumed run differs from that of an undisturbed one",
    seen="training/metrics.py: not compared",
)
@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b'{"step": 1'])
def test_a_log_that_was_changed_is_refused(tmp_path: Path, damage: bytes) -> None:
    mark = written(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(damage + path.read_bytes()[len(damage) + 1 :])
    with pytest.raises(InputError, match=r"metrics\.jsonl: "):
        opened(tmp_path, mark, step=2)


def test_a_log_that_is_gone_begins_anew_and_says_so(tmp_path: Path) -> None:
    mark, said = written(tmp_path), []
    (tmp_path / "metrics.jsonl").unlink()
    # The first start ends before its first record.
    for _ in range(2):
        with opened(tmp_path, mark, step=2, reporter=Heard(lines=said)):
            pass
    with opened(tmp_path, mark, step=2, reporter=Heard(lines=said)) as log:
        log.write(3, "train", {"loss": 0.125})
    assert [line["step"] for line in read_metrics(tmp_path)] == [3] and len(said) == 3


def test_damaged_times_are_left_out(tmp_path: Path) -> None:
    mark = written(tmp_path)
    timing = tmp_path / "timing.jsonl"
    timing.write_bytes(b'\xff\n[]\n{}\n{"step": "1"}\n' + timing.read_bytes() + b'{"step": ')
    with opened(tmp_path, mark, step=2):
        pass
    assert [line.get("step") for line in strictly(timing)] == [None, 1, 2]


def saved_at(run: Path, step: int, mark: LogMark) -> None:
    """A checkpoint of a run, as far as readers of the log look at it."""
    checkpoint = run / "checkpoints" / str(step)
    for item, record in (("draft", {"step": step}), ("run", {"log": vars(mark)})):
        (checkpoint / item).mkdir(parents=True)
        (checkpoint / item / "metadata").write_text(json.dumps(record))
    write_checksums(checkpoint)


def test_a_changed_log_is_reported_by_the_newest_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    mark = written(tmp_path)
    assert log_notice(tmp_path) is None  # without a checkpoint nothing can be compared
    saved_at(tmp_path, 2, mark)
    whole = path.read_bytes()[: mark.bytes]
    path.write_bytes(whole)
    assert log_notice(tmp_path) is None
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        notice = log_notice(tmp_path) or ""
        assert re.fullmatch(
            r"metrics\.jsonl: its first \d+ bytes have sha256 \w+, expected \w+ of checkpoint 2: "
            "the file has changed; restore it",
            notice,
        )
    path.write_bytes(whole[:-1])
    assert "the file has changed" in (log_notice(tmp_path) or "")
    path.write_bytes(whole + b'{"step": 3}\n')
    assert log_notice(tmp_path) == (
        "metrics.jsonl: the lines that follow checkpoint 2 are not verified"
    )
    # A damaged checkpoint says nothing of the log; the one before it does.
    saved_at(tmp_path, 3, LogMark(1, "0" * 64))
    (tmp_path / "checkpoints" / "3" / "run" / "metadata").write_text("{}")
    assert "follow checkpoint 2" in (log_notice(tmp_path) or "")
    # Nor does an older checkpoint under a newer step.
    saved_at(tmp_path, 1, LogMark(1, "0" * 64))
    (tmp_path / "checkpoints" / "1").rename(tmp_path / "checkpoints" / "7")
    assert "follow checkpoint 2" in (log_notice(tmp_path) or "")
    path.unlink()
    assert log_notice(tmp_path) is None


@pytest.mark.parametrize("line", ["{", "[]", '{"split": "train"}', '{"step": "1"}'])
def test_read_metrics_names_a_bad_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: "):
        read_metrics(tmp_path)


def test_read_metrics_takes_logs_of_older_runs(tmp_path: Path) -> None:
    """They may hold NaN, and end where they were cut off."""
    lines = '{"step": 1, "split": "train", "loss": NaN}\n{"step": 2, "spl'
    (tmp_path / "metrics.jsonl").write_text(lines)
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["loss"])
