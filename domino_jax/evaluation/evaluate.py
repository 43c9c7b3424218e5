"""A long acceptance length says nothing where the output has changed: both are measured together.

Nor does one of another day, or another set. So what a drafter gains on a set of prompts is measured
in one run; acceptance in batches, which is quick, and time one prompt after the other, which is how
a user waits:

    prompts -> plain, the target alone      -.   every token of the others is held against it
            -> serving, K - 1 proposals      |
            -> block, all that it predicts   +-> tau, intervals, acceptance by position, gains
            -> head_off, if Domino           |
            -> ngram, copied from the text  -'
    some    -> plain and serving in turns, batch 1 -> tokens/s

Where drafts are replayed on the target's own answers, what is timed is all that is decoded, and so
all that can be held against them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from domino_jax.base.progress import STDERR, Reporter
from domino_jax.decoding.decoder import Decoder, Weights, alone, number_of_proposals
from domino_jax.decoding.generate import Answer, generate
from domino_jax.decoding.speculate import required_cache_len
from domino_jax.evaluation import counts
from domino_jax.evaluation.bootstrap import Gain, PerPrompt, gain, tau_interval
from domino_jax.evaluation.compare import Comparison, compare
from domino_jax.evaluation.counts import Acceptance
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
        tau: tokens committed per verification, the target's own included; the first token of an
            answer costs none and is not counted.
        interval: of tau, 95 % over prompts; None for one prompt.
        committed: tokens that were counted.
        verifications: blocks that the target verified.
        acceptance: by position.
        per_prompt: of each prompt.
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
        prompts: how many there are.
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
    longest = max(map(len, prompts))
    # One number for all ways, and for sets of like lengths: any other would be another program to
    # compile. Programs are warmed up by answers of two tokens.
    cache_len = max(
        required_cache_len(mode, longest, max(max_new_tokens, 2)) for mode in modes.values()
    )
    cache_len = _power_of_two(cache_len)
    settings = _Batches(batch_size, max_new_tokens, cache_len, seed)
    if decoder.temperature > 0:
        if replay:
            raise ValueError("drawn tokens cannot be replayed: replay is for temperature 0")
        plain = None  # drawn tokens have nothing to be held against
    elif plain is None:
        answered = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        plain = plain_answers(decoder, weights, prompts, **answered, reporter=reporter)
    answers = _answers_of(
        modes, weights, prompts, plain if replay else None, settings=settings, reporter=reporter
    )
    speed, timed_answers = measured_speed(
        modes[SERVING],
        weights,
        prompts[:timed],
        max_new_tokens=max_new_tokens,
        cache_len=cache_len,
        seed=seed,
        reporter=reporter,
    )
    decoded = {SERVING: timed_answers} if replay else answers
    figures = _of_modes(modes, weights, prompts, answers, plain, decoded=decoded)
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
    cache_len = _power_of_two(required_cache_len(plain, max(map(len, prompts)), max_new_tokens))
    with reporter.bar("answers", total=len(prompts)) as bar:
        return _in_batches(
            plain,
            weights=weights,
            prompts=prompts,
            settings=_Batches(batch_size, max_new_tokens, cache_len, 0),
            tell=functools.partial(_tell, bar.tell, "plain", 0),
        )


@dataclass(frozen=True)
class _Batches:
    """How prompts are decoded; what is compiled depends on the first three."""

    size: int
    max_new_tokens: int
    cache_len: int
    seed: int


def _power_of_two(number: int) -> int:
    """The least one that is not below a number."""
    return 1 << (number - 1).bit_length()


def _tell(tell: Callable[[int, str], None], name: str, before: int, done: int) -> None:
    tell(before + done, name)


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


def _answers_of(
    modes: Mapping[str, Decoder],
    weights: Weights,
    prompts: Sequence[np.ndarray],
    known: Sequence[Answer] | None,
    *,
    settings: _Batches,
    reporter: Reporter,
) -> dict[str, list[Answer]]:
    """The answers of each way: those that are known, replayed, or decoded."""
    if known is not None:
        return _replayed(modes, weights, prompts, known, settings=settings, reporter=reporter)
    answers = {}
    with reporter.bar("answers", total=len(modes) * len(prompts)) as bar:
        for done, (name, mode) in enumerate(modes.items()):
            tell = functools.partial(_tell, bar.tell, name, done * len(prompts))
            answers[name] = _in_batches(
                mode, weights=weights, prompts=prompts, settings=settings, tell=tell
            )
    return answers


def _replayed(
    modes: Mapping[str, Decoder],
    weights: Weights,
    prompts: Sequence[np.ndarray],
    plain: Sequence[Answer],
    *,
    settings: _Batches,
    reporter: Reporter,
) -> dict[str, list[Answer]]:
    """The target's own answers as each way would have written them."""
    texts = [len(prompt) + len(one.tokens) for prompt, one in zip(prompts, plain, strict=True)]
    order = sorted(range(len(prompts)), key=texts.__getitem__)
    size = min(settings.size, len(prompts))
    answers: dict[str, dict[int, Answer]] = {name: {} for name in modes}
    with reporter.bar("replayed", total=len(prompts)) as bar:
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            # Short of prompts, the last batch repeats one: another size is another program.
            filled = [*batch, *[batch[-1]] * (size - len(batch))]
            written = replayed(
                modes,
                weights,
                [prompts[index] for index in filled],
                [plain[index] for index in filled],
                cache_len=settings.cache_len,
                max_new_tokens=settings.max_new_tokens,
            )
            for name, of_batch in written.items():
                answers[name] |= dict(zip(batch, of_batch, strict=False))
            bar.tell(first + len(batch))
    return {name: [of[index] for index in range(len(prompts))] for name, of in answers.items()}


