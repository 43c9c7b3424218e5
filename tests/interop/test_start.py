"""Runs that start from a draft: equal weights at step 0, another draft refused field by field."""

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from reference import dflash_config, draft_config, random_params
from tiny import Heard, quiet, run_config
from whole_run import train

from domino_jax.base.errors import InputError
from domino_jax.config.model import DraftConfig, RopeScaling
from domino_jax.config.run import load_config
from domino_jax.interop.hf import load_hf_draft, save_hf_draft
from domino_jax.interop.hf_config import config_json
from domino_jax.interop.start import check_start, starting_params
from domino_jax.training.prepare import prepare, read_models

SHORT = {"steps": 1, "checkpoint_every": 1, "eval_every": 1, "log_every": 1}


@pytest.fixture(scope="module")
def checkpoint(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 export of a draft for the target."""
    directory = tmp_path_factory.mktemp("first")
    config = read_models(load_config(run_config(directory, target)), reporter=quiet()).draft
    save_hf_draft(directory / "draft", config, random_params(config), dtype="float32")
    return directory / "draft"


def test_step_0_has_the_weights_of_the_checkpoint(
    target: Path, checkpoint: Path, tmp_path: Path
) -> None:
    path = run_config(
        tmp_path,
        target,
        draft={"init_from": str(checkpoint)},
        optimizer={"ema_decay": 0.9},
        mesh={"data": 1, "fsdp": 8},
    )
    run = prepare(load_config(path), reporter=quiet())
    expected = load_hf_draft(checkpoint)[1]
    chex.assert_trees_all_equal(jax.device_get(run.state.params), jax.device_get(expected))
    chex.assert_trees_all_equal(jax.device_get(run.state.ema), jax.device_get(expected))
    assert int(run.state.step) == 0
    # Split from the host's memory: no device ever holds more than its share.
    host = jax.tree.leaves(starting_params(checkpoint, run.inputs.record.config))
    assert {(type(leaf), leaf.dtype.name) for leaf in host} == {(np.ndarray, "float32")}
    chex.assert_trees_all_equal_shapes_and_dtypes(run.state.params, expected)


def test_a_resumed_run_does_not_read_the_checkpoint_again(
    target: Path, checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    path = run_config(tmp_path, target, draft={"init_from": str(copy)}, train=SHORT)
    train(load_config(path), reporter=quiet())
    shutil.rmtree(copy)
    heard = Heard()
    train(load_config(path), reporter=heard)
    assert "resuming at step 1 of 1" in heard.text


def test_another_draft_is_one_line_and_code_2_and_leaves_the_run_directory_free(
    domino, target: Path, checkpoint: Path, tmp_path: Path
) -> None:
    path = run_config(
        tmp_path,
        target,
        draft={"init_from": str(checkpoint), "emb_dim": 6, "target_layer_ids": [0, 1]},
    )
    code, _, err = domino("train", path)
    last = err.strip().splitlines()[-1]
    another = f"error: draft.init_from: {checkpoint} is another draft than this run's: "
    assert code == 2 and last.startswith(another)
    assert "target_layer_ids is (0, 2), expected (0, 1)" in last
    assert "emb_dim is 8, expected 6" in last
    # Nothing was trained, so the mended configuration may use the same run_dir.
    path = run_config(tmp_path, target, draft={"init_from": str(checkpoint)})
    prepare(load_config(path), reporter=quiet())


@pytest.mark.parametrize(
    "override", ["draft.init_from=nowhere", "draft.init_layers_from_target=true"]
)
def test_unusable_starts_are_refused(
    target: Path, checkpoint: Path, tmp_path: Path, override: str
) -> None:
    path = run_config(tmp_path, target, draft={"init_from": str(checkpoint)})
    with pytest.raises(InputError, match=r"nowhere|are two starts"):
        prepare(load_config(path, [override]), reporter=quiet())


WINDOW = {"layer_types": ("sliding_attention",) * 2, "sliding_window": 6}
YARN = RopeScaling(rope_type="yarn", factor=2.0, original_max_position_embeddings=64)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (draft_config(mask_token_id=118), "mask_token_id is 118, expected 119"),
        (draft_config(num_hidden_layers=1), "num_hidden_layers is 1, expected 2"),
        (draft_config(num_target_layers=7), "num_target_layers is 7, expected 6"),
        (draft_config(shift_label=False), "shift_label is False, expected True"),
        (draft_config(pure_draft_prefix_len=2), "pure_draft_prefix_len is 2, expected 1"),
        (draft_config(intermediate_size=46), "intermediate_size is 46, expected 44"),
        (draft_config(vocab_size=121), "vocab_size is 121, expected 120"),
        (draft_config(rms_norm_eps=1e-6), "rms_norm_eps is 1e-06, expected 1e-05"),
        (draft_config(rope_theta=1e6), r"rope_theta is 1000000\.0, expected 5000\.0"),
        (draft_config(rope_scaling=YARN), r"rope_scaling is \{.*\}, expected None"),
        (draft_config(output_multiplier=2.0), r"output_multiplier is 2\.0, expected 1\.0"),
        (
            draft_config(**WINDOW),
            "sliding_window is 6, expected None.*"
            "sliding_in_block is 'bidirectional', expected None",
        ),
        (
            dflash_config(),
            "shift_label is False, expected True; projector_type is None, expected 'domino'",
        ),
    ],
)
def test_every_other_field_is_named_found_and_expected(
    theirs: DraftConfig, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json(theirs, "float32")))
    with pytest.raises(InputError, match=f" is another draft than this run's: .*{message}"):
        check_start(tmp_path, draft_config())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (draft_config(block_size=8), draft_config()),
        (draft_config(max_position_embeddings=512), draft_config(dtype="bfloat16")),
        (
            draft_config(),
            draft_config(layer_types=("full_attention",) * 2, sliding_in_block="causal"),
        ),
        (dflash_config(), dataclasses.replace(dflash_config(), pure_draft_prefix_len=1)),  # no head
    ],
)
def test_fields_that_no_tensor_depends_on_may_differ(
    theirs: DraftConfig, ours: DraftConfig, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json(theirs, "float32")))
    check_start(tmp_path, ours)


@pytest.mark.pitfall(
    "mask token aliases eos, pad or bos, or changes on resume or import",
    seen="training/inputs.py: pad left out of the special tokens",
)
def test_a_mask_token_that_became_special_is_refused_on_resume(
    target: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "target"
    shutil.copytree(target, copy)
    path = run_config(tmp_path, copy, train=SHORT)
    train(load_config(path), reporter=quiet())
    settings = copy / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"pad_token": "<mask>"}))
    with pytest.raises(InputError, match="mask_token_id 2 is the target's pad token"):
        train(load_config(path), reporter=quiet())
