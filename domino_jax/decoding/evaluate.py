"""A long acceptance length says nothing where the output has changed: both are measured together.

Nor does a speed beside one of another day. So what a drafter gains on a set of prompts is measured
in one run, each prompt decoded each way in turn, and greedy outputs are compared:

    prompt -> plain, the target alone -> tokens and seconds -.
           -> speculative             -> tokens and seconds --> tau, speed-up, first differences
           -> its head off, if Domino -> tokens and seconds -'
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.decoding.generate import Answer, generate
from domino_jax.decoding.speculate import Decoder, Weights, required_slots
from domino_jax.kernels.products import vocabulary_logits
from domino_jax.progress import STDERR, Reporter
from domino_jax.target.model import Target, lm_head_weight

# Two logits closer than this may change places between one-token and block-wise arithmetic. In
# bfloat16 states have eight bits, and logits of 16 to 32 follow them by a quarter.
TIES = {"float32": 1e-3, "bfloat16": 0.25}


@dataclass(frozen=True)
class Difference:
    """The first place where two greedy outputs differ, and how far apart the target's logits are.

    `logit_gap` is between both tokens; a token is -1, and the gap None, where that output had
    already ended.
    """

    prompt: int
    position: int
    plain_token: int
    speculative_token: int
    logit_gap: float | None


@dataclass(frozen=True)
class Comparison:
    """Greedy outputs, compared token by token up to the first difference of each prompt."""

    tokens_compared: int
    tokens_equal: int
    differences: tuple[Difference, ...]
    tie: float

    @property
    def lossless(self) -> bool:
        """Whether every difference is a tie of the target's logits, closer than `tie`."""
        # An output that ended early is no tie: its missing token has no logit to compare.
        gaps = [one.logit_gap for one in self.differences]
        return all(gap is not None and gap < self.tie for gap in gaps)

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(
            self.tokens_compared + other.tokens_compared,
            self.tokens_equal + other.tokens_equal,
            self.differences + other.differences,
            self.tie,
        )

    def as_json(self) -> dict[str, Any]:
        """As evaluations record it."""
        return asdict(self) | {"lossless": self.lossless}


@dataclass(frozen=True, kw_only=True)
class SetFigures:
    """What a draft gains on a set of prompts, batch 1.

    Attributes:
        prompts: how many there are.
        tau: tokens committed per verification by the target, its own token included.
        tokens_per_second: with the draft, reading the prompt included.
        tokens_per_second_plain: of the target alone.
        verifications: blocks that the target verified.
        tokens: of all answers.
        tau_head_off: with a Domino head switched off; None without one.
        tokens_per_second_head_off: likewise.
        comparison: of greedy outputs with those of the target alone, head on and head off added up;
            None where tokens were drawn.
    """

    prompts: int
    tau: float
    tokens_per_second: float
    tokens_per_second_plain: float
    verifications: int
    tokens: int
    tau_head_off: float | None = None
    tokens_per_second_head_off: float | None = None
    comparison: Comparison | None = None

    @property
    def speed_up(self) -> float:
        """Tokens per second over those of the target alone."""
        return self.tokens_per_second / self.tokens_per_second_plain

    def as_json(self) -> dict[str, Any]:
        """As `evaluation.json` holds it: flat, without what was not measured."""
        figures = vars(self) | {"speed_up": self.speed_up}
        compared = figures.pop("comparison")
        known = {name: value for name, value in figures.items() if value is not None}
        return known | (compared.as_json() if compared is not None else {})


def evaluate(
    decoder: Decoder,
    weights: Weights,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    seed: int = 0,
    reporter: Reporter = STDERR,
) -> SetFigures:
    """Decodes each prompt plainly, with the whole draft and, for Domino, with its head off.

    One prompt at a time (batch 1), all ways in one run.

    Args:
        decoder: target and draft.
        weights: parameters of both.
        prompts: token ids of each prompt.
        max_new_tokens: per answer.
        seed: of the sampler; unused at temperature 0.
        reporter: is told each prompt that is done.
    """
    decoders = _ways(decoder)
    # One number for all prompts and ways: any other would be another program to compile.
    slots = required_slots(decoder, max(map(len, prompts)), max_new_tokens)
    run = functools.partial(
        generate, weights=weights, max_new_tokens=max_new_tokens, slots=slots, seed=seed
    )
    _compile(decoders, weights, prompts, slots)

    answers: dict[str, list[Answer]] = {name: [] for name in decoders}
    with reporter.bar("prompts", total=len(prompts)) as bar:
        for done, prompt in enumerate(prompts, start=1):
            # The ways take turns: where a machine slows down, it slows all of them.
            for kind, way in decoders.items():
                answers[kind] += run(way, prompts=[prompt])
            bar.tell(done)

    speed = {name: _tokens_per_second(of_way) for name, of_way in answers.items()}
    drafted = answers["speculative"]
    head_off = answers.get("head_off")
    return SetFigures(
        prompts=len(prompts),
        tau=_tau(drafted),
        tokens_per_second=speed["speculative"],
        tokens_per_second_plain=speed["plain"],
        verifications=_verifications(drafted),
        tokens=_tokens(drafted),
        tau_head_off=None if head_off is None else _tau(head_off),
        tokens_per_second_head_off=speed.get("head_off"),
        comparison=_compared(decoder, weights, prompts, answers),
    )


