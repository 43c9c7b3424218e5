"""Plain DFlash decoding here, in NeMo and in z-lab's package: same tokens, same verifications.

Every program verifies at the same positions, not only as often. Two differences are exact and
known:

- NeMo's loop asks whether the last committed token lies beyond the limit, so it verifies once more
  when a cycle ends exactly on the limit.
- z-lab shortens a block that would reach past the limit, and a shorter block has fewer mask tokens
  to look at. With K - 1 tokens more to write, every block that begins before our limit is a whole
  one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
import torch
from dflash import DFlashDraftModel
from nemo_automodel.components.speculative.dflash.draft_qwen3 import Qwen3DFlashDraftModel
from tiny import MASK_TOKEN_ID, write_target
from transformers import AutoModelForCausalLM, DynamicCache

from domino_jax.config.draft import DraftRecipe, make_draft_config
from domino_jax.data.prompt import encode_prompt
from domino_jax.decoding.decoder import Decoder, Weights, make_decoder
from domino_jax.decoding.generate import generate
from domino_jax.decoding.speculate import required_cache_len, start, stream
from domino_jax.draft.backbone import DraftModel
from domino_jax.draft.build import init_variables
from domino_jax.interop.hf import load_hf_draft, save_hf_draft
from domino_jax.objective.modules import build_trainer
from domino_jax.target.decoder import Target, lm_head_weight
from domino_jax.target.load import load_target, load_tokenizer
from domino_jax.training.start import draft_from_target

NEW_TOKENS = 64
BLOCK_SIZE = 4
PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Name the planets of the solar system in order.",
    "Write a short poem about rain.",
    "What is the greatest common divisor of 40 and 74?",
    "Give me a recipe for pancakes.",
)


class Decoded(NamedTuple):
    """One answer, int32 [n], and the position of the first token of every verified block."""

    tokens: np.ndarray
    begins: list[int]


class Here(NamedTuple):
    """What decodes in this project."""

    decoder: Decoder
    weights: Weights
    cache_len: int

    def decode(self, prompt: np.ndarray, *, new_tokens: int) -> Decoded:
        """Decodes K tokens past the limit too, cycle by cycle, to see where each cycle begins."""
        further = new_tokens + BLOCK_SIZE
        state = start(
            self.decoder, self.weights, [prompt], max_new_tokens=further, cache_len=self.cache_len
        )
        states = stream(self.decoder, self.weights, state, cycles=1)
        begins = [int(np.asarray(state.lengths)[0]) - 1 for state in states][:-1]
        (answer,) = generate(
            self.decoder,
            self.weights,
            [prompt],
            max_new_tokens=new_tokens,
            cache_len=self.cache_len,
        )
        # The last token of the answer begins no block: nothing is left to write.
        last = len(prompt) + new_tokens - 1
        assert answer.verifications == len([begin for begin in begins if begin < last])
        return Decoded(answer.tokens, begins)


def theirs(draft: Any, target: Any, prompt: np.ndarray, *, new_tokens: int) -> Decoded:
    """A PyTorch draft's own `spec_generate`, its target's passes counted by where they begin."""
    begins: list[int] = []
    hook = target.register_forward_pre_hook(
        lambda _, args, options: begins.append(int(options["position_ids"][0, 0])), with_kwargs=True
    )
    with torch.inference_mode():
        written = draft.spec_generate(
            target=target,
            input_ids=torch.tensor(prompt.astype(np.int64))[None],
            max_new_tokens=new_tokens,
            stop_token_ids=None,
            temperature=0.0,
        )
    hook.remove()
    assert begins[0] == 0  # the prompt
    return Decoded(written[0, len(prompt) :].numpy(), begins[1:])


class Seen(NamedTuple):
    """What one or several prompts took; `more_in_nemo` counts its verifications beyond ours."""

    tokens: int
    verifications: int
    more_in_nemo: int


def compare(
    here: Here, nemo: Any, zlab: Any, target: Any, prompt: np.ndarray, *, new_tokens: int
) -> Seen:
    """Holds all three against each other on one prompt."""
    limit = len(prompt) + new_tokens
    tokens, begins = here.decode(prompt, new_tokens=new_tokens)
    in_nemo = theirs(nemo, target, prompt, new_tokens=new_tokens)
    in_zlab = theirs(zlab, target, prompt, new_tokens=new_tokens + BLOCK_SIZE - 1)
    assert len(tokens) == new_tokens
    np.testing.assert_array_equal(in_nemo.tokens, tokens)
    np.testing.assert_array_equal(in_zlab.tokens[:new_tokens], tokens)
    verified = [begin for begin in begins if begin < limit - 1]
    assert in_nemo.begins == [begin for begin in begins if begin < limit]
    assert [begin for begin in in_zlab.begins if begin < limit - 1] == verified
    return Seen(len(tokens), len(verified), len(in_nemo.begins) - len(verified))


def compare_all(
    draft: Path, target: Path, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> Seen:
    """All prompts, and the first one again with a limit that a cycle ends on exactly."""
    config, params = load_hf_draft(draft)
    loaded = load_target(target, dtype="float32")
    decoder = make_decoder(Target(loaded.config), DraftModel(config))
    cache_len = required_cache_len(decoder, max(map(len, prompts)), NEW_TOKENS + BLOCK_SIZE)
    here = Here(decoder, Weights(loaded.params, params), cache_len)
    torch_target = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    nemo = Qwen3DFlashDraftModel.from_pretrained(draft, dtype=torch.float32)
    zlab = DFlashDraftModel.from_pretrained(draft, dtype=torch.float32)
    with_absolute_crop(monkeypatch)
    seen = [
        compare(here, nemo, zlab, torch_target, prompt, new_tokens=NEW_TOKENS) for prompt in prompts
    ]
    assert all(one.more_in_nemo in (0, 1) for one in seen)
    begins = here.decode(prompts[0], new_tokens=NEW_TOKENS).begins
    exactly = begins[len(begins) // 2] + 1 - len(prompts[0])
    assert compare(here, nemo, zlab, torch_target, prompts[0], new_tokens=exactly).more_in_nemo == 1
    return Seen(*map(sum, zip(*seen, strict=True)))


def with_absolute_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crops a cache *to* a length, as NeMo 0.7.0 asks of transformers 5.18, its own version.

    Later versions of transformers crop *by* a length.
    """
    by = DynamicCache.crop

    def crop(cache: DynamicCache, size: int) -> None:
        by(cache, size - cache.get_seq_length() if size > 0 else size)

    monkeypatch.setattr(DynamicCache, "crop", crop)


