"""A run's program from its configuration: the loss's memory and the forms that suit the devices."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from reference import draft_config

from domino_jax.base.chips import CHIPS
from domino_jax.config.draft import DraftRecipe
from domino_jax.config.run import RunConfig
from domino_jax.config.sections import DataConfig, LossConfig
from domino_jax.objective import objectives
from domino_jax.sharding import make_mesh
from domino_jax.training.prepare import make_program, resolved
from domino_jax.training.program import CPU_LOGITS_MIB, chunk_blocks, scanned_target

DRAFT = draft_config()
CONFIG = RunConfig(
    run_dir="run",
    target="target",
    draft=DraftRecipe(mask_token_id=DRAFT.mask_token_id, block_size=DRAFT.block_size),
    data=DataConfig(train="rows.jsonl", batch_size=8),
    loss=LossConfig(num_anchors=20),
)


def bounded(mib: float) -> RunConfig:
    return replace(CONFIG, loss=replace(CONFIG.loss, logits_mib=mib))


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 2, "tensor": 4}])
@pytest.mark.parametrize(("blocks", "expected"), [(20, 20), (19, 10), (7, 7), (6, 5), (0.5, 1)])
def test_pieces_take_the_memory_they_may_and_are_of_one_size(
    sizes: dict[str, int], blocks: float, expected: int
) -> None:
    mesh = make_mesh(**sizes)
    vocabulary = -(-DRAFT.vocab_size // mesh.shape["tensor"])
    rows = 8 * mesh.shape["tensor"] // 8
    block = rows * DRAFT.num_predictions * vocabulary * 4
    mib = 1.001 * blocks * block / 2**20
    found = chunk_blocks(DRAFT, mesh, batch_size=8, num_anchors=20, logits_mib=mib)
    assert found == expected


def test_what_is_left_open_is_what_the_devices_take() -> None:
    mesh = make_mesh()
    assert resolved(CONFIG, mesh).loss.logits_mib == CPU_LOGITS_MIB
    assert resolved(bounded(3.5), mesh).loss.logits_mib == 3.5
    assert resolved(CONFIG, on("gpu", "NVIDIA H100 80GB HBM3")).loss.logits_mib == 640
    assert CHIPS["NVIDIA H100 80GB HBM3"].memory == 128 * 640 * 2**20


def test_what_reads_the_targets_logits_has_the_whole_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft = draft_config(num_target_layers=6, target_layer_ids=(1, 3))
    target, mesh = replace(draft, num_hidden_layers=6), make_mesh()
    monkeypatch.setattr(objectives, "OBJECTIVES", dict(objectives.OBJECTIVES))
    objectives.register_objective("of_logits", cost=lambda logits, *_: jnp.sum(logits, axis=-1))
    for change, depth in (({}, 4), ({"kl_weight": 0.5}, 6), ({"loss_type": "of_logits"}, 6)):
        config = resolved(replace(CONFIG, loss=replace(CONFIG.loss, **change)), mesh)
        assert make_program(config, target, draft, mesh, total_steps=9).target.layers_run == depth
    rolled_out = replace(CONFIG.train, rollout_every=5)
    data = replace(CONFIG.data, eval="heldout.jsonl")
    config = resolved(replace(CONFIG, train=rolled_out, data=data), mesh)
    assert make_program(config, target, draft, mesh, total_steps=9).target.layers_run == 6


def on(platform: str, kind: str) -> Any:
    """A mesh of one device that is not here."""
    device = SimpleNamespace(platform=platform, device_kind=kind)
    shape = dict.fromkeys(("data", "fsdp", "tensor"), 1)
    return SimpleNamespace(
        devices=SimpleNamespace(flat=[device]), shape=shape, empty=False, manual_axes=()
    )


def test_an_accelerator_recomputes_and_a_gpu_attends_by_cudnn() -> None:
    draft = draft_config(dtype="bfloat16", head_dim=16)
    h100 = on("gpu", "NVIDIA H100 80GB HBM3")
    for mesh, form, recompute in ((make_mesh(), "portable", False), (h100, "cudnn", True)):
        program = make_program(
            resolved(replace(CONFIG, dtype="bfloat16"), mesh), draft, draft, mesh, total_steps=9
        )
        assert program.target.attention == form
        assert program.trainer.draft_model.recompute == recompute
    depth = draft.num_hidden_layers
    packed = scanned_target(draft, capture=(0,), depth=depth, mesh=h100, packed=True)
    assert packed.attention == "portable"
    assert jax.devices()[0].platform == "cpu"