def _ways(decoder: Decoder) -> dict[str, Decoder]:
    """The ways to decode a prompt: the target alone, the whole draft, the draft without head."""
    # Plain decoding captures nothing: it must not pay for states that only a draft reads.
    alone = replace(decoder.target, capture=())
    plain = replace(decoder, target=alone, draft=None, proposals=0, use_head=False)
    ways = {"plain": plain, "speculative": decoder}
    if decoder.use_head:
        ways["head_off"] = replace(decoder, use_head=False)
    return ways


def _compared(
    decoder: Decoder,
    weights: Weights,
    prompts: Sequence[np.ndarray],
    answers: Mapping[str, Sequence[Answer]],
) -> Comparison | None:
    """All drafted ways against the plain one; None where tokens were drawn."""
    if decoder.temperature > 0:
        return None
    total = Comparison(0, 0, (), TIES[decoder.target.cfg.dtype])
    for name, drafted in answers.items():
        if name != "plain":
            total += compare(weights, decoder.target, prompts, answers["plain"], drafted)
    return total


def compare(
    weights: Weights,
    target: Target,
    prompts: Sequence[np.ndarray],
    plain: Sequence[Answer],
    speculative: Sequence[Answer],
) -> Comparison:
    """Compares speculative greedy answers with plain ones.

    After a first difference the two texts are answers to different prefixes, so a prompt is
    compared up to there.

    Args:
        weights: parameters of the target.
        target: the target.
        prompts: token ids of each prompt.
        plain: answers of the target alone.
        speculative: answers with a draft.
    Returns:
        `Comparison`; `logit_gap` is the absolute difference of the target's two logits after the
        common prefix.
    """
    compared = equal = 0
    differences = []
    pairs = zip(prompts, plain, speculative, strict=True)
    for index, (prompt, left, right) in enumerate(pairs):
        shorter = min(len(left.tokens), len(right.tokens))
        unequal = np.flatnonzero(left.tokens[:shorter] != right.tokens[:shorter])
        if len(unequal) == 0 and len(left.tokens) == len(right.tokens):
            compared += shorter
            equal += shorter
            continue
        # Equal as far as both go: the first difference is where one of them has ended.
        position = int(unequal[0]) if len(unequal) else shorter
        compared += position + 1
        equal += position
        left_token = _token_at(left, position)
        right_token = _token_at(right, position)
        gap = None
        if -1 not in (left_token, right_token):
            read = np.concatenate([prompt, left.tokens[:position]])
            logits = next_logits(target, weights.target, read)
            gap = float(abs(logits[left_token] - logits[right_token]))
        differences.append(Difference(index, position, left_token, right_token, gap))
    return Comparison(compared, equal, tuple(differences), TIES[target.cfg.dtype])


def _token_at(answer: Answer, position: int) -> int:
    """A token of an answer, -1 where it has ended."""
    return int(answer.tokens[position]) if position < len(answer.tokens) else -1


def next_logits(target: Target, params: Any, tokens: np.ndarray) -> np.ndarray:
    """The target's logits after a sequence, int32 [n] -> float32 [V], by one pass over it."""

    # Compiled for each length, and without a cache: it is called for differences, which are rare.
    @jax.jit
    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        out = Target(target.cfg).apply({"params": params}, tokens)
        return vocabulary_logits(out.hidden[0, -1], lm_head_weight(params))

    return np.asarray(logits(params, jnp.asarray(tokens)[None]))


def _compile(
    decoders: dict[str, Decoder], weights: Weights, prompts: Sequence[np.ndarray], slots: int
) -> None:
    """Runs every program once, so that no measured time holds a compilation."""
    # A prompt of each bucket that prompts are padded to: every bucket is a program of its own.
    lengths = {required_slots(decoders["plain"], len(prompt), 0): prompt for prompt in prompts}
    for way in decoders.values():
        for prompt in lengths.values():
            # Two tokens: the pass over the prompt gives the first, so the loop is run for another.
            generate(way, weights, [prompt], max_new_tokens=2, slots=slots)


def _verifications(answers: Sequence[Answer]) -> int:
    return sum(answer.verifications for answer in answers)


def _tokens(answers: Sequence[Answer]) -> int:
    return sum(len(answer.tokens) for answer in answers)


def _tau(answers: Sequence[Answer]) -> float:
    committed = sum(answer.committed for answer in answers)
    return committed / max(_verifications(answers), 1)


def _tokens_per_second(answers: Sequence[Answer]) -> float:
    seconds = sum(answer.seconds for answer in answers)
    return _tokens(answers) / seconds
