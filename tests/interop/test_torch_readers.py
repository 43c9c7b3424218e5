"""Exports in the PyTorch classes of z-lab and NeMo: equal states and an equal head.

Loading is strict, and shards are read both ways.
"""

from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
import torch
from dflash import DFlashDraftModel
from doubles import slow_after
from exports import PLAIN, SHIFTED_DFLASH, WINDOWED, params_of
from nemo_automodel.components.speculative.dflash.draft_qwen3 import Qwen3DFlashDraftModel
from nemo_automodel.components.speculative.dflash.target import HFDFlashTargetModel
from reference import dflash_config, draft_config
from tiny import write_target
from transformers import AutoModelForCausalLM

from domino_jax.config.model import DraftConfig
from domino_jax.draft.backbone import DraftModel
from domino_jax.draft.head import DominoHead
from domino_jax.draft.mask import layer_spans
from domino_jax.interop.hf import load_hf_draft, save_hf_draft
from domino_jax.target.decoder import Target
from domino_jax.target.load import load_target

WINDOW = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 6}
# NeMo looks both ways inside every block; z-lab reads whether a sliding layer does.
CASES = {
    "zlab": (DFlashDraftModel, PLAIN),
    "zlab-window": (DFlashDraftModel, dflash_config(**WINDOW)),
    "zlab-causal": (DFlashDraftModel, dflash_config(**WINDOW, sliding_in_block="causal")),
    "nemo": (Qwen3DFlashDraftModel, PLAIN),
    "nemo-window": (Qwen3DFlashDraftModel, dflash_config(**WINDOW)),
    "nemo-domino": (Qwen3DFlashDraftModel, draft_config()),
    "nemo-domino-unshifted": (Qwen3DFlashDraftModel, draft_config(shift_label=False)),
}
# What NeMo saves again with all that it was told, shifted blocks, windows and transforms.
SAVED = {name: CASES[name] for name in ("zlab", "nemo", "nemo-domino")} | {
    "nemo-shifted": (Qwen3DFlashDraftModel, SHIFTED_DFLASH),
    "nemo-windows-and-transforms": (Qwen3DFlashDraftModel, WINDOWED),
}
ANCHOR = 11


def read_strictly(reader: Any, path: Path) -> Any:
    """The reader's model in float32; every weight of file and model is used."""
    model, report = reader.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def close(found: Any, expected: torch.Tensor) -> None:
    expected = expected.numpy()
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", slow_after(1, ["float32", "bfloat16"]))
@pytest.mark.parametrize(("reader", "config"), CASES.values(), ids=CASES.keys())
def test_one_block_has_the_same_states(
    reader: Any, config: DraftConfig, dtype: str, tmp_path: Path
) -> None:
    save_hf_draft(tmp_path / "draft", config, params_of(config), dtype=dtype)
    theirs = read_strictly(reader, tmp_path / "draft")
    params = load_hf_draft(tmp_path / "draft")[1]
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2, ANCHOR, 3 * config.hidden_size)).astype(np.float32)
    noise = rng.standard_normal((2, config.block_size, config.hidden_size)).astype(np.float32)
    length = ANCHOR + config.block_size
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (2, length))
    anchors = np.full((2, 1), ANCHOR, np.int32)
    found = jax.jit(DraftModel(config).apply)(
        {"params": params},
        features,
        positions[:, :ANCHOR],
        noise[:, None],
        positions[:, None, ANCHOR:],
        layer_spans(config, anchors, np.ones((2, 1), bool)),
    )
    with torch.no_grad():  # no mask: the class derives its own, as it does while decoding
        expected = theirs(
            position_ids=torch.tensor(positions),
            noise_embedding=torch.tensor(noise),
            target_hidden=torch.tensor(features),
        )
    close(found[:, 0], expected)


@pytest.mark.parametrize("shift_label", [False, True])
def test_nemos_head_corrects_the_same(shift_label: bool, tmp_path: Path) -> None:
    """Its spec_generate never runs the head, so the loaded model's parts are run one by one."""
    config = draft_config(shift_label=shift_label)
    save_hf_draft(tmp_path / "draft", config, params_of(config), dtype="float32")
    theirs = read_strictly(Qwen3DFlashDraftModel, tmp_path / "draft")
    params = load_hf_draft(tmp_path / "draft")[1]["head"]
    rng = np.random.default_rng(0)
    shape = (3, 7, config.num_predictions, config.hidden_size)
    hidden, previous = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    found = (
        DominoHead(config, config.head).apply({"params": params}, hidden, previous)
        @ params["embed_proj_2"].T
    )
    with torch.no_grad():
        states = theirs.prefix_gru(torch.tensor(previous).flatten(0, 1))[0].unflatten(0, shape[:2])
        expected = theirs.embed_proj(torch.cat([torch.tensor(hidden), states], dim=-1))
    close(found, expected)


@pytest.mark.parametrize(("reader", "config"), SAVED.values(), ids=SAVED.keys())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_are_read_both_ways(
    reader: Any, config: DraftConfig, dtype: str, tmp_path: Path
) -> None:
    params = params_of(config)
    save_hf_draft(tmp_path / "ours", config, params, dtype=dtype, shard_bytes=20_000)
    theirs = read_strictly(reader, tmp_path / "ours").to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    for name in ("ours", "theirs"):
        assert len(list((tmp_path / name).glob("model-*.safetensors"))) > 1
        assert (tmp_path / name / "model.safetensors.index.json").is_file()
    found_config, found = load_hf_draft(tmp_path / "theirs")
    expected_config, expected = load_hf_draft(tmp_path / "ours")
    assert found_config == expected_config
    chex.assert_trees_all_equal(found, expected, strict=True)
    if dtype == "float32":
        chex.assert_trees_all_equal(expected, params_of(config), strict=True)


def test_nemos_trainer_reads_the_last_target_layer_before_the_norm(tmp_path: Path) -> None:
    """Why `export --for nemo` refuses it; its other layers are ours."""
    directory = write_target(tmp_path / "target")
    loaded = load_target(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(3, 32, (2, 9))
    given = torch.tensor(tokens)
    found = HFDFlashTargetModel(model, [0, 3]).generate_batch(
        given, torch.ones_like(given), torch.ones_like(given)
    )
    ours = Target(loaded.config, capture=(0, 3)).apply({"params": loaded.params}, tokens).features
    middle, last = torch.chunk(found.hidden_states, 2, dim=-1)
    our_middle, our_last = np.split(np.asarray(ours), 2, axis=-1)
    close(our_middle, middle)
    with torch.no_grad():
        close(our_last, model.model.norm(last))
    assert np.abs(our_last - last.numpy()).max() > 0.1
