"""The evaluation's figures follow from the answers; no difference between outputs is hidden."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_models
from tiny import Heard
from toy_models import TARGET, draft_config, models

from domino_jax.base.errors import InputError
from domino_jax.decoding.decoder import Decoder, Weights, make_decoder
from domino_jax.decoding.generate import Answer
from domino_jax.evaluation.counts import in_cycles
from domino_jax.evaluation.evaluate import SetFigures, evaluate, plain_answers
from domino_jax.evaluation.replay import _agreement, _is_finite
from domino_jax.target.decoder import Target

# The last one is padded to another length than the others.
PROMPTS = [*toy_models.PROMPTS[:2], np.arange(70, dtype=np.int32) % 7]
SETTINGS = {"max_new_tokens": 24, "batch_size": 2}
Drafted = tuple[Decoder, Weights]


@pytest.fixture(scope="module")
def domino_draft(target_params: Any) -> Drafted:
    model, weights = models(target_params, draft_config())
    return make_decoder(Target(TARGET), model, stop_ids=(5,)), weights


@pytest.fixture(scope="module")
def dflash_draft(target_params: Any) -> Drafted:
    config = draft_config(head=None, shift_label=False, pure_draft_prefix_len=0)
    model, weights = models(target_params, config)
    return make_decoder(Target(TARGET), model), weights


@pytest.fixture(scope="module")
def heard() -> Heard:
    return Heard()


@pytest.fixture(scope="module")
def decoded(domino_draft: Drafted, heard: Heard) -> SetFigures:
    return evaluate(*domino_draft, PROMPTS, **SETTINGS, timed=2, reporter=heard)


def test_every_way_writes_the_same_text_and_says_what_it_took(
    decoded: SetFigures, heard: Heard
) -> None:
    told = [line.split("  ")[0] for line in heard.lines]
    # Two batches of the target alone, two for each way, then what is timed.
    of_ways = [f"answers {count}/9" for count in (2, 3, 5, 6, 8, 9)]
    assert told == ["answers 2/3", "answers 3/3", *of_ways, "timed 1/2", "timed 2/2"]
    compared, tokens = decoded.comparison, decoded.tokens
    assert compared is not None and compared.lossless and compared.differences == ()
    assert decoded.prompts == 3 and tokens == sum(len(one.tokens) for one in decoded.answers)
    assert compared.tokens_compared == compared.tokens_equal == 3 * tokens
    assert list(decoded.modes) == ["serving", "block", "head_off", "ngram"]
    assert [mode.proposals for mode in decoded.modes.values()] == [3, 4, 3, 3]
    for mode in decoded.modes.values():
        # The first token of an answer costs no verification.
        assert mode.committed == sum(mode.per_prompt.committed) == tokens - 3
        assert mode.tau == pytest.approx(mode.committed / mode.verifications) and mode.tau >= 1
        assert mode.interval is not None and mode.interval[0] <= mode.tau <= mode.interval[1]
    headline = decoded.modes["serving"]
    assert decoded.tau == headline.tau and headline.gain is None
    for name in ("block", "head_off", "ngram"):
        gain = decoded.modes[name].gain
        assert gain is not None
        assert gain.ratio == pytest.approx(headline.tau / decoded.modes[name].tau)
    speed = decoded.speed
    assert speed is not None and speed.prompts == 2
    assert speed.speed_up == pytest.approx(speed.tokens_per_second / speed.tokens_per_second_plain)
    # Otherwise nothing was drafted, or everything.
    assert decoded.tau > 1 and any(len(answer.tokens) < 24 for answer in decoded.answers)


def test_the_record_of_a_set_is_plain_json(decoded: SetFigures) -> None:
    figures = decoded.as_json()
    assert json.loads(json.dumps(figures)).keys() == {"prompts", "tokens", "ways", "speed"}
    of_way = {"proposals", "tau", "interval", "committed", "verifications", "acceptance"}
    compared = {"tokens_compared", "tokens_equal", "differences", "tie", "lossless"}
    assert set(figures["ways"]["serving"]) == {*of_way, "per_prompt", *compared}
    assert set(figures["ways"]["ngram"]) == {*of_way, "per_prompt", "gain"}
    assert set(figures["ways"]["ngram"]["gain"]) == {"ratio", "interval"}


def test_acceptance_does_not_depend_on_the_batch(
    domino_draft: Drafted, decoded: SetFigures
) -> None:
    one_by_one = SETTINGS | {"batch_size": 1}
    figures = evaluate(*domino_draft, PROMPTS, **one_by_one, timed=0).as_json()
    assert figures == {key: of for key, of in decoded.as_json().items() if key != "speed"}


def test_replayed_counts_are_those_of_decoding(domino_draft: Drafted, decoded: SetFigures) -> None:
    heard = Heard()
    known = plain_answers(*domino_draft, PROMPTS, **SETTINGS)
    replayed = {"replay": True, "plain": known, **SETTINGS}
    again = evaluate(*domino_draft, PROMPTS, timed=0, reporter=heard, **replayed)
    assert heard.lines == ["replayed 2/3", "replayed 3/3"]
    assert again.comparison is None and again.tokens == decoded.tokens
    assert list(again.modes) == list(decoded.modes)
    for name, mode in again.modes.items():
        assert mode == replace(decoded.modes[name], comparison=None)
    for one, other in zip(again.answers, decoded.answers, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.drafted, other.drafted)
        assert one.stopped == other.stopped
    timed = evaluate(*domino_draft, PROMPTS, timed=2, **replayed)
    assert timed.comparison == timed.modes["serving"].comparison
    tokens = sum(len(answer.tokens) for answer in decoded.answers[:2])
    assert timed.comparison is not None and timed.comparison.tokens_equal == tokens


def test_answers_of_one_token_leave_a_record_that_can_be_read(domino_draft: Drafted) -> None:
    settings = SETTINGS | {"max_new_tokens": 1}
    figures = evaluate(*domino_draft, PROMPTS, **settings, timed=0).as_json()
    json.dumps(figures, allow_nan=False)
    assert figures["tokens"] == 3 and "gain" not in figures["ways"]["ngram"]


def test_dflash_has_neither_a_head_to_switch_off_nor_another_block(dflash_draft: Drafted) -> None:
    figures = evaluate(*dflash_draft, PROMPTS[:1], max_new_tokens=4, timed=0)
    assert list(figures.modes) == ["serving", "ngram"] and figures.tau >= 1
    assert figures.modes["serving"].interval is None  # of one prompt nothing can be drawn


def test_samples_are_neither_compared_nor_replayed(dflash_draft: Drafted) -> None:
    sampling, weights = replace(dflash_draft[0], temperature=1.0), dflash_draft[1]
    figures = evaluate(sampling, weights, PROMPTS[:1], max_new_tokens=4, timed=0)
    assert figures.comparison is None and list(figures.modes) == ["serving"]
    assert "lossless" not in figures.as_json()["ways"]["serving"]
    with pytest.raises(ValueError, match="cannot be replayed"):
        evaluate(sampling, weights, PROMPTS[:1], max_new_tokens=4, timed=0, replay=True)


def test_a_wrong_verifier_is_noticed(
    dflash_draft: Drafted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verifier that takes whatever is drafted gives a high tau and is not lossless."""

    def take_all(drafted: jax.Array, choices: jax.Array) -> Any:
        return jnp.full(drafted.shape[0], drafted.shape[1], jnp.int32), choices[:, -1]

    monkeypatch.setattr("domino_jax.decoding.speculate.accept_greedy", take_all)
    # A decoder of its own: its programs hold this verifier.
    decoder, weights = replace(dflash_draft[0], stop_ids=(99,)), dflash_draft[1]
    compared = evaluate(decoder, weights, PROMPTS[:1], max_new_tokens=10, timed=0).comparison
    assert compared is not None and not compared.lossless
    assert compared.tokens_equal < compared.tokens_compared


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("part", ["layers_0", "head"])
def test_a_draft_that_is_not_finite_has_no_figures(
    domino_draft: Drafted, replay: bool, part: str
) -> None:
    decoder, weights = domino_draft
    nan = jax.tree.map(lambda leaf: leaf * np.nan, weights.draft[part])
    bad = weights._replace(draft={**weights.draft, part: nan})
    with pytest.raises(InputError, match=r"^the draft's logits are not finite in . of 2 answers"):
        evaluate(decoder, bad, PROMPTS, **SETTINGS, timed=0, replay=replay)


