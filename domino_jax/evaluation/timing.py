"""Times of a cycle, of its parts and of a step of the target alone: they give the break-even tau.

Each part is timed as the program that it is within the cycle, all in turns:

    draft          the backbone over its block, and the base logits
    head           what the Domino head adds to that
    verification   the target's pass over the block, with its logits
    rest           acceptance, commits, the draft's context

A loop of cycles is called once, but here every part is called by itself. What a call costs, as a
program shows that does nothing with the same arguments, is in none of the times.
"""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import jax
import numpy as np

from domino_jax.decoding.decoder import Decoder, Weights, alone
from domino_jax.decoding.generate import require_finite
from domino_jax.decoding.speculate import (
    DecodeState,
    Drafts,
    Verified,
    commit,
    cycle,
    draft_block,
    required_cache_len,
    start,
    verify,
)

ROUNDS = 20
WARM = 3  # rounds that are not counted


@dataclass(frozen=True, kw_only=True)
class CycleTimes:
    """Median milliseconds of one cycle at batch 1 and of its parts.

    Attributes:
        context: tokens behind the cycle.
        draft: drafting without the head.
        head: what the head adds; None without one.
        verification: the target's pass.
        rest: what remains.
        whole: the cycle, as one program.
        plain: a step of the target alone.
        call: calling a program with the weights and a state; the times above are without it.
    """

    context: int
    proposals: int
    draft: float
    head: float | None
    verification: float
    rest: float
    whole: float
    plain: float
    call: float

    @property
    def sum(self) -> float:
        """Of the parts; how far it is from `whole` says how far to trust them."""
        return self.draft + (self.head or 0.0) + self.verification + self.rest

    @property
    def break_even_tau(self) -> float:
        """The tau above which drafting pays on this machine; a tau over it is the speed-up."""
        return self.whole / self.plain

    @property
    def break_even_tau_if_one_step(self) -> float:
        """The same where verifying a block costs one step, as on accelerators at small batches."""
        return (self.whole - self.verification + self.plain) / self.plain

    def as_json(self) -> dict[str, Any]:
        """As `evaluation.json` holds it."""
        follows = ("sum", "break_even_tau", "break_even_tau_if_one_step")
        return asdict(self) | {name: getattr(self, name) for name in follows}


def cycle_times(
    decoder: Decoder, weights: Weights, *, context: int, rounds: int = ROUNDS
) -> CycleTimes:
    """Times the parts of a cycle, in turns.

    Args:
        decoder: target and draft, at temperature 0.
        weights: parameters of both.
        context: tokens behind the cycle.
        rounds: times that each part runs, beside those for warming up.
    Raises:
        InputError: logits of the target or the draft are not finite.
    """
    # Nothing ends: a cycle that has nothing left to do must not be timed.
    endless = replace(decoder, stop_ids=())
    plain, headless = alone(endless), replace(endless, use_head=False)
    committed = (rounds + WARM) * (decoder.proposals + 1)
    begin = functools.partial(
        start,
        weights=weights,
        prompts=[np.ones(context, np.int32)],
        max_new_tokens=committed + 1,
        cache_len=required_cache_len(decoder, context, committed + 1),
    )
    given = _given(endless, weights, begin(endless))
    parts: dict[str, _Part] = {
        "whole": lambda weights, state, _: (cycle(endless, weights, state), None),
        "plain": lambda weights, state, _: (cycle(plain, weights, state), None),
        "draft": lambda weights, state, _: (state, _block(headless, weights, state)),
        "with_head": lambda weights, state, _: (state, _block(endless, weights, state)),
        "verification": functools.partial(_verification, endless),
        "rest": functools.partial(_rest, endless),
        "call": lambda weights, state, _: (state, None),
    }
    runs = {
        name: _repeated(part, weights, begin(plain if name == "plain" else endless), given)
        for name, part in parts.items()
    }
    times = _timed(runs, rounds=rounds)
    call = times.pop("call")
    times = {name: taken - call for name, taken in times.items()}
    with_head = times.pop("with_head")
    head = with_head - times["draft"] if decoder.use_head else None
    return CycleTimes(context=context, proposals=decoder.proposals, head=head, call=call, **times)


# What a part is given beside the state: drafts, and what the target said of them.
_Given = tuple[Drafts, jax.Array, jax.Array]
# A part as a program: the state, which is consumed, and whatever else it computes.
_Part = Callable[[Weights, DecodeState, _Given], tuple[DecodeState, Any]]


@functools.partial(jax.jit, static_argnums=0)
def _given(decoder: Decoder, weights: Weights, state: DecodeState) -> _Given:
    drafts = draft_block(decoder, weights, state, state.key)
    verified = verify(decoder, weights, state, drafts.block)
    return drafts, verified.logits, verified.features


def _block(decoder: Decoder, weights: Weights, state: DecodeState) -> jax.Array:
    return draft_block(decoder, weights, state, state.key).block


def _verification(
    decoder: Decoder, weights: Weights, state: DecodeState, given: _Given
) -> tuple[DecodeState, Any]:
    verified = verify(decoder, weights, state, given[0].block)
    return state._replace(target_cache=verified.cache), (verified.logits, verified.features)


def _rest(
    decoder: Decoder, weights: Weights, state: DecodeState, given: _Given
) -> tuple[DecodeState, Any]:
    drafts, logits, features = given
    verified = Verified(logits, features, state.target_cache)
    return commit(decoder, weights, state, drafts, verified, state.key), None


def _repeated(
    part: _Part, weights: Weights, state: DecodeState, given: _Given
) -> Callable[[], DecodeState]:
    """Runs a part once more, on the state that it left, and returns the state."""
    # Arguments, all of them: what is known when a program is compiled, XLA computes there.
    compiled = jax.jit(part, donate_argnums=1)

    def run() -> DecodeState:
        nonlocal state
        state = jax.block_until_ready(compiled(weights, state, given))[0]
        return state

    return run


def _timed(runs: Mapping[str, Callable[[], DecodeState]], *, rounds: int) -> dict[str, float]:
    """Median milliseconds of each."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    states = {}
    for _ in range(WARM + rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            states[name] = run()
            taken[name].append(1e3 * (time.perf_counter() - began))
    for state in states.values():
        require_finite(state, 1)
    return {name: median(times[WARM:]) for name, times in taken.items()}