def trained_draft(
    directory: Path, target: Path, prompts: list[np.ndarray], *, steps: int, **fields: Any
) -> Path:
    """A plain DFlash draft that has learnt the target's own answers to these prompts by heart.

    It is exported in float32. It is overfitted on purpose: what is compared is decoding, and a
    draft that is never accepted would show little of it.
    """
    loaded = load_target(target, dtype="float32")
    recipe = DraftRecipe(num_hidden_layers=1, block_size=BLOCK_SIZE, projector_type=None, **fields)
    config = make_draft_config(recipe, loaded.config, special_ids={}, dtype="float32")
    plain, weights = make_decoder(Target(loaded.config)), Weights(loaded.params)
    cache_len = required_cache_len(plain, max(map(len, prompts)), NEW_TOKENS)
    answers = generate(plain, weights, prompts, max_new_tokens=NEW_TOKENS, cache_len=cache_len)
    longest = max(map(len, prompts)) + NEW_TOKENS
    ids, loss_mask = np.zeros((2, len(prompts), longest), np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : len(prompt) + NEW_TOKENS] = np.concatenate([prompt, answer.tokens])
        loss_mask[row, len(prompt) : len(prompt) + NEW_TOKENS] = 1
    features = jax.jit(Target(loaded.config, capture=config.target_layer_ids).apply)(
        {"params": loaded.params}, ids
    )
    frozen = (
        features.features,
        loss_mask,
        lm_head_weight(loaded.params),
        loaded.params["embed_tokens"],
    )
    trainer, optimizer = build_trainer(config, num_anchors=16), optax.adam(2e-3)

    @jax.jit
    def step(params: Any, moments: Any, key: jax.Array, frozen: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            return trainer.apply(
                {"params": {"draft_model": params}}, ids, *frozen, rngs={"anchors": key}
            ).loss

        updates, moments = optimizer.update(jax.grad(loss)(params), moments)
        return optax.apply_updates(params, updates), moments

    fresh = nn.meta.unbox(init_variables(DraftModel(config), jax.random.key(0)))["params"]
    params = draft_from_target(config, fresh, loaded.params)
    moments = optimizer.init(params)
    for index in range(steps):
        params, moments = step(params, moments, jax.random.key(index), frozen)
    save_hf_draft(directory / "draft", config, params, dtype="float32")
    return directory / "draft"


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Products of a few rows wait longer for a second thread on a busy machine than they take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(seen: Seen) -> None:
    """Enough was compared, and the draft was taken often but not always."""
    # The first token of each answer comes from reading the prompt.
    tau = (seen.tokens - 5) / seen.verifications
    print(f"{seen}, tau {tau:.3f}")
    assert seen.tokens == 5 * NEW_TOKENS and 1.1 < tau < BLOCK_SIZE


@pytest.mark.parametrize(
    "layers", [(0, 3), pytest.param((0, 2), marks=pytest.mark.slow)], ids=["last layer", "middle"]
)
def test_three_decoders_agree_on_a_tiny_target(
    layers: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write_target(tmp_path / "target")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 32, size).astype(np.int32) for size in (5, 9, 12, 17, 24)]
    fields = {"mask_token_id": MASK_TOKEN_ID, "target_layer_ids": layers}
    draft = trained_draft(tmp_path, target, prompts, steps=60, **fields)
    check(compare_all(draft, target, prompts, monkeypatch))


@pytest.mark.slow
def test_three_decoders_agree_on_smollm2(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(smollm2)
    prompts = [encode_prompt([{"role": "user", "content": text}], tokenizer) for text in PROMPTS]
    fields = {"mask_token_id": 16, "target_layer_ids": (10, 28)}
    draft = trained_draft(tmp_path, smollm2, prompts, steps=100, **fields)
    check(compare_all(draft, smollm2, prompts, monkeypatch))
