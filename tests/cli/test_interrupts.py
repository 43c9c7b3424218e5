"""Ctrl-C in a real process: one line, exit code 130, never a crash, whatever the verb was doing."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import pytest
from doubles import slow_after
from tiny import quiet, run_config, write_conversations, write_target

from domino_jax.cli.interrupts import GRACE_SECONDS, NOT_BEGUN, SAVING
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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a target, a run of an untrained draft, and prompts."""
    directory = tmp_path_factory.mktemp("place")
    path = write_target(directory / "target")
    settings = json.loads((path / "config.json").read_text())
    # Room for answers that take longer than a test does.
    settings["max_position_embeddings"] = 2**15
    (path / "config.json").write_text(json.dumps(settings))
    target, tokenizer = load_target(path), load_tokenizer(path)
    settings = load_config(run_config(directory, path))
    config = draft_of(settings, target.config, tokenizer, directory=path, reporter=quiet())
    params = nn.unbox(init_variables(DraftModel(config), jax.random.key(0)))["params"]
    hashes = target_fingerprint(path), tokenizer_fingerprint(path, tokenizer)
    record = DraftRecord(config, str(path), chat_template(tokenizer, {}), *hashes)
    save_draft(directory / "run", params, record)
    write_conversations(directory / "prompts.jsonl", 30, seed=5, answers=False)
    return directory


def environment(**words: str) -> dict[str, str]:
    one_device = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    return {**os.environ, "PYTHONPATH": str(TOP), "XLA_FLAGS": one_device, **words}


def python(*words: str, **options: Any) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *words], **{"env": environment(), **pipes, **options})


def begin(place: Path, line: str, **changed: str) -> subprocess.Popen[str]:
    """A command in `place`, which is about to be interrupted."""
    # What ends at any moment must not leave half a program for others to read; and answers of
    # another test, or of another state of the code, would be taken from the user's.
    changed |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
    changed |= {"XDG_CACHE_HOME": str(place / "cache")}
    return python("-m", "domino_jax", *shlex.split(line), cwd=place, env=environment(**changed))


def read_until(process: subprocess.Popen[str], words: str) -> None:
    """Reads stderr up to the line that has these words."""
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return


