"""The parts of a cycle are the cycle's, and what a tau is worth follows from their times."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from reference import draft_config, target_config

from domino_jax.decoding.decoder import Weights, make_decoder
from domino_jax.draft.backbone import DraftModel
from domino_jax.draft.build import init_variables
from domino_jax.evaluation import timing
from domino_jax.evaluation.timing import CycleTimes, cycle_times
from domino_jax.target.decoder import Target

CONFIG = draft_config(num_target_layers=4, target_layer_ids=(0, 2))
TARGET = Target(target_config(CONFIG))
TIMES = CycleTimes(
    context=64,
    proposals=3,
    draft=3.0,
    head=1.0,
    verification=20.0,
    rest=1.0,
    whole=26.0,
    plain=13.0,
    call=0.5,
)


def test_what_a_tau_is_worth() -> None:
    assert TIMES.sum == 25 and TIMES.break_even_tau == 2
    # 26 - 20 + 13 = 19 ms a cycle against 13 ms a token.
    assert TIMES.break_even_tau_if_one_step == pytest.approx(19 / 13)
    known = TIMES.as_json()
    assert known["break_even_tau"] == 2 and known["sum"] == 25 and known["whole"] == 26
    assert known["break_even_tau_if_one_step"] == pytest.approx(19 / 13)


@pytest.mark.parametrize("use_head", [True, False])
def test_every_part_is_timed_without_the_call(
    use_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = nn.meta.unbox(TARGET.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
    draft = nn.meta.unbox(init_variables(DraftModel(CONFIG), jax.random.key(1)))["params"]
    decoder = make_decoder(TARGET, DraftModel(CONFIG), proposals="serving", use_head=use_head)
    measured: dict[str, float] = {}
    timed = timing._timed

    def spy(runs: Mapping[str, Callable[[], None]], *, rounds: int) -> dict[str, float]:
        measured.update(timed(runs, rounds=rounds))
        return measured.copy()

    monkeypatch.setattr(timing, "_timed", spy)
    times = cycle_times(decoder, Weights(target, draft), context=20, rounds=2)
    assert times.proposals == 4 and times.context == 20
    assert min(measured.values()) > 0 and times.call == measured["call"]
    for part in ("draft", "verification", "rest", "whole", "plain"):
        assert getattr(times, part) == measured[part] - times.call
    head = measured["with_head"] - measured["draft"]
    assert times.head == (pytest.approx(head) if use_head else None)
