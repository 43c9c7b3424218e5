"""Steps, decoding and the command run where only the accelerator's own packages are installed.

What feeds a long run (grain, array-record), makes a target from a file (gguf, platformdirs) or
draws (matplotlib) is often missing on such a machine, so it is imported where it is used.
"""

import os
import subprocess
import sys
from pathlib import Path

from tiny import write_target

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

template = chat_template(load_tokenizer(directory), {})
save_draft(run, state.params, DraftRecord(config, str(directory), template))
assert load_draft(run).step == 0
for words in (["--help"], ["generate", str(run), "a b c", "--max-new-tokens", "8"]):
    sys.argv = ["domino", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
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
