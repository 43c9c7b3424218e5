"""SmolLM2-135M-Instruct, from the GGUF file of its wheel, against transformers."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import stack_layers
from transformers import AutoModelForCausalLM

from domino_jax.kernels.matmul import vocabulary_logits
from domino_jax.target.decoder import Target, lm_head_weight
from domino_jax.target.load import LoadedTarget, load_target, load_tokenizer

TEXTS = (
    "The lighthouse keeper climbed the stairs every evening, carrying oil and a small brass "
    "lantern. From the top he could see the fishing boats come home, one after another, their "
    "sails grey against the red sky. He knew each of them by the way it leaned, and when one was "
    "late he would put a second lamp in the window and wait, counting the waves, until its shape "
    "came out of the dark and his own heart slowed down again. In forty years "
    "he had not lost one of them.",
    "def merge(left: list[int], right: list[int]) -> list[int]:\n    result = []\n    i = j = 0\n"
    "    while i < len(left) and j < len(right):\n        if left[i] <= right[j]:\n"
    "            result.append(left[i])\n"
    "            i += 1\n        else:\n            result.append(right[j])\n            j += 1\n"
    "    return result + left[i:] + right[j:]\n\n\nprint(merge([1, 4, 9], [2, 3, 10]))\n",
    "12 * 34 = 408. 408 + 592 = 1000. 1000 / 8 = 125. 125 - 26 = 99. 99 * 99 = 9801. The square "
    "root of 9801 is 99. 3.14159 * 2 = 6.28318. 2 ** 16 = 65536. 65536 - 1 = 65535. 7! = 5040. "
    "5040 / 144 = 35. 35 % 8 = 3.",
    "<|im_start|>user\nName three rivers of Europe and the seas they reach.<|im_end|>\n"
    "<|im_start|>assistant\n"
    "1. The Danube flows through ten countries and reaches the Black Sea.\n"
    "2. The Rhine rises in Switzerland and ends in the North Sea.\n"
    "3. The Po crosses northern Italy and ends in the Adriatic Sea.<|im_end|>\n<|im_start|>user\n"
    "Which of them is the longest, how long is it in kilometres, and which capital cities stand on "
    "its banks, from west to east?<|im_end|>\n<|im_start|>assistant\n",
    "Ünïcödé naïve café — «Привет, мир!» 日本語のテキストと漢字。 Ελληνικά γράμματα, עברית, "
    "العربية. 🙂🚀 ½ ≤ ∞ → √2 ≈ 1.414 Größe, façade, smörgåsbord, jalapeño, Łódź, İstanbul, Đà "
    "Nẵng, 서울, ไทย.",
)


class Real(NamedTuple):
    """SmolLM2 here and in torch, and its tokenizer."""

    loaded: LoadedTarget
    model: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Iterator[Real]:
    import torch

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    threads = torch.get_num_threads()
    # Torch's threads spin: on a busy machine several take eight times as long as one.
    torch.set_num_threads(1)
    yield Real(load_target(smollm2), model, load_tokenizer(smollm2))
    torch.set_num_threads(threads)


def test_smollm2_logits_equal_transformers(
    real: Real, record_property: Callable[[str, object], None]
) -> None:
    import torch

    loaded, worst = real.loaded, 0.0
    rows = [np.array(real.tokenizer(text)["input_ids"], np.int32) for text in TEXTS]
    assert min(len(row) for row in rows) >= 100
    run = jax.jit(Target(loaded.config, (1, 15, 28), scan_layers=True).apply)
    params, width = {"params": stack_layers(loaded.params)}, max(len(row) for row in rows)
    for row in rows:
        # One length, so that one program serves all texts: what stands behind a position does
        # not reach it.
        out = run(params, np.pad(row, (0, width - len(row)))[None])
        logits = vocabulary_logits(out.hidden[0, : len(row)], lm_head_weight(loaded.params))
        with torch.no_grad():
            ids = torch.tensor(row[None], dtype=torch.long)
            expected = real.model(ids, output_hidden_states=True)
        worst = max(worst, float(np.abs(logits - expected.logits[0].numpy()).max()))
        layers = [expected.hidden_states[layer + 1][0].numpy() for layer in (1, 15, 28)]
        states, features = np.concatenate(layers, axis=-1), out.features[0, : len(row)]
        # Some dimensions reach 25,000: the tolerance is relative to the row's largest.
        atol = 1e-6 * np.abs(states).max()
        np.testing.assert_allclose(features, states, rtol=1e-4, atol=atol)
    record_property("largest_difference", worst)
    print(f"SmolLM2: largest logit difference {worst:.2e}")
    assert worst < 2e-3


def test_smollm2_greedy_tokens_equal_transformers(real: Real) -> None:
    import torch

    loaded, count = real.loaded, 64
    prompts = np.array([real.tokenizer(text)["input_ids"][:48] for text in TEXTS], np.int32)
    start = prompts.shape[1]
    # All 64 tokens, also past the end of an answer.
    real.model.generation_config.eos_token_id = None
    with torch.no_grad():
        ids = torch.tensor(prompts, dtype=torch.long)
        # Unmasked, generate would hide every <|im_end|> of the prompt: it is the padding token too.
        expected = real.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            use_cache=True,
        )

    @functools.partial(jax.jit, donate_argnums=2)
    def next_tokens(
        params: Any, tokens: jax.Array, cache: Any, positions: jax.Array
    ) -> tuple[jax.Array, Any]:
        out = Target(loaded.config).apply({"params": params}, tokens, positions, cache=cache)
        return vocabulary_logits(out.hidden[:, -1], lm_head_weight(params)).argmax(-1).astype(
            jnp.int32
        ), out.cache

    def positions(first: int, length: int) -> np.ndarray:
        return np.broadcast_to(
            np.arange(first, first + length, dtype=np.int32), (len(TEXTS), length)
        )

    cache = Target(loaded.config).empty_cache(batch=len(TEXTS), cache_len=start + count)
    token, cache = next_tokens(loaded.params, prompts, cache, positions(0, start))
    tokens = [token]
    for at in range(start, start + count - 1):
        token, cache = next_tokens(loaded.params, token[:, None], cache, positions(at, 1))
        tokens.append(token)
    np.testing.assert_array_equal(np.stack(tokens, axis=1), expected[:, start:])
