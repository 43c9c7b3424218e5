"""The figures of a window: what is counted, which are left out, and what a person is shown."""

import time
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import CONFIG, MASK_TOKEN_ID

from domino_jax.base.chips import Chip
from domino_jax.config.draft import DraftRecipe, make_draft_config
from domino_jax.objective.modules import build_trainer
from domino_jax.sharding import make_mesh
from domino_jax.target.decoder import Target
from domino_jax.training.flops import step_flops
from domino_jax.training.speed import Speed, peak_memory_bytes, speed_words
from domino_jax.training.step import Program

RECIPE = DraftRecipe(
    mask_token_id=MASK_TOKEN_ID, num_hidden_layers=1, block_size=4, target_layer_ids=(0, 2)
)
LENGTHS = [10, 20, 30, 40]
SUMS = {"valid_tokens": np.float32(48), "valid_blocks": np.float32(21)}


class Clock:
    """Seconds that pass when the test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def toy_speed(
    *, kl_weight: float = 0.0, target_runs: bool = True, chip: Chip | None = None
) -> Speed:
    """Of a run whose steps have 2 micro-batches of 8 rows."""
    program = Program(
        trainer=build_trainer(draft(), kl_weight=kl_weight),
        # Whole, as where rollouts are asked for: only what a step needs counts.
        target=Target(CONFIG, capture=(0, 2), scan_layers=True),
        optimizer=optax.sgd(0.1),
        curriculum=optax.constant_schedule(0.5),
    )
    return Speed(
        program, make_mesh(), lengths=LENGTHS, step_rows=16, target_runs=target_runs, chip=chip
    )


def draft() -> Any:
    return make_draft_config(RECIPE, CONFIG, special_ids={}, dtype="float32")


def test_speeds_count_what_was_there(clock: Clock) -> None:
    speed = toy_speed()
    speed.add(np.array([[0], [3]]))
    speed.begin()  # forgets it
    speed.add(np.array([[0, 1], [2, -1]]))
    speed.add(np.array([[3, -1], [1, 0]]))
    clock.now += 4.0
    with speed.paused(jnp.zeros(())):
        clock.now += 100.0
    figures = speed.figures(SUMS)
    # No MFU of a chip that nobody publishes, no memory where the platform does not tell.
    assert figures == {
        "samples_per_second": 2 * 16 / 4.0,
        "tokens_per_second": 130 / 4.0,
        "supervised_tokens_per_second": 48 / 4.0,
        "seconds_per_step": 2.0,
    }
    assert speed_words(figures) == "32 tokens/s"


@pytest.mark.parametrize(
    ("settings", "counted"),
    [
        ({}, {"target": CONFIG}),
        ({"kl_weight": 0.5}, {"target": CONFIG, "target_logits": True}),
        ({"target_runs": False}, {}),
    ],
    ids=["online", "kl", "offline"],
)
def test_mfu_is_of_blocks_and_tokens_that_were_there(
    clock: Clock, settings: dict[str, Any], counted: dict[str, Any]
) -> None:
    speed = toy_speed(**settings, chip=Chip(flops=1e6, memory=1, bandwidth=1.0))
    speed.add(np.array([[0, 1], [2, -1], [3, -1]]))  # 4 conversations of 100 tokens, 21 blocks
    clock.now += 2.0
    figures = speed.figures(SUMS)
    flops = 4 * sum(step_flops(draft(), 25, 21 / 4, **counted).values())
    assert figures["mfu"] == pytest.approx(flops / 2.0 / (8 * 1e6), rel=1e-12)
    assert speed_words(figures) == f"50 tokens/s  MFU {figures['mfu']:.1%}"


def test_peak_memory_is_that_of_the_fullest_device() -> None:
    def device(statistics: dict[str, int] | None) -> Any:
        return SimpleNamespace(memory_stats=lambda: statistics)

    told = [device({"peak_bytes_in_use": peak, "bytes_in_use": 99}) for peak in (5, 7, 6)]
    assert peak_memory_bytes(told) == 7
    assert peak_memory_bytes([*told, device(None), device({"bytes_in_use": 99})]) == 7
    assert peak_memory_bytes([device(None)]) is None


def test_the_program_waits_before_a_pause(clock: Clock) -> None:
    """Steps in flight are training time, though a pause follows."""

    class InFlight:
        def block_until_ready(self) -> None:
            clock.now += 3.0

    speed = toy_speed()
    speed.add(np.array([[0]]))
    with speed.paused(InFlight()):
        clock.now += 100.0
    assert speed.figures(SUMS)["seconds_per_step"] == 3.0
