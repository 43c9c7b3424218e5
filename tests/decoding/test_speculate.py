"""The speculative loop: greedy output is the target's own, whatever is drafted."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doubles import slow_after
from tiny import stack_layers
from toy_models import PROMPTS, TARGET, answers, draft_config, models

from domino_jax.decoding.acceptance import accept_greedy
from domino_jax.decoding.decoder import Weights, make_decoder, number_of_proposals
from domino_jax.decoding.speculate import _draft, finish, required_cache_len, start, stream
from domino_jax.draft.backbone import DraftModel, output_logits
from domino_jax.draft.mask import layer_spans
from domino_jax.kernels.matmul import vocabulary_logits
from domino_jax.target.decoder import Target, lm_head_weight


def greedy_by_whole_passes(target_params: Any, prompt: np.ndarray, count: int) -> list[int]:
    """The slow reference: the whole sequence again for every token, no cache."""
    tokens = np.zeros(40, np.int32)  # a causal pass does not see what lies behind
    tokens[: len(prompt)] = prompt
    for index in range(len(prompt), len(prompt) + count):
        tokens[index] = int(whole_pass(target_params, tokens)[index - 1])
    return tokens[len(prompt) : len(prompt) + count].tolist()


@jax.jit
def whole_pass(target_params: Any, tokens: jax.Array) -> jax.Array:
    hidden = Target(TARGET).apply({"params": target_params}, tokens[None]).hidden
    return jnp.argmax(vocabulary_logits(hidden[0], lm_head_weight(target_params)), axis=-1)


@pytest.mark.parametrize(
    "prompts", [PROMPTS[:1], PROMPTS], ids=["one row", "rows of different lengths"]
)
@pytest.mark.parametrize(
    ("changes", "mode", "use_head"),
    [
        ({}, "block", True),
        ({}, "serving", True),
        ({}, "block", False),
        ({"shift_label": False, "pure_draft_prefix_len": 0}, "block", True),
        ({"head": None, "shift_label": False, "pure_draft_prefix_len": 0}, "block", True),
        pytest.param({"head": None}, "block", True, marks=pytest.mark.slow),
        pytest.param({"head": None}, "serving", True, marks=pytest.mark.slow),
    ],
    ids=[
        "shift",
        "serving",
        "head off",
        "no shift",
        "dflash",
        "dflash shift",
        "dflash shift serving",
    ],
)
def test_greedy_output_is_the_target_s_own(
    target_params: Any,
    prompts: list[np.ndarray],
    changes: dict[str, Any],
    mode: str,
    use_head: bool,
) -> None:
    draft, weights = models(target_params, draft_config(**changes))
    decoder = make_decoder(Target(TARGET), draft, proposals=mode, use_head=use_head)
    state = answers(decoder, weights, prompts, 20)
    for row, prompt in enumerate(prompts):
        written = np.asarray(state.tokens[row, len(prompt) : int(state.lengths[row])])
        assert written.tolist() == greedy_by_whole_passes(target_params, prompt, 20)
        # One token came from the prompt's pass; the rest cost at most one verification each.
        assert int(state.committed[row]) == 19
        assert 19 / (decoder.proposals + 1) <= int(state.verifications[row]) <= 19
    assert int(jnp.sum(state.verifications)) < int(jnp.sum(state.committed)), (
        "nothing was ever accepted"
    )


SLIDING, FULL = "sliding_attention", "full_attention"


DRAFTS = {
    "domino": {},
    "unshifted": {"shift_label": False, "pure_draft_prefix_len": 0},
    "windows": {
        "num_hidden_layers": 3,
        "layer_types": (SLIDING, FULL, SLIDING),
        "sliding_window": 5,
    },
    "windows causal in the block": {
        "num_hidden_layers": 2,
        "layer_types": (FULL, SLIDING),
        "sliding_window": 4,
        "sliding_in_block": "causal",
    },
    "transforms": {
        "input_embedding_scale": 3.0,
        "output_multiplier": 0.5,
        "final_logit_softcapping": 2.0,
    },
    "own heads": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 4},
    "dflash": {"head": None, "shift_label": False, "pure_draft_prefix_len": 0},
    "dflash shifted": {"head": None},
    "last target layer": {"target_layer_ids": (0, 3)},
}


@pytest.mark.pitfall(
    "trained at 98 %, served at 10 %: drafting differs from training",
    seen="decoding/speculate.py: block positions one later",
)
@pytest.mark.parametrize("changes", slow_after(5, DRAFTS.values()), ids=DRAFTS)
def test_a_cycle_drafts_what_training_would_predict(
    target_params: Any, changes: dict[str, Any]
) -> None:
    """The forward that the loss trains, teacher-forced on the drafted tokens, ranks them first."""
    config = draft_config(**changes)
    model, weights = models(target_params, config)
    decoder = make_decoder(Target(TARGET), model)
    prompts = [np.array([1, 5, 2, 2, 4, 0, 3, 1, 5, 3, 3]), np.array([2, 4, 4])]
    state = start(
        decoder, weights, prompts, max_new_tokens=8, cache_len=required_cache_len(decoder, 11, 8)
    )
    anchors = np.asarray(state.lengths) - 1
    bonus = np.take_along_axis(np.asarray(state.tokens), anchors[:, None], axis=1)
    drafted, _ = jax.jit(_draft, static_argnums=0)(
        decoder, weights, state, jnp.asarray(bonus[:, 0]), jax.random.key(0)
    )

    length = 12
    context = decoder.target.apply({"params": target_params}, state.tokens[:, :length]).features
    places, used = jnp.asarray(anchors[:, None]), jnp.ones((2, 1), bool)
    embedding = target_params["embed_tokens"]
    noise = np.where(np.arange(config.block_size) == 0, bonus, config.mask_token_id)
    bound = model.bind({"params": weights.draft})
    hidden = bound(
        context,
        jnp.broadcast_to(jnp.arange(length), (2, length)),
        embedding[noise][:, None],
        places[..., None] + jnp.arange(config.block_size),
        layer_spans(config, places, used),
    )
    hidden = bound.prediction_states(hidden)
    logits = output_logits(config, vocabulary_logits(hidden, lm_head_weight(target_params)))
    if config.projector_type:
        previous = np.concatenate([bonus, np.asarray(drafted)[:, :-1]], axis=1)
        logits += vocabulary_logits(
            bound.corrections(hidden, embedding[previous][:, None]), bound.head.expansion
        )
    assert np.asarray(drafted).tolist() == np.argmax(logits, axis=-1)[:, 0].tolist()


def test_a_scanned_target_decodes_the_same_tokens(target_params: Any) -> None:
    """As training does, which holds the target's layers stacked."""
    model, weights = models(target_params, draft_config())
    outputs = []
    for scan, held in (
        (False, weights),
        (True, weights._replace(target=stack_layers(target_params))),
    ):
        decoder = make_decoder(Target(TARGET, scan_layers=scan), model)
        state = start(decoder, held, PROMPTS, max_new_tokens=12, cache_len=100)
        outputs.append(finish(decoder, held, state))
    np.testing.assert_array_equal(outputs[0].tokens, outputs[1].tokens)
    np.testing.assert_array_equal(outputs[0].verifications, outputs[1].verifications)


