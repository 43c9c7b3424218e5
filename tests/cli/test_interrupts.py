"""Ctrl-C in a real process: one line, exit code 130, never a crash, whatever the verb was doing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import pytest
from doubles import slow_after
from tiny import run_config, write_conversations, write_target

from domino_jax.cli import interrupts
from domino_jax.cli.interrupts import NOT_BEGUN, SAVING
from domino_jax.config.run import load_config
from domino_jax.data.template import chat_template
from domino_jax.draft.backbone import DraftModel
from domino_jax.draft.build import init_variables
from domino_jax.target.fingerprint import target_fingerprint, tokenizer_fingerprint
from domino_jax.target.load import load_target, load_tokenizer
from domino_jax.training.checkpoint import save_draft
from domino_jax.training.prepare import draft_of
from domino_jax.training.records import DraftRecord

TOP = Path(__file__).parent.parent.parent
LINES = {
    "regenerate": (
        "interrupted: answered batches are kept in answers.jsonl.partial; the same command resumes"
    ),
    "prompts": (
        "interrupted: batches of prompts are kept in own.jsonl.partial; the same command resumes"
    ),
    "evaluate": "interrupted: run/evaluation.json was not written; the same command starts over",
    "generate": "interrupted: nothing is kept of the answer; the same command starts over",
    "capture": "interrupted: shards that were written to states stay; the same command resumes",
    "train": "interrupted: the checkpoints in new stay as they are; the same command resumes",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a target, a run of an untrained draft, and prompts."""
    directory = tmp_path_factory.mktemp("place")
    (directory / "target").mkdir()
    write_target(directory / "target")
    settings = directory / "target" / "config.json"
    # Room for answers that take longer than a test does.
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"max_position_embeddings": 2**15})
    )
    target = load_target(directory / "target")
    tokenizer = load_tokenizer(directory / "target")
    config = draft_of(
        load_config(run_config(directory, directory / "target")), target.config, tokenizer
    )
    params = nn.unbox(init_variables(DraftModel(config), jax.random.key(0)))["params"]
    path = directory / "target"
    hashes = target_fingerprint(path), tokenizer_fingerprint(path, tokenizer)
    record = DraftRecord(config, str(path), chat_template(tokenizer, {}), *hashes)
    save_draft(directory / "run", params, record)
    write_conversations(directory / "prompts.jsonl", 30, seed=5, answers=False)
    return directory


def begin(place: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(TOP)}
    # What ends at any moment must not leave half a program for others to read.
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
    # Answers of another test, or of another state of the code, would be taken from the user's.
    environment["XDG_CACHE_HOME"] = str(place / "cache")
    command = [sys.executable, "-m", "domino_jax", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=place, env=environment, text=True, **pipes)