@pytest.mark.parametrize(
    ("kept", "bad", "finite"),
    [
        # One kept, the second refused, then the target's own; the next cycle is behind that.
        ([1, 0, 0, 0, 0], [], True),
        ([1, 0, 0, 0, 0], [0], False),
        ([1, 0, 0, 0, 0], [1], True),  # within a cycle: nothing was drafted there
        ([1, 0, 0, 0, 0], [2], False),
        ([2, 0, 0, 0, 0], [0], True),  # as many as were proposed: none decided against them
        ([0, 0, 0, 0, 0], [4], False),
        ([0, 0, 0, 0, 0], [5], True),  # behind the last token nothing is drafted
        ([0, 0, 0, 0, 1], [4], True),  # kept up to the end, and the next is not of the answer
    ],
)
def test_replay_asks_only_what_decoding_uses(kept: list[int], bad: list[int], finite: bool) -> None:
    tokens = np.arange(6, dtype=np.int32)
    greedy = Answer(tokens, np.zeros(6, bool), False, 0, 0, 0.0)
    counts = np.array([*kept, 0])
    answer = in_cycles(greedy, np.minimum(counts, 2))
    are_finite = np.array([index not in bad for index in range(6)])
    assert _is_finite(answer, counts, are_finite, proposals=2) is finite


def test_a_prediction_that_is_not_finite_agrees_with_no_text() -> None:
    """Token 0 is what an argmax makes of NaN."""
    sure = jax.nn.one_hot(jnp.array([[[0, 0, 3]]]), 7)
    text = jnp.array([[[5, 0, 0, 3]]])
    found = [
        _agreement(sure if bad is None else sure.at[0, 0, bad].set(jnp.nan), text)
        for bad in (None, 0, 1, 2)
    ]
    assert [int(one.kept[0, 0]) for one in found] == [3, 0, 1, 2]
    assert [bool(one.finite[0, 0]) for one in found] == [True, False, False, False]
