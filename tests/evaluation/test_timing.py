"""The parts of a cycle are the cycle's, and what a tau is worth follows from their times."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pytest
from toy_models import TARGET, draft_config, models

from domino_jax.base.errors import InputError
from domino_jax.decoding.decoder import make_decoder
from domino_jax.decoding.speculate import DecodeState
from domino_jax.evaluation import timing
from domino_jax.evaluation.timing import CycleTimes, cycle_times
from domino_jax.target.decoder import Target

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
    target_params: Any, use_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, weights = models(target_params, draft_config())
    decoder = make_decoder(Target(TARGET), draft, proposals="serving", use_head=use_head)
    measured: dict[str, float] = {}
    timed = timing._timed

    def spy(runs: Mapping[str, Callable[[], DecodeState]], *, rounds: int) -> dict[str, float]:
        # Without a head, its part is the same program: none needs to run again.
        taken = timed(runs, rounds=rounds) if use_head else dict(zip(runs, range(9), strict=False))
        measured.update(taken)
        return measured.copy()

    monkeypatch.setattr(timing, "_timed", spy)
    times = cycle_times(decoder, weights, context=20, rounds=2)
    assert times.proposals == 3 and times.context == 20
    assert not use_head or min(measured.values()) > 0
    assert times.call == measured["call"]
    for part in ("draft", "verification", "rest", "whole", "plain"):
        assert getattr(times, part) == measured[part] - times.call
    head = measured["with_head"] - measured["draft"]
    assert times.head == (pytest.approx(head) if use_head else None)


@pytest.mark.parametrize("model", ["target", "draft"])
def test_a_cycle_without_finite_logits_is_not_timed(target_params: Any, model: str) -> None:
    draft, weights = models(target_params, draft_config())
    decoder = make_decoder(Target(TARGET), draft, proposals="serving")
    nan = jax.tree.map(lambda leaf: leaf * np.nan, getattr(weights, model))
    with pytest.raises(InputError, match=f"^the {model}'s logits are not finite in 1 of 1 answers"):
        cycle_times(decoder, weights._replace(**{model: nan}), context=20, rounds=1)
