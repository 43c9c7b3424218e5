"""Greedy speculative decoding on a device writes the plain target's own tokens there."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import target_config
from toy_models import PROMPTS, draft_config, models, sharp

from domino_jax.config.heads import DominoHeadConfig
from domino_jax.decoding.decoder import Weights, make_decoder
from domino_jax.decoding.generate import generate
from domino_jax.decoding.speculate import required_cache_len
from domino_jax.target.decoder import Target

pytestmark = pytest.mark.accelerator

# So few words that a random draft is right now and then, in layers of real widths.
DRAFT = draft_config(
    hidden_size=128,
    intermediate_size=256,
    head_dim=64,
    head=DominoHeadConfig(emb_dim=32, gru_hidden_dim=64),
)
TARGET = Target(target_config(DRAFT))
COUNT = 40


@pytest.mark.parametrize("use_head", [True, False], ids=["head", "no head"])
def test_greedy_tokens_are_the_targets_own(use_head: bool) -> None:
    variables = TARGET.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    draft, weights = models(sharp(nn.meta.unbox(variables)["params"], 20.0), DRAFT)
    speculative = make_decoder(TARGET, draft, use_head=use_head)
    cache_len = required_cache_len(speculative, max(map(len, PROMPTS)), COUNT)
    # In full float32, as the command decodes: in fewer bits words may tie in one program alone.
    with jax.default_matmul_precision("highest"):
        ours = generate(speculative, weights, PROMPTS, max_new_tokens=COUNT, cache_len=cache_len)
        alone, target = make_decoder(TARGET), Weights(weights.target)
        plain = generate(alone, target, PROMPTS, max_new_tokens=COUNT, cache_len=cache_len)
    written = np.concatenate([answer.tokens for answer in plain])
    assert written.size == len(PROMPTS) * COUNT
    assert len(set(written.tolist())) > 3, "too dull to show a difference"
    for found, expected in zip(ours, plain, strict=True):
        np.testing.assert_array_equal(found.tokens, expected.tokens)
    committed = sum(answer.committed for answer in ours)
    verifications = sum(answer.verifications for answer in ours)
    assert committed > verifications, "nothing was ever accepted"