def wait_until_answered(process: subprocess.Popen[str]) -> None:
    """Waits for a handler of SIGTERM: Python has none of its own, and jax is imported later."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        caught = int(
            re.search(r"SigCgt:\s*([0-9a-f]+)", status.read_text())[1],  # type: ignore[index]
            16,
        )
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.005)


# A verb, the line of stderr after which the signal is sent, and the arguments of the verb. After
# "compiling" the signal comes in the middle of a compilation.
MOMENTS = (
    (
        "regenerate",
        "compiling",
        ("prompts.jsonl", "answers.jsonl", "--target", "target", "--max-new-tokens", "4000"),
    ),
    ("evaluate", "compiling", ("run", "prompts.jsonl", "--max-new-tokens", "2000")),
    ("evaluate", "answers 30/", ("run", "prompts.jsonl", "--max-new-tokens", "200")),
    ("generate", "compiling", ("run", "a b c", "--max-new-tokens", "20000")),
    ("capture", "loading", ("config.yaml", "states")),
    ("train", "training: ", ("config.yaml", "run_dir=new", "train.steps=100000")),
    ("prompts", "compiling", ("own.jsonl", "--target", "target", "--count", "100000")),
)


@pytest.mark.parametrize(
    ("verb", "moment", "words"),
    slow_after(2, MOMENTS),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_ctrl_c_ends_with_one_line(
    place: Path, verb: str, moment: str, words: tuple[str, ...]
) -> None:
    process = begin(place, verb, *words)
    assert process.stderr is not None
    for line in process.stderr:
        if moment in line:
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert time.monotonic() - sent < 10
    lines = [line for line in errors.splitlines() if "interrupted" in line]
    assert (
        lines == [LINES[verb]] and lines[0] == errors.splitlines()[-1] and "Traceback" not in errors
    )


def test_ctrl_c_while_the_program_is_imported(place: Path) -> None:
    process = begin(place, "export", "run", "draft")
    wait_until_answered(process)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, f"interrupted: {NOT_BEGUN}\n")
    assert (
        time.monotonic() - sent < interrupts.GRACE_SECONDS
    )  # at once: nothing can be half-written yet
    assert not (place / "draft").exists()


def test_both_signals_twice_quickly_while_the_program_is_imported(place: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        process = begin(place, "evaluate", "run", "prompts.jsonl")
        wait_until_answered(process)
        for _ in range(2):
            process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and errors in (f"interrupted: {NOT_BEGUN}\n", "")


def test_a_closed_pipe_is_no_traceback(place: Path) -> None:
    """`domino ... | head -1`, of either stream."""
    words = f"{sys.executable} -m domino_jax generate run 'a b c' --max-new-tokens 100"
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    for pipe in ("2>errors | true", "2>&1 >/dev/null | true"):
        (place / "errors").write_text("")
        line = f"{words} {pipe}; echo ${{PIPESTATUS[0]}}"
        result = subprocess.run(
            ["bash", "-c", line], cwd=place, capture_output=True, text=True, env=environment
        )
        assert result.stdout.strip() == "141", result
        assert "Traceback" not in (place / "errors").read_text() + result.stderr


def test_a_signal_is_answered_though_nobody_hears_it(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from domino_jax.cli import interrupts\n"
        "with interrupts.answered_signals():\n"
        "    interrupts.stop_requested()\n"
        "    print('ready', flush=True)\n"
        "    while not interrupts.stop_requested(): time.sleep(0.05)\n"
        "    open('saved', 'w').close()\n"
    )
    reader, writer = os.pipe()
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=writer, cwd=tmp_path, env=environment
    )
    os.close(writer)
    os.close(reader)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 130 and (tmp_path / "saved").exists()


def test_what_is_half_written_goes_when_the_process_ends(tmp_path: Path) -> None:
    code = (
        "import time\n"
        "from pathlib import Path\n"
        "from domino_jax.cli import interrupts\n"
        "from domino_jax.base.files import whole_directory\n"
        "with interrupts.answered_signals():\n"
        "    interrupts.keeps('nothing')\n"
        "    with whole_directory(Path('draft')) as beside:\n"
        "        (beside / 'file').write_text('half')\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes)
    assert process.stdout is not None
    process.stdout.readline()
    assert list(tmp_path.iterdir())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "interrupted: nothing\n")
    assert not list(tmp_path.iterdir())


def test_training_saves_its_step(place: Path) -> None:
    process = begin(place, "train", "config.yaml", "run_dir=stopped", "train.steps=100000")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 2/"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    *told, last = errors.splitlines()
    assert process.returncode == 130, errors
    assert [line for line in told if "interrupted" in line] == [SAVING]
    stopped = last.removeprefix("stopped at step ").split()[0]
    assert last == f"stopped at step {stopped} of 100000; the same command resumes there"
    assert (place / "stopped" / "checkpoints" / stopped).is_dir()


def run_body(body: str, signals: int) -> tuple[int, str, float]:
    """Exit code, stderr and seconds of a body under `answered_signals`, after some signals."""
    code = (
        "import time\n"
        "from domino_jax.cli.interrupts import *\n"
        "from domino_jax.cli import interrupts\n"
        f"with interrupts.answered_signals():\n    {body}\n"
    )
    command = [sys.executable, "-c", code]
    path = {**os.environ, "PYTHONPATH": str(TOP)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=path
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    began = time.monotonic()
    said = ""
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        said += process.stderr.readline()
    said += process.communicate(timeout=30)[1]
    return process.returncode, said, time.monotonic() - began


READY = "print('ready', flush=True)"


@pytest.mark.parametrize(
    ("body", "signals", "seconds"),
    [
        # At the next safe point, and not only after the grace.
        (
            f"keeps('all'); {READY}; [(time.sleep(0.1), safe_point()) for _ in range(300)]",
            1,
            (0, 2.5),
        ),
        # Where none comes: the main thread may be deep in a compilation.
        (f"keeps('all'); {READY}; time.sleep(30)", 1, (2.5, 20)),
        (f"keeps('all'); {READY}; time.sleep(30)", 2, (0, 2.5)),
        # The work is done meanwhile, or fails.
        (f"keeps('all'); {READY}; time.sleep(1)", 1, (0, 2.5)),
        (f"keeps('all'); {READY}; time.sleep(1); raise SystemExit(2)", 1, (0, 2.5)),
    ],
)
def test_the_process_ends_in_time(body: str, signals: int, seconds: tuple[float, float]) -> None:
    code, said, took = run_body(body, signals)
    assert (code, said) == (130, "interrupted: all\n")
    assert seconds[0] <= took <= seconds[1]


def test_a_signal_after_the_work_changes_nothing() -> None:
    """The interpreter's teardown takes a moment; what was done is done, exit code 0."""
    slowly = f"import atexit; atexit.register(lambda: ({READY}, time.sleep(1)))"
    assert run_body(f"keeps('all'); {slowly}", 1)[:2] == (0, "")


def test_what_saves_itself_gets_its_time_but_not_twice() -> None:
    code, said, took = run_body(f"stop_requested(); {READY}; time.sleep(4)", 1)
    assert (code, said) == (130, f"{SAVING}\n") and took > 3.5
    code, said, took = run_body(f"stop_requested(); {READY}; time.sleep(30)", 2)
    assert (code, said) == (130, f"{SAVING}\n") and took < 2.5


def test_the_handlers_stand_before_jax_is_imported() -> None:
    code = "import sys, domino_jax.cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
