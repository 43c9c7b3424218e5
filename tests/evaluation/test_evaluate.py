"""The evaluation's figures follow from the answers; no difference between outputs is hidden."""

import json
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import draft_config, target_config
from tiny import Heard

from domino_jax.decoding.decoder import Weights, make_decoder
from domino_jax.draft.backbone import DraftModel
from domino_jax.draft.build import init_variables
from domino_jax.evaluation.evaluate import evaluate, plain_answers
from domino_jax.target.decoder import Target

CONFIG = draft_config(num_target_layers=4, target_layer_ids=(0, 2))
TARGET = Target(target_config(CONFIG))
PROMPTS = [np.arange(1, 1 + count, dtype=np.int32) for count in (3, 5, 70)]


@pytest.fixture(scope="module")
def weights() -> Weights:
    target = nn.meta.unbox(TARGET.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
    draft = nn.meta.unbox(init_variables(DraftModel(CONFIG), jax.random.key(1)))["params"]
    return Weights(jax.tree.map(lambda x: x * 10 if x.ndim == 2 else x, target), draft)


def test_every_way_writes_the_same_text_and_says_what_it_took(weights: Weights) -> None:
    heard = Heard()
    decoder = make_decoder(TARGET, DraftModel(CONFIG))
    figures = evaluate(
        decoder, weights, PROMPTS, max_new_tokens=10, batch_size=2, timed=1, reporter=heard
    )
    told = [line.split("  ")[0] for line in heard.lines]
    # Two batches of the target alone, two for each way, then what is timed.
    of_ways = [f"answers {count}/9" for count in (2, 3, 5, 6, 8, 9)]
    assert told == ["answers 2/3", "answers 3/3", *of_ways, "timed 1/1"]
    compared = figures.comparison
    assert compared is not None and compared.lossless and compared.differences == ()
    assert figures.prompts == 3 and figures.tokens == 30
    assert compared.tokens_compared == compared.tokens_equal == 3 * 30
    assert list(figures.modes) == ["serving", "block", "head_off", "ngram"]
    assert [mode.proposals for mode in figures.modes.values()] == [4, 5, 4, 4]
    for mode in figures.modes.values():
        # The first token of an answer costs no verification.
        assert mode.committed == sum(mode.per_prompt.committed) == 27
        assert mode.tau == pytest.approx(27 / mode.verifications) and mode.tau >= 1
        assert mode.interval is not None and mode.interval[0] <= mode.tau <= mode.interval[1]
    headline = figures.modes["serving"]
    assert figures.tau == headline.tau and headline.gain is None
    for name in ("block", "head_off", "ngram"):
        gain = figures.modes[name].gain
        assert gain is not None
        assert gain.ratio == pytest.approx(headline.tau / figures.modes[name].tau)
    speed = figures.speed
    assert speed is not None and speed.prompts == 1
    assert speed.speed_up == pytest.approx(speed.tokens_per_second / speed.tokens_per_second_plain)


def test_acceptance_does_not_depend_on_the_batch(weights: Weights) -> None:
    decoder = make_decoder(TARGET, DraftModel(CONFIG))
    one, all_at_once = (
        evaluate(decoder, weights, PROMPTS, max_new_tokens=10, batch_size=size, timed=0)
        for size in (1, 8)
    )
    assert one.as_json() == all_at_once.as_json()
    assert "speed" not in one.as_json()


def test_replayed_counts_are_those_of_decoding(weights: Weights) -> None:
    decoder = make_decoder(TARGET, DraftModel(CONFIG), stop_ids=(7, 11))
    settings = {"max_new_tokens": 24, "batch_size": 2, "timed": 0}
    decoded = evaluate(decoder, weights, PROMPTS, **settings)
    heard = Heard()
    known = plain_answers(decoder, weights, PROMPTS, max_new_tokens=24)
    again = evaluate(
        decoder, weights, PROMPTS, replay=True, plain=known, reporter=heard, **settings
    )
    assert heard.lines == ["replayed 2/3", "replayed 3/3"]
    assert again.comparison is None and again.tokens == decoded.tokens
    assert list(again.modes) == list(decoded.modes)
    for name, mode in again.modes.items():
        assert mode == replace(decoded.modes[name], comparison=None)
    for one, other in zip(again.answers, decoded.answers, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.drafted, other.drafted)
        assert one.stopped == other.stopped
    timed = evaluate(decoder, weights, PROMPTS, replay=True, **settings | {"timed": 2})
    assert timed.comparison == timed.modes["serving"].comparison
    tokens = sum(len(answer.tokens) for answer in decoded.answers[:2])
    assert timed.comparison is not None and timed.comparison.tokens_equal == tokens
    # Otherwise nothing was drafted, or everything.
    assert decoded.tau > 1 and any(len(answer.tokens) < 24 for answer in decoded.answers)


def test_drawn_tokens_are_not_replayed(weights: Weights) -> None:
    decoder = make_decoder(TARGET, DraftModel(CONFIG), temperature=1.0)
    with pytest.raises(ValueError, match="cannot be replayed"):
        evaluate(decoder, weights, PROMPTS[:1], max_new_tokens=4, timed=0, replay=True)


def test_the_record_of_a_set_is_plain_json(weights: Weights) -> None:
    decoder = make_decoder(TARGET, DraftModel(CONFIG))
    figures = evaluate(decoder, weights, PROMPTS[:2], max_new_tokens=6, timed=1).as_json()
    assert json.loads(json.dumps(figures)).keys() == {"prompts", "tokens", "ways", "speed"}
    of_way = {"proposals", "tau", "interval", "committed", "verifications", "acceptance"}
    compared = {"tokens_compared", "tokens_equal", "differences", "tie", "lossless"}
    assert set(figures["ways"]["serving"]) == {*of_way, "per_prompt", *compared}
    assert set(figures["ways"]["ngram"]) == {*of_way, "per_prompt", "gain"}
    assert set(figures["ways"]["ngram"]["gain"]) == {"ratio", "interval"}


def test_dflash_has_neither_a_head_to_switch_off_nor_another_block(weights: Weights) -> None:
    config = replace(CONFIG, head=None, shift_label=False, pure_draft_prefix_len=0)
    draft = nn.meta.unbox(init_variables(DraftModel(config), jax.random.key(1)))["params"]
    decoder = make_decoder(TARGET, DraftModel(config))
    figures = evaluate(
        decoder, weights._replace(draft=draft), PROMPTS[:1], max_new_tokens=4, timed=0
    )
    assert list(figures.modes) == ["serving", "ngram"] and figures.tau >= 1
    assert figures.modes["serving"].interval is None  # of one prompt nothing can be drawn


def test_answers_of_one_token_leave_a_record_that_can_be_read(weights: Weights) -> None:
    decoder = make_decoder(TARGET, DraftModel(CONFIG))
    figures = evaluate(decoder, weights, PROMPTS, max_new_tokens=1, timed=0).as_json()
    json.dumps(figures, allow_nan=False)
    assert figures["tokens"] == 3 and "gain" not in figures["ways"]["ngram"]


def test_samples_are_not_compared(weights: Weights) -> None:
    decoder = make_decoder(TARGET, DraftModel(CONFIG), temperature=1.0)
    figures = evaluate(decoder, weights, PROMPTS[:1], max_new_tokens=4, timed=0)
    assert figures.comparison is None and "ngram" not in figures.modes
    assert "lossless" not in figures.as_json()["ways"]["serving"]


def test_a_wrong_verifier_is_noticed(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verifier that takes whatever is drafted gives a high tau and is not lossless."""

    def take_all(drafted: jax.Array, choices: jax.Array) -> Any:
        return jnp.full(drafted.shape[0], drafted.shape[1], jnp.int32), choices[:, -1]

    monkeypatch.setattr("domino_jax.decoding.speculate.accept_greedy", take_all)
    jax.clear_caches()
    figures = evaluate(
        make_decoder(TARGET, DraftModel(CONFIG)), weights, PROMPTS, max_new_tokens=10, timed=0
    )
    jax.clear_caches()
    compared = figures.comparison
    assert compared is not None and not compared.lossless
    assert compared.tokens_equal < compared.tokens_compared