def wait_until_answered(process: subprocess.Popen[str]) -> None:
    """Waits for a handler of SIGTERM: Python has none of its own, and jax is imported later."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        (caught,) = re.findall(r"SigCgt:\s*([0-9a-f]+)", status.read_text())
        if int(caught, 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.005)


# A command, the words of stderr after which the signal is sent, and what is kept. After "compiling"
# the signal comes in the middle of a compilation.
MOMENTS = (
    (
        "evaluate run prompts.jsonl --max-new-tokens 20 --limit 4",
        "compiling",
        "run/evaluation.json was not written; the same command starts over",
    ),
    (
        "regenerate prompts.jsonl answers.jsonl --target target --max-new-tokens 4000",
        "compiling",
        "answered batches are kept in answers.jsonl.partial; the same command resumes",
    ),
    (
        "evaluate run prompts.jsonl --max-new-tokens 200",
        "answers 30/",
        "run/evaluation.json was not written; the same command starts over",
    ),
    (
        "generate run 'a b c' --max-new-tokens 20000",
        "compiling",
        "nothing is kept of the answer; the same command starts over",
    ),
    (
        "capture config.yaml states",
        "loading",
        "shards that were written to states stay; the same command resumes",
    ),
    (
        "train config.yaml run_dir=new train.steps=100000",
        "training: ",
        "the checkpoints in new stay as they are; the same command resumes",
    ),
    (
        "prompts own.jsonl --target target --count 100000",
        "compiling",
        "batches of prompts are kept in own.jsonl.partial; the same command resumes",
    ),
)


@pytest.mark.parametrize(("line", "moment", "kept"), slow_after(1, MOMENTS))
def test_ctrl_c_ends_with_one_line(place: Path, line: str, moment: str, kept: str) -> None:
    process = begin(place, line, XLA_FLAGS="")  # compiles longer
    read_until(process, moment)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert time.monotonic() - sent < 10
    said = [line for line in errors.splitlines() if "interrupted" in line]
    assert said == [f"interrupted: {kept}"] and said[0] == errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_ctrl_c_while_the_program_is_imported(place: Path) -> None:
    process = begin(place, "export run draft")
    wait_until_answered(process)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, f"interrupted: {NOT_BEGUN}\n")
    # At once: nothing can be half-written yet.
    assert time.monotonic() - sent < GRACE_SECONDS and not (place / "draft").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_twice_quickly_while_the_program_is_imported(place: Path, number: int) -> None:
    process = begin(place, "evaluate run prompts.jsonl")
    wait_until_answered(process)
    for _ in range(2):
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors in (f"interrupted: {NOT_BEGUN}\n", "")


def test_a_closed_pipe_is_no_traceback(place: Path) -> None:
    """`domino ... | head -1`, of either stream; a missing torch is no line on the other one."""
    code = "import sys; sys.modules['torch'] = None; from domino_jax.cli import main; main()"
    words = f'{sys.executable} -c "{code}" generate run "a b c" --max-new-tokens 100'
    processes = []
    for pipe in ("2>errors | true", "2>&1 >/dev/null | true"):
        line = f"{words} {pipe}; echo ${{PIPESTATUS[0]}}"
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        bash = ["bash", "-c", line]
        processes.append(subprocess.Popen(bash, cwd=place, env=environment(), **pipes))
    told = [process.communicate(timeout=120) for process in processes]
    assert [(out.strip(), errors) for out, errors in told] == [("141", "")] * 2
    assert (place / "errors").read_text().splitlines() == [
        "loading the draft of run",
        "step 0 of run, computed in float32, as it was trained",
        f"loading the target {place / 'target'}, float32",
        "compiling",
    ]


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
    process = python("-c", code, stderr=writer, cwd=tmp_path)
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
        "from domino_jax.base.lock import lock_inside\n"
        "with interrupts.answered_signals():\n"
        "    interrupts.keeps('nothing', at_once=True)\n"
        "    lock = lock_inside(Path('a/run'), command='domino train')\n"
        "    with lock, whole_directory(Path('draft')) as beside:\n"
        "        (beside / 'file').write_text('half')\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
    )
    process = python("-c", code, cwd=tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    assert list(tmp_path.iterdir())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "interrupted: nothing\n")
    assert not list(tmp_path.iterdir())


def test_training_saves_its_step(place: Path) -> None:
    process = begin(place, "train config.yaml run_dir=stopped train.steps=100000")
    read_until(process, "step 2/")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    *told, last = errors.splitlines()
    assert process.returncode == 130, errors
    assert [line for line in told if "interrupted" in line] == [SAVING]
    stopped = last.removeprefix("stopped at step ").split()[0]
    assert last == f"stopped at step {stopped} of 100000; the same command resumes there"
    assert (place / "stopped" / "checkpoints" / stopped).is_dir()


READY = "print('ready', flush=True)"
SLOWLY = f"import atexit; atexit.register(lambda: ({READY}, time.sleep(1)))"
ALL = "interrupted: all\n"
# A body, signals, and how its process ends: exit code, stderr, seconds from and to.
ENDS = (
    # At the next safe point, and not only after the grace.
    (
        f"keeps('all'); {READY}; [(time.sleep(0.1), safe_point()) for _ in range(300)]",
        (1, 130, ALL, 0, 2.5),
    ),
    # Where none comes: the main thread may be deep in a compilation.
    (f"keeps('all'); {READY}; time.sleep(30)", (1, 130, ALL, 2.5, 20)),
    (f"keeps('all'); {READY}; time.sleep(30)", (2, 130, ALL, 0, 2.5)),
    # The work is done meanwhile, or fails.
    (f"keeps('all'); {READY}; time.sleep(1)", (1, 130, ALL, 0, 2.5)),
    (f"keeps('all'); {READY}; time.sleep(1); raise SystemExit(2)", (1, 130, ALL, 0, 2.5)),
    # The interpreter's teardown takes a moment: what was done is done.
    (f"keeps('all'); {SLOWLY}", (1, 0, "", 0, math.inf)),
    # What saves itself gets its time, but not twice.
    (f"stop_requested(); {READY}; time.sleep(4)", (1, 130, f"{SAVING}\n", 3.5, math.inf)),
    (f"stop_requested(); {READY}; time.sleep(30)", (2, 130, f"{SAVING}\n", 0, 2.5)),
)


def test_the_process_ends_in_time() -> None:
    def ended(end: tuple[str, Sequence[Any]]) -> tuple[int, str, float]:
        body, (signals, *_) = end
        code = (
            "import time\n"
            "from domino_jax.cli.interrupts import *\n"
            f"with answered_signals():\n    {body}\n"
        )
        process = python("-c", code)
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        began = time.monotonic()
        said = ""
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
            said += process.stderr.readline()
        said += process.communicate(timeout=30)[1]
        return process.returncode, said, time.monotonic() - began

    with ThreadPoolExecutor(len(ENDS)) as threads:
        found = list(threads.map(ended, ENDS))
    for (body, (_, code, said, soonest, latest)), (*ending, took) in zip(ENDS, found, strict=True):
        assert ending == [code, said] and soonest <= took <= latest, (body, ending, took)
