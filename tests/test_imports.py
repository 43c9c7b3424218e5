"""What each command imports, and which packages steps, decoding and the command do without.

A machine with the accelerator's own packages often lacks what feeds a long run (grain,
array-record), makes a target from a file (gguf, platformdirs) or draws (matplotlib), so these are
imported where they are used. What needs no array (`--version`, help, `config`, an argument error)
imports no jax, which takes seconds.
"""

import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml
from commands import TOP, run_commands
from tiny import write_target
from trees import SMALLEST

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
hashes = target_fingerprint(directory), tokenizer_fingerprint(directory, tokenizer)
template = chat_template(tokenizer, {})
save_draft(run, state.params, DraftRecord(config, str(directory), template, *hashes))
assert load_draft(run).step == 0
for words in (["--help"], ["generate", str(run), "a b c", "--max-new-tokens", "8"]):
    sys.argv = ["domino", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
"""

WITHOUT_JAX = """
import sys
for name in ("jax", "flax", "transformers", "orbax", "matplotlib"):
    sys.modules[name] = None  # importing it fails now
"""
NO_NUMPY = "assert 'numpy' not in sys.modules"


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


def run_without_jax(commands: list[list[str]], directory: Path) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command, in one process without jax and numpy."""
    words = [["domino", *words] for words in commands]
    return run_commands(words, directory, before=WITHOUT_JAX, after=NO_NUMPY)


def test_version_help_and_config_import_no_jax(tmp_path: Path) -> None:
    help_of_verbs = [[verb, "--help"] for verb in cli.commands]
    commands = [["--version"], ["--help"], [], ["config", "--list"], *help_of_verbs]
    told = run_without_jax(commands, tmp_path)
    assert [(code, errors) for code, _, errors in told] == [(0, "")] * len(commands)
    version, page, no_verb, keys, *pages = (out for _, out, _ in told)
    assert version == f"domino {__version__}\n"
    assert page == no_verb
    described, _, listed = page.partition("Commands:\n")
    for verb, text in zip(cli.commands, pages, strict=True):
        assert text.startswith(f"Usage: domino {verb} ")
        line = re.search(rf"^  {verb} +(\w.+)$", listed, flags=re.MULTILINE)
        assert line and line[1].removesuffix("...") in " ".join(text.split())
    assert "train.steps" in keys
    codes = {0: "done", 1: "plan: ", 2: "bad input", 3: "train: ", 130: "interrupted", 141: ""}
    for code, words in codes.items():
        assert re.search(rf"^ +{code} +{words}", described, re.MULTILINE), code


@pytest.mark.parametrize("line", ["--version", "config --list"])
def test_a_light_command_takes_a_moment(line: str) -> None:
    command = [sys.executable, "-m", "domino_jax", *line.split()]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(TOP)}, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert taken < 0.4  # seconds of a processor, of which a third is Python's own


# Commands and what their message holds; `run`, `config.yaml` and `empty.yaml` are there.
ARGUMENT_ERRORS = """
tarin                                     No such command 'tarin'. Did you mean 'train'?
train                                     Missing argument 'CONFIG'.
train nope.yaml                           nope.yaml:
train nope.yaml --wrong                   No such option '--wrong'.
train empty.yaml                          empty.yaml: expected a mapping
train config.yaml train.step=3            did you mean 'steps'?
train config.yaml loss.num_anchors=many   loss: num_anchors: expected int
train config.yaml seed=-1                 seed must be at least 0 and below 2**32
capture nope.yaml train.steps=3           'train.steps=3', which looks like an override
capture config.yaml d --limit-gb nan      nan is not a finite number
capture config.yaml d --limit-gb inf      inf is not a finite number
config                                    give a KEY, for example train.steps, or --list
config train.step                         did you mean 'train.steps'?
config steps                              no key 'steps' in a configuration; did you mean 'train
config data.heldout                       data.heldout is now data.eval
evaluate run p --replay --temperature 1   --replay follows greedy answers
evaluate run p --endpoint u --temperature 1  leave --temperature out
export run draft --for nope               Invalid value for '--for'
generate nope a                           nope: not a run directory
generate run ' '                          prompt is empty
generate run a --plain --color            --plain drafts nothing
generate run a --max-new-tokens 0         max-new-tokens
generate run a --max-new-tokens 10000000  max-new-tokens
generate run a --temperature nan          nan is not a finite number
generate run a --temperature inf          inf is not a finite number
generate run a --temperature 1e-30        expected 0, or 0.001 to 1000, found 1e-30
generate run a --top-k 5                  --top-k: nothing is drawn at temperature 0
generate run a --top-p .9 --temperature 0  --top-p: nothing is drawn at temperature 0; give a --temp
generate run a --top-k 0 --temperature 1  --top-k
generate run a --top-p 0 --temperature 1  --top-p
generate run a --top-p nan --temperature 1  nan is not a finite number
generate run a --seed -1                  --seed
generate run a --seed 4294967296          --seed
generate run a --chat-template-kwargs '{a: 1, a: 2}'  the key 'a' is given twice
generate run a --chat-template-kwargs '{a: ['         --chat-template-kwargs: not valid YAML: line 1
generate run a --chat-template-kwargs thinking        --chat-template-kwargs: expected a mapping, f
generate run a --chat-template-kwargs '{a: null}'     a: expected true, false, a number or text, fo
import draft new                          a built-in name (smollm2-135m-instruct)
plan nope.yaml                            Missing option '--on'.
plan config.yaml --on h100:1 --json no/plan.json      no directory no; make it first
prompts out.jsonl --count 1               '--target'. Expected a directory or a built-in name
regenerate a b --target t --top-k 3       nothing is drawn at temperature
report run --out page.pdf                 ends in .html
target model.gguf                         give the directory to convert into
"""
# Words that no line of a table holds.
ODD_WORDS = (
    (["train\n"], "No such command"),
    (["train", "config.yaml", "x" * 10**5], "expected key=value"),
    (["train", "config.yaml", "\udcff=1"], "is not valid Unicode"),
    (["generate", "run", "a", "--dtype", "x" * 10**5], "--dtype"),
)


def test_argument_errors_import_no_jax(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SMALLEST))
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    lines = [re.split(r" {2,}", line) for line in ARGUMENT_ERRORS.strip().splitlines()]
    cases = [*((shlex.split(words), message) for words, message in lines), *ODD_WORDS]
    told = run_without_jax([words for words, _ in cases], tmp_path)
    for (words, expected), (code, out, errors) in zip(cases, told, strict=True):
        assert (code, out) == (2, ""), words
        line = errors.removesuffix("\n")
        assert line.startswith("error: ") and expected in line, (words, line)
        assert len(line) <= 500 and line.isprintable(), words
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "empty.yaml", "run"}


def test_float32_is_multiplied_in_full_under_the_command(
    domino, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A jax that is imported later reads the variable, one that is there already has its setting.
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "default")
    jax.config.update("jax_default_matmul_precision", "default")
    assert domino("--version")[0] == 0
    assert os.environ["JAX_DEFAULT_MATMUL_PRECISION"] == "highest"
    assert jax.config.jax_default_matmul_precision == "highest"
