"""Acceptance, outputs and speed of a draft on a set of prompts, measured in one run.

Acceptance is counted in batches, which is quick; time is taken one prompt after the other, as a
user waits:

    prompts -> plain, the target alone      -.   every token of the others is held against it
            -> serving, K - 1 proposals      |
            -> block, all that it predicts   +-> tau, intervals, acceptance by position, gains
            -> head_off, if Domino           |
            -> ngram, copied from the text  -'
    some    -> plain and serving in turns, batch 1 -> tokens/s

Where drafts are replayed on the target's own answers, only what is timed is decoded and compared.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from domino_jax.base.progress import STDERR, Bar, Reporter
from domino_jax.decoding.decoder import Decoder, Weights, alone, number_of_proposals
from domino_jax.decoding.generate import Answer, generate
from domino_jax.decoding.speculate import required_cache_len
from domino_jax.evaluation.bootstrap import Gain, PerPrompt, gain, tau_interval
from domino_jax.evaluation.compare import Comparison, compare
from domino_jax.evaluation.counts import Acceptance, acceptance, per_prompt
from domino_jax.evaluation.prompt_lookup import look_up
from domino_jax.evaluation.replay import replayed
from domino_jax.evaluation.throughput import Speed, measured_speed

# Ways to decode. The headline is what serving engines do.
SERVING, BLOCK, HEAD_OFF, NGRAM = "serving", "block", "head_off", "ngram"


@dataclass(frozen=True, kw_only=True)
class ModeFigures:
    """What one way of drafting gains on a set of prompts.

    Attributes:
        proposals: drafted tokens per verification, at most.
        tau: committed tokens per verification, the target's own included; the first token of an
            answer costs none and is not counted.
        interval: of tau, 95 % over prompts; None for one prompt.
        comparison: of what was decoded greedily with the target's own; None where tokens were
            drawn, and for what is only computed from the target's own outputs.
        gain: of the headline over this way; None for itself, and over a way without a tau.
    """

    proposals: int
    tau: float
    interval: tuple[float, float] | None
    committed: int
    verifications: int
    acceptance: Acceptance
    per_prompt: PerPrompt
    comparison: Comparison | None = None
    gain: Gain | None = None

    def as_json(self) -> dict[str, Any]:
        """As `evaluation.json` holds it: without what was not measured, the comparison flat."""
        figures = asdict(replace(self, comparison=None))
        known = {name: value for name, value in figures.items() if value is not None}
        return known | (self.comparison.as_json() if self.comparison else {})


@dataclass(frozen=True, kw_only=True)
class SetFigures:
    """What a draft gains on a set of prompts.

    Attributes:
        modes: by name; `serving` is there always.
        speed: None where nothing was timed.
        answers: those of `serving`, in the order of the prompts.
    """

    prompts: int
    modes: Mapping[str, ModeFigures]
    speed: Speed | None
    answers: Sequence[Answer]

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(len(answer.tokens) for answer in self.answers)

    @property
    def tau(self) -> float:
        """The headline: K - 1 proposals, head on."""
        return self.modes[SERVING].tau

    @property
    def comparison(self) -> Comparison | None:
        """Of all ways that were decoded, added up; None where there is none."""
        compared = [mode.comparison for mode in self.modes.values() if mode.comparison is not None]
        return functools.reduce(Comparison.__add__, compared) if compared else None

    def as_json(self) -> dict[str, Any]:
        """As `evaluation.json` holds it."""
        return {
            "prompts": self.prompts,
            "tokens": self.tokens,
            "ways": {name: mode.as_json() for name, mode in self.modes.items()},
            **({"speed": self.speed.as_json()} if self.speed else {}),
        }


def evaluate(
    decoder: Decoder,
    weights: Weights,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    timed: int = 4,
    replay: bool = False,
    plain: Sequence[Answer] | None = None,
    seed: int = 0,
    reporter: Reporter = STDERR,
) -> SetFigures:
    """Decodes prompts in all ways that a draft has, and holds the outputs against the target's own.

    Args:
        decoder: target and draft; the ways take their own numbers of proposals.
        weights: parameters of both.
        prompts: token ids of each prompt.
        max_new_tokens: per answer.
        batch_size: prompts decoded together; at temperature 0 no figure depends on it.
        timed: the first so many prompts are decoded once more, one by one; 0: nothing is timed.
        replay: run the drafts alone on the target's own answers, at temperature 0: the same counts
            but for ties, several times sooner, and no output to compare but what is timed.
        plain: the target's own greedy answers, see `plain_answers`; None decodes them.
        seed: of the sampler; unused at temperature 0.
        reporter: is told each batch.
    """
    modes = _modes(decoder)
    cache_len = _cache_len(modes.values(), prompts, max_new_tokens)
    if decoder.temperature > 0:
        if replay:
            raise ValueError("drawn tokens cannot be replayed: replay is for temperature 0")
        plain = None  # drawn tokens have nothing to be held against
    elif plain is None:
        plain = plain_answers(
            decoder,
            weights,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            reporter=reporter,
        )
    batches = _Batches(weights, prompts, batch_size, max_new_tokens, cache_len, seed)
    answers: dict[str, list[Answer]] = {}
    if replay and plain is not None:
        with reporter.bar("replayed", total=len(prompts)) as bar:
            answers = batches.replayed(modes, plain, bar)
    else:
        with reporter.bar("answers", total=len(modes) * len(prompts)) as bar:
            for name, mode in modes.items():
                answers[name] = batches.decoded(mode, bar, name, len(answers) * len(prompts))
    speed, timed_answers = measured_speed(
        modes[SERVING],
        weights,
        prompts[:timed],
        max_new_tokens=max_new_tokens,
        cache_len=cache_len,
        seed=seed,
        reporter=reporter,
    )
    # What the target itself stood for.
    decoded = {SERVING: timed_answers} if replay else answers
    figures = _mode_figures(modes, batches, answers, plain, decoded)
    return SetFigures(prompts=len(prompts), modes=figures, speed=speed, answers=answers[SERVING])


def plain_answers(
    decoder: Decoder,
    weights: Weights,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    reporter: Reporter = STDERR,
) -> list[Answer]:
    """The target's own greedy answers, which every draft is held against.

    Args:
        decoder: of any draft; the target alone decodes.
        weights: parameters of the target.
        prompts: token ids of each prompt.
        max_new_tokens: per answer.
        batch_size: prompts decoded together.
        reporter: is told each batch.
    """
    plain = alone(replace(decoder, temperature=0.0))
    cache_len = _cache_len([plain], prompts, max_new_tokens)
    batches = _Batches(weights, prompts, batch_size, max_new_tokens, cache_len)
    with reporter.bar("answers", total=len(prompts)) as bar:
        return batches.decoded(plain, bar, "plain")


@dataclass(frozen=True)
class _Batches:
    """A set of prompts, decoded in batches; what is compiled depends on their three numbers."""

    weights: Weights
    prompts: Sequence[np.ndarray]
    size: int
    max_new_tokens: int
    cache_len: int
    seed: int = 0

    def decoded(self, decoder: Decoder, bar: Bar, name: str, before: int = 0) -> list[Answer]:
        """The answers to all prompts; `bar` is told them beyond those `before`."""
        answers: dict[int, Answer] = {}
        for batch in self._filled(list(map(len, self.prompts))):
            found = generate(
                decoder,
                self.weights,
                [self.prompts[index] for index in batch],
                max_new_tokens=self.max_new_tokens,
                cache_len=self.cache_len,
                seed=self.seed + len(answers),
            )
            for index, answer in zip(batch, found, strict=True):
                answers.setdefault(index, answer)  # a repeated prompt is answered by the first
            bar.tell(before + len(answers), name)
        return [answers[index] for index in range(len(self.prompts))]

    def replayed(
        self, modes: Mapping[str, Decoder], plain: Sequence[Answer], bar: Bar
    ) -> dict[str, list[Answer]]:
        """The target's own answers as each way would have written them."""
        pairs = zip(self.prompts, plain, strict=True)
        answers: dict[str, dict[int, Answer]] = {name: {} for name in modes}
        for batch in self._filled([len(prompt) + len(one.tokens) for prompt, one in pairs]):
            written = replayed(
                modes,
                self.weights,
                [self.prompts[index] for index in batch],
                [plain[index] for index in batch],
                cache_len=self.cache_len,
                max_new_tokens=self.max_new_tokens,
            )
            for name, of_batch in written.items():
                answers[name] |= dict(zip(batch, of_batch, strict=True))
            bar.tell(len(answers[SERVING]))
        return {name: [of[index] for index in range(len(plain))] for name, of in answers.items()}

    def _filled(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Places of prompts, `size` at a time, by length: few paddings are compiled.

        Short of prompts, the last batch repeats one: another size is another program.
        """
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        size = min(self.size, len(order))
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            yield [*batch, *[batch[-1]] * (size - len(batch))]


def _cache_len(
    decoders: Iterable[Decoder], prompts: Sequence[np.ndarray], max_new_tokens: int
) -> int:
    """A power of two for all ways, and for sets of like lengths: another would be recompiled."""
    longest = max(map(len, prompts))
    # Programs are warmed up by answers of two tokens.
    needed = max(required_cache_len(one, longest, max(max_new_tokens, 2)) for one in decoders)
    return 1 << (needed - 1).bit_length()


def _modes(decoder: Decoder) -> dict[str, Decoder]:
    """The ways to decode with a draft; one that would be another one's double is left out."""
    assert decoder.draft is not None
    config = decoder.draft.cfg
    serving = replace(decoder, proposals=number_of_proposals(config, SERVING))
    block = replace(decoder, proposals=number_of_proposals(config, BLOCK))
    modes = {SERVING: serving}
    if block.proposals != serving.proposals:
        modes[BLOCK] = block
    if decoder.use_head:
        modes[HEAD_OFF] = replace(serving, use_head=False)
    return modes


def _mode_figures(
    modes: Mapping[str, Decoder],
    batches: _Batches,
    answers: Mapping[str, Sequence[Answer]],
    plain: Sequence[Answer] | None,
    decoded: Mapping[str, Sequence[Answer]],
) -> dict[str, ModeFigures]:
    """The figures of each way, and of the floor where the target's own answers are known."""
    serving, every = modes[SERVING], dict(answers)
    if plain is not None:
        # As many proposals as the headline has: both cost the target the same block.
        pairs = zip(batches.prompts, plain, strict=True)
        every[NGRAM] = [look_up(*pair, proposals=serving.proposals) for pair in pairs]
    headline = per_prompt(answers[SERVING])
    figures = {}
    for name, of_mode in every.items():
        compared, known = None, decoded.get(name, ())
        if plain is not None and known:
            first = slice(len(known))
            compared = compare(
                batches.weights, serving.target, batches.prompts[first], plain[first], known
            )
        taken = per_prompt(of_mode)
        proposals = modes.get(name, serving).proposals
        figures[name] = ModeFigures(
            proposals=proposals,
            tau=taken.tau,
            interval=tau_interval(taken),
            committed=sum(taken.committed),
            verifications=sum(taken.verifications),
            acceptance=acceptance(of_mode, proposals),
            per_prompt=taken,
            comparison=compared,
            gain=None if name == SERVING else gain(headline, taken),
        )
    return figures