def test_plain_decoding_is_the_loop_without_proposals(target_params: Any) -> None:
    decoder = make_decoder(Target(TARGET))
    state = answers(decoder, Weights(target_params), PROMPTS, 12)
    assert decoder.proposals == 0
    for row, prompt in enumerate(PROMPTS):
        written = np.asarray(state.tokens[row, len(prompt) : int(state.lengths[row])])
        assert written.tolist() == greedy_by_whole_passes(target_params, prompt, 12)
        assert int(state.verifications[row]) == 11


def test_a_stop_token_ends_its_row_where_it_stands(target_params: Any) -> None:
    draft, weights = models(target_params, draft_config())
    whole = [greedy_by_whole_passes(target_params, prompt, 20) for prompt in PROMPTS]
    stop = whole[0][6]
    decoder = make_decoder(Target(TARGET), draft, stop_ids=(stop,))
    state = answers(decoder, weights, PROMPTS, 20)
    for row, prompt in enumerate(PROMPTS):
        expected = whole[row][: whole[row].index(stop) + 1] if stop in whole[row] else whole[row]
        assert (
            np.asarray(state.tokens[row, len(prompt) : int(state.lengths[row])]).tolist()
            == expected
        )


def test_streaming_gives_growing_prefixes_of_the_same_output(target_params: Any) -> None:
    draft, weights = models(target_params, draft_config())
    decoder = make_decoder(Target(TARGET), draft)
    cache_len = required_cache_len(decoder, 3, 20)
    first = start(decoder, weights, PROMPTS[:1], max_new_tokens=20, cache_len=cache_len)
    pieces = [
        np.asarray(state.tokens[0, 3 : int(state.lengths[0])]).tolist()
        for state in stream(decoder, weights, first, cycles=2)
    ]
    whole = greedy_by_whole_passes(target_params, PROMPTS[0], 20)
    assert len(pieces) > 2 and pieces[-1] == whole
    assert all(piece == whole[: len(piece)] for piece in pieces)


