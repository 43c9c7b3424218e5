"""`key=value` words over the settings of a file."""

import re
from pathlib import Path

import pytest
from trees import SMALLEST

from domino_jax.base.errors import InputError, from_dict
from domino_jax.config.run import RENAMED, RunConfig, dump_config, load_config
from domino_jax.config.schema import described


def test_load_config_applies_overrides_in_order(smallest: Path) -> None:
    words = ["train.steps=7", "train.steps=9", "optimizer.learning_rate=1e-3", "dtype=float32"]
    words += ["draft.target_layer_ids=[1, 3]", "draft.projector_type=null"]
    words += ["data.eval=held=out.jsonl", "data.train=1e-3é", "loss.loss_decay_gamma=7"]
    config = load_config(smallest, words)
    assert config.train.steps == 9
    assert config.optimizer.learning_rate == 1e-3
    assert config.draft.target_layer_ids == (1, 3)
    assert config.draft.projector_type is None
    assert config.data.eval == "held=out.jsonl"
    assert config.dtype == "float32"
    assert config.loss.loss_decay_gamma == 7
    assert config.data.train == "1e-3é"
    # No override sticks, and what is written is read back.
    assert load_config(smallest) == from_dict(RunConfig, SMALLEST, source="smallest")
    smallest.write_text(dump_config(config))
    assert load_config(smallest) == config


@pytest.mark.parametrize("old", RENAMED)
def test_load_config_refuses_a_renamed_key_with_its_new_name(smallest: Path, old: str) -> None:
    new = RENAMED[old]
    assert new in {key.name for key in described(RunConfig)}
    with pytest.raises(InputError, match=f"{old} is now {new}; rename the key"):
        load_config(smallest, [f"{old}=1"])


def test_load_config_reads_every_spelling_of_a_float(smallest: Path) -> None:
    spellings = {"1e-3": 1e-3, "1.0e-3": 1e-3, "'1e-3'": 1e-3, "2": 2.0, "0.5": 0.5, "1E-4": 1e-4}
    for text, value in spellings.items():
        rate = load_config(smallest, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate
        assert isinstance(rate, float) and rate == value


# An override and what its message holds; `tests/base/test_parse.py` has what is not read as YAML.
REFUSED = r"""
optimizer.learning_rat=1       optimizer: unknown key 'learning_rat'; did you mean 'learning_rate'?
optimiser.b1=0.9               unknown key 'optimiser'; did you mean 'optimizer'?
mesh.zzz=1                     mesh: unknown key 'zzz'; known: data, fsdp, tensor
train.=1                       train: unknown key ''
train.steps=many               train: steps: expected int, found 'many'
train.steps=1:30               train: steps: expected int, found '1:30'
train.epochs=1.0               train: epochs: expected int, found 1.0
train.epochs=true              train: epochs: expected int, found True
train.epochs=null              train: epochs: expected int, found None
train.tensorboard=1            train: tensorboard: expected bool, found 1
train.profile=[3]              train: profile must be [step, steps], found [3]
train.profile=[1, 2, 3]        train: profile must be [step, steps], found
train.profile=[]               train: profile must be [step, steps], found []
train.profile=[1, x]           train: profile: expected int, found 'x'
train.profile=3                train: profile: expected a list, found 3
optimizer.learning_rate=fast   optimizer: learning_rate: expected float, found 'fast'
optimizer.learning_rate=.nan   optimizer: learning_rate: expected float, found nan
optimizer.learning_rate=inf    optimizer: learning_rate: expected float, found 'inf'
optimizer.learning_rate=true   optimizer: learning_rate: expected float, found True
optimizer.learning_rate=1e300  learning_rate: '1e300' is not a number that float32 holds
optimizer.weight_decay=1e-300  weight_decay: '1e-300' is not a number that float32 holds
run_dir=2024                   run_dir: expected str, found 2024
run_dir="a\0b"                 run_dir: 'a\x00b' holds a NUL character
run_dir="\ud800"               run_dir: '\ud800' is not valid Unicode
draft.target_layer_ids=3       draft: target_layer_ids: expected a list, found 3
draft.target_layer_ids=[1, x]  draft: target_layer_ids: expected int, found 'x'
draft.target_layer_ids=[&a 1, *a]           aliases (*name) are not read
mesh=3                         mesh: expected a mapping, found 3
data.chat_template_kwargs=no   data: chat_template_kwargs: expected a mapping, found False
data.chat_template_kwargs.a=[no]            data: chat_template_kwargs: a: expected true, false,
train.steps                    override 'train.steps': expected key=value, for example train.steps=
=3                             override '=3': expected key=value
train.steps=[1                 override 'train.steps=[1': not valid YAML: line 1, column 3: expected
run_dir.x=1                    override 'run_dir.x=1': 'run_dir' is a value, not a section
"""
CASES = [re.split(r" {2,}", line) for line in REFUSED.strip().splitlines()]
CASES.append(
    ["data.chat_template_kwargs" + ".a" * 70 + "=1", "a key of 72 parts, expected at most 64"]
)


@pytest.mark.parametrize(("override", "message"), CASES)
def test_load_config_refuses_bad_override(smallest: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(smallest, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