def _in_batches(
    decoder: Decoder,
    *,
    weights: Weights,
    prompts: Sequence[np.ndarray],
    settings: _Batches,
    tell: Callable[[int], None],
) -> list[Answer]:
    """The answers to all prompts, in their order."""
    # Like lengths share their padding, so that few lengths are compiled.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    size = min(settings.size, len(prompts))
    answers: dict[int, Answer] = {}
    for first in range(0, len(order), size):
        batch = order[first : first + size]
        found = generate(
            decoder,
            weights,
            [prompts[index] for index in batch],
            max_new_tokens=settings.max_new_tokens,
            size=size,
            cache_len=settings.cache_len,
            seed=settings.seed + first,
        )
        answers |= dict(zip(batch, found, strict=True))
        tell(len(answers))
    return [answers[index] for index in range(len(prompts))]


def _of_modes(
    modes: Mapping[str, Decoder],
    weights: Weights,
    prompts: Sequence[np.ndarray],
    answers: Mapping[str, Sequence[Answer]],
    plain: Sequence[Answer] | None,
    *,
    decoded: Mapping[str, Sequence[Answer]],
) -> dict[str, ModeFigures]:
    """The figures of each way, and of the floor where the target's own answers are known.

    `decoded` are the answers, to the first prompts, that the target itself stood for.
    """
    target = modes[SERVING].target
    headline = _per_prompt(answers[SERVING])
    figures = {}
    for name, mode in modes.items():
        compared = None
        if plain is not None and decoded.get(name):
            count = len(decoded[name])
            compared = compare(weights, target, prompts[:count], plain[:count], decoded[name])
        figures[name] = _figures(
            answers[name], mode.proposals, headline, name=name, comparison=compared
        )
    if plain is not None:
        # As many proposals as the headline has: both cost the target the same block.
        proposals = modes[SERVING].proposals
        copied = [
            look_up(prompt, answer, proposals=proposals)
            for prompt, answer in zip(prompts, plain, strict=True)
        ]
        figures[NGRAM] = _figures(copied, proposals, headline, name=NGRAM, comparison=None)
    return figures


def _per_prompt(answers: Sequence[Answer]) -> PerPrompt:
    return PerPrompt(
        tuple(answer.committed for answer in answers),
        tuple(answer.verifications for answer in answers),
    )


def _figures(
    answers: Sequence[Answer],
    proposals: int,
    headline: PerPrompt,
    *,
    name: str,
    comparison: Comparison | None,
) -> ModeFigures:
    per_prompt = _per_prompt(answers)
    return ModeFigures(
        proposals=proposals,
        tau=counts.tau(answers),
        interval=tau_interval(per_prompt),
        committed=sum(per_prompt.committed),
        verifications=counts.verifications(answers),
        acceptance=counts.acceptance(answers, proposals),
        per_prompt=per_prompt,
        comparison=comparison,
        gain=None if name == SERVING else gain(headline, per_prompt),
    )
