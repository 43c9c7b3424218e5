"""What each command imports, and which packages steps, decoding and the command do without.

A machine with the accelerator's own packages often lacks what feeds a long run (grain,
array-record), makes a target from a file (gguf, platformdirs) or draws (matplotlib), so these are
imported where they are used. What needs no array (`--version`, help, `config`, an argument error)
imports no jax, which takes seconds.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_target

from domino_jax import __version__
from domino_jax.cli.verbs import cli

PROGRAM = """
import sys

for name in ("grain", "array_record", "gguf", "platformdirs", "matplotlib"):
    sys.modules[name] = None  # importing it fails now

import dataclasses
import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny

import domino_jax
from domino_jax.cli import main
from domino_jax.config.heads import DominoHeadConfig
from domino_jax.config.model import DecoderShape, DraftConfig
from domino_jax.data.template import chat_template
from domino_jax.draft.backbone import DraftModel
from domino_jax.draft.build import init_variables
from domino_jax.target.fingerprint import target_fingerprint, tokenizer_fingerprint
from domino_jax.target.load import load_target, load_tokenizer
from domino_jax.target.decoder import Target
from domino_jax.training.checkpoint import load_draft, save_draft
from domino_jax.training.records import DraftRecord
from domino_jax.training.step import Batch, Program, initial_state, train_step

directory, run = map(Path, sys.argv[1:])
config = DraftConfig(
    **{field.name: getattr(tiny.CONFIG, field.name) for field in dataclasses.fields(DecoderShape)}
    | {"num_hidden_layers": 1, "num_target_layers": 4, "target_layer_ids": (0, 2), "block_size": 4}
    | {"mask_token_id": tiny.MASK_TOKEN_ID, "shift_label": True},
    head=DominoHeadConfig(emb_dim=8, gru_hidden_dim=8),
)
params = nn.meta.unbox(init_variables(DraftModel(config), jax.random.key(0)))["params"]
target = load_target(directory)
program = Program(
    trainer=domino_jax.build_trainer(config, num_anchors=4),
    target=Target(target.config, capture=config.target_layer_ids, scan_layers=True),
    optimizer=optax.sgd(0.1),
    curriculum=domino_jax.lambda_base_schedule(10),
)
ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 2, 16), dtype=np.int32)
state, sums = jax.jit(functools.partial(train_step, program))(
    initial_state(program, params),
    tiny.stack_layers(target.params),
    Batch(jnp.asarray(ids), jnp.ones(ids.shape, bool)),
)
assert int(state.step) == 1 and np.isfinite(sums["loss_sum"]), sums

tokenizer = load_tokenizer(directory)
template = chat_template(tokenizer, {})
hashes = target_fingerprint(directory), tokenizer_fingerprint(directory, tokenizer)
save_draft(run, state.params, DraftRecord(config, str(directory), template, *hashes))
assert load_draft(run).step == 0
for words in (["--help"], ["generate", str(run), "a b c", "--max-new-tokens", "8"]):
    sys.argv = ["domino", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
"""

# Runs commands without jax, numpy or what imports them; writes each exit code, stdout and stderr.
WITHOUT_JAX = """
import contextlib, io, json, sys

HEAVY = ("jax", "flax", "transformers", "orbax", "matplotlib")
for name in HEAVY:
    sys.modules[name] = None  # importing it fails now
from domino_jax.cli import command
from domino_jax.cli.shared import logs

told = []
for sys.argv in json.load(sys.stdin):
    out, errors = io.StringIO(), io.StringIO()
    logs.file = errors
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            command()
        except SystemExit as stop:
            told.append((stop.code, out.getvalue(), errors.getvalue()))
assert "numpy" not in sys.modules
json.dump(told, sys.stdout)
"""


def test_steps_decoding_and_the_command_need_no_data_packages(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(target), str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Usage: domino" in result.stdout
    assert "8 tokens, tau" in result.stderr


def run_without_jax(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command, in one process without jax."""
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_JAX],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        input=json.dumps([["domino", *words] for words in commands]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [tuple(told) for told in json.loads(result.stdout)]


def test_version_help_and_config_import_no_jax() -> None:
    help_of_verbs = [[verb, "--help"] for verb in cli.commands]
    commands = [["--version"], ["--help"], [], ["config", "--list"], *help_of_verbs]
    told = run_without_jax(commands)
    assert [(code, errors) for code, _, errors in told] == [(0, "")] * len(commands)
    version, page, no_verb, keys, *pages = (out for _, out, _ in told)
    assert version == f"domino {__version__}\n"
    assert page == no_verb
    listed = page.partition("Commands:\n")[2]
    for verb, text in zip(cli.commands, pages, strict=True):
        assert text.startswith(f"Usage: domino {verb} ")
        line = re.search(rf"^  {verb} +(\w.+)$", listed, flags=re.MULTILINE)
        assert line and line[1].removesuffix("...") in " ".join(text.split())
    assert "train.steps" in keys


ARGUMENT_ERRORS = (
    (["tarin"], "No such command 'tarin'. Did you mean 'train'?"),
    (["train"], "Missing argument 'CONFIG'."),
    (["train", "nope.yaml"], "nope.yaml: "),
    (["train", "nope.yaml", "--wrong"], "No such option '--wrong'."),
    (["capture", "nope.yaml", "train.steps=3"], "which looks like an override"),
    (["config", "train.step"], "did you mean 'train.steps'?"),
    (["evaluate", "run", "p.jsonl", "--replay", "--temperature", "1"], "--replay follows greedy"),
    (["export", "run", "draft", "--for", "nope"], "Invalid value for '--for'"),
    (["generate", "run", "a", "--plain", "--color"], "--plain drafts nothing"),
    (["generate", "nope", "a"], "nope: not a run directory"),
    (["plan", "nope.yaml"], "Missing option '--on'."),
    (["prompts", "out.jsonl", "--count", "1"], "smollm2-135m-instruct"),
    (["regenerate", "a", "b", "--target", "t", "--top-k", "3"], "nothing is drawn at temperature"),
    (["report", "run", "--out", "page.pdf"], "ends in .html"),
    (["target", "model.gguf"], "give the directory to convert into"),
)


def test_argument_errors_import_no_jax() -> None:
    told = run_without_jax([words for words, _ in ARGUMENT_ERRORS])
    for (words, expected), (code, out, errors) in zip(ARGUMENT_ERRORS, told, strict=True):
        assert (code, out) == (2, ""), words
        assert expected in errors and errors.startswith("error: ") and errors.count("\n") == 1


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["config", "--list"]])
def test_a_light_command_leaves_jax_unimported(words: list[str]) -> None:
    code = (
        "import sys\n"
        "from domino_jax.cli import command\n"
        f"sys.argv = ['domino', *{words}]\n"
        "try:\n    command()\n"
        "finally:\n    print({'jax', 'numpy'} & set(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n"


@pytest.mark.parametrize("before", ["", "import jax; "], ids=["imported later", "already imported"])
def test_float32_is_multiplied_in_full_under_the_command(before: str) -> None:
    code = (
        f"{before}import contextlib, sys\n"
        "from domino_jax.cli import command\n"
        "sys.argv = ['domino', '--version']\n"
        "with contextlib.suppress(SystemExit):\n    command()\n"
        "import jax\n"
        "print(jax.config.jax_default_matmul_precision)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "highest"
