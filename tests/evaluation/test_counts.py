"""tau and acceptance by position, against loops over cycles that are known."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from toy_models import PROMPTS, TARGET, draft_config, models

from domino_jax.decoding.decoder import make_decoder
from domino_jax.decoding.generate import Answer, generate
from domino_jax.decoding.speculate import advance, required_cache_len, start
from domino_jax.evaluation.counts import acceptance, per_prompt, tau
from domino_jax.target.decoder import Target

P = 3


@dataclass(frozen=True)
class Cycle:
    """Drafted tokens that were committed, and whether the target's own did not come behind them."""

    kept: int
    cut: bool = False


def answer_of(cycles: list[Cycle]) -> Answer:
    """An answer that was decoded in such cycles: its first token costs none."""
    drafted = [False]
    for cycle in cycles:
        drafted += [True] * cycle.kept
        if not cycle.cut:
            drafted.append(False)
    return Answer(
        tokens=np.arange(len(drafted), dtype=np.int32),
        drafted=np.array(drafted),
        stopped=False,
        committed=len(drafted) - 1,
        verifications=len(cycles),
        seconds=1.0,
    )


def shares(cycles: list[Cycle]) -> tuple[list[float], list[float | None]]:
    """Marginal and conditional acceptance, by asking each cycle about each position."""
    marginal: list[float] = []
    conditional: list[float | None] = []
    for position in range(P):
        kept = refused = 0
        for cycle in cycles:
            if cycle.kept > position:
                kept += 1
            elif cycle.kept == position and not cycle.cut:
                refused += 1
        marginal.append(kept / max(len(cycles), 1))
        conditional.append(kept / (kept + refused) if kept + refused else None)
    return marginal, conditional


def assert_counts(answers: list[Answer], cycles: list[Cycle]) -> None:
    committed = sum(cycle.kept + (not cycle.cut) for cycle in cycles)
    assert sum(per_prompt(answers).verifications) == len(cycles)
    assert tau(answers) == pytest.approx(committed / max(len(cycles), 1))
    marginal, conditional = shares(cycles)
    found = acceptance(answers, P)
    assert found.marginal == pytest.approx(marginal)
    assert found.conditional == tuple(
        share if share is None else pytest.approx(share) for share in conditional
    )


def test_the_drawn_answer_is_counted_as_drawn() -> None:
    cycles = [Cycle(2), Cycle(0), Cycle(3), Cycle(2, cut=True)]
    answer = answer_of(cycles)
    assert tau([answer]) == 10 / 4
    found = acceptance([answer], P)
    assert found.marginal == (3 / 4, 3 / 4, 1 / 4)
    # The cut cycle decided nothing about its third proposal, the first cycle refused it.
    assert found.conditional == (3 / 4, 1.0, 1 / 2)


def test_every_short_answer_is_counted_by_its_cycles() -> None:
    """All answers of up to three cycles, the last one cut or not."""
    assert_counts([answer_of([])], [])  # ended with the prompt's own token
    whole = [Cycle(kept) for kept in range(P + 1)]
    # A cycle commits one token at least: cut before any, it would not have been.
    ends = [*whole, *(Cycle(kept, cut=True) for kept in range(1, P + 1))]
    for count in range(3):
        for before in itertools.product(whole, repeat=count):
            for end in ends:
                cycles = [*before, end]
                assert_counts([answer_of(cycles)], cycles)


def test_answers_are_added_up_before_anything_is_divided() -> None:
    rng = np.random.default_rng(0)
    answers: list[Answer] = []
    every: list[Cycle] = []
    for _ in range(20):
        kept = rng.integers(0, P + 1, size=rng.integers(0, 6))
        cycles = [Cycle(int(number)) for number in kept]
        if rng.integers(2):
            cycles.append(Cycle(int(rng.integers(1, P + 1)), cut=True))
        answers.append(answer_of(cycles))
        every += cycles
    assert_counts(answers, every)


def drafted_stop(answers: list[Answer]) -> int:
    """A token that comes first as a draft's in some answer: as a stop it cuts a cycle there."""
    for answer in answers:
        for place, token in enumerate(answer.tokens):
            if answer.drafted[place] and token not in answer.tokens[:place]:
                return int(token)
    raise AssertionError("nothing was ever accepted")


@pytest.mark.parametrize("stopped", [False, True])
def test_a_decoded_batch_is_counted_by_its_cycles(target_params: Any, stopped: bool) -> None:
    """Cycle by cycle: between two states lies what one verification committed."""
    model, weights = models(target_params, draft_config())
    decoder = make_decoder(Target(TARGET), model, proposals="serving")
    assert decoder.proposals == P
    cache_len = required_cache_len(decoder, max(map(len, PROMPTS)), 20)
    if stopped:
        free = generate(decoder, weights, PROMPTS, max_new_tokens=20, cache_len=cache_len)
        decoder = replace(decoder, stop_ids=(drafted_stop(free),))
    seen: list[Cycle] = []
    # Of several limits some cut a last cycle.
    for limit in range(12, 21):
        state = start(decoder, weights, PROMPTS, max_new_tokens=limit, cache_len=cache_len)
        cycles: list[Cycle] = []
        while not bool(jnp.all(state.finished)):
            before, finished = np.asarray(state.lengths), np.asarray(state.finished)
            state = advance(decoder, weights, state, cycles=1)
            after, drafted = np.asarray(state.lengths), np.asarray(state.drafted)
            for row in np.flatnonzero(~finished):
                new = drafted[row, before[row] : after[row]]
                cycles.append(Cycle(int(new.sum()), cut=bool(new.all())))
        answered = generate(decoder, weights, PROMPTS, max_new_tokens=limit, cache_len=cache_len)
        assert_counts(answered, cycles)
        seen += cycles
    assert any(cycle.kept for cycle in seen) and any(cycle.cut for cycle in seen)