def test_accept_greedy_keeps_the_longest_matching_prefix() -> None:
    drafted = jnp.array([[1, 2, 3], [1, 9, 3], [9, 2, 3]])
    choices = jnp.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    accepted, following = accept_greedy(drafted, choices)
    assert accepted.tolist() == [3, 1, 0] and following.tolist() == [4, 2, 1]


def test_number_of_proposals_and_bad_combinations() -> None:
    assert number_of_proposals(draft_config(), "block") == 4
    assert number_of_proposals(draft_config(), "serving") == 3
    assert number_of_proposals(draft_config(shift_label=False), "block") == 3
    assert number_of_proposals(draft_config(head=None), "block") == 4
    with pytest.raises(ValueError, match="'block' or 'serving'"):
        number_of_proposals(draft_config(), "all")
    with pytest.raises(ValueError, match="draft's vocab_size is 9, the target's 7"):
        make_decoder(Target(TARGET), DraftModel(draft_config(vocab_size=9)))
    with pytest.raises(ValueError, match="target of 5 layers, this one has 4"):
        make_decoder(Target(TARGET), DraftModel(draft_config(num_target_layers=5)))


def test_start_refuses_what_does_not_fit(target_params: Any) -> None:
    decoder, weights = make_decoder(Target(TARGET)), Weights(target_params)
    with pytest.raises(ValueError, match="slots"):
        start(decoder, weights, PROMPTS, max_new_tokens=80, cache_len=70)
    with pytest.raises(ValueError, match="without tokens"):
        start(decoder, weights, [np.array([], np.int32)], max_new_tokens=2, cache_len=100)


def test_a_stale_cache_is_never_read(target_params: Any) -> None:
    """Rewinding only moves a length: garbage from the last committed position on has no effect."""
    draft, weights = models(target_params, draft_config())
    decoder = make_decoder(Target(TARGET), draft)
    cache_len = required_cache_len(decoder, 7, 20)
    state = start(decoder, weights, PROMPTS, max_new_tokens=20, cache_len=cache_len)

    def spoil(cache: jax.Array) -> jax.Array:
        stale = jnp.arange(cache_len) >= (state.lengths - 1)[:, None]
        return jnp.where(stale[:, None, :, None], 1e3, cache)

    spoiled = replace_caches(state, spoil)
    expected = np.asarray(finish(decoder, weights, state).tokens)
    found = finish(decoder, weights, spoiled)
    for row, prompt in enumerate(PROMPTS):
        assert np.array_equal(
            np.asarray(found.tokens)[row, : len(prompt) + 20], expected[row, : len(prompt) + 20]
        )


def replace_caches(state: Any, change: Any) -> Any:
    caches = jax.tree.map(change, (state.target_cache, state.draft_cache))
    copy = jax.tree.map(jnp.copy, state)  # the original is consumed by the loop
    return copy._replace(target_cache=caches[0], draft_cache=caches[1])


def test_decoder_is_a_compile_time_constant(target_params: Any) -> None:
    draft, _ = models(target_params, draft_config())
    decoder = make_decoder(Target(TARGET), draft, stop_ids=[3])
    assert hash(decoder) == hash(
        make_decoder(Target(TARGET), DraftModel(draft_config()), stop_ids=[3])
    )
    assert replace(decoder, use_head=False) != decoder
