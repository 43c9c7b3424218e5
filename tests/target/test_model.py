"""The target against transformers' torch models, and its own forms against the whole pass.

Those forms are scanned, cached, rewound and batched passes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doubles import slow_after
from jax.sharding import NamedSharding, PartitionSpec
from tiny import stack_layers
from transformers import AutoModelForCausalLM

from domino_jax.kernels.products import vocabulary_logits
from domino_jax.sharding import make_mesh, parameter_shardings, partition_spec
from domino_jax.target.load import LoadedTarget, load_target, load_tokenizer
from domino_jax.target.model import Target, TargetOutput, lm_head_weight

EVERY_LAYER = (0, 1, 2, 3)
SCALED = ("llama_linear", "llama3", "qwen3_yarn")
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", *SCALED)
KINDS = [
    ("llama", True),
    ("llama", False),
    ("qwen3", True),
    ("qwen3", False),
    ("qwen2", True),
    ("qwen2", False),
]
KINDS += [(kind, False) for kind in ("qwen3_moe", "qwen3_moe_raw", *SCALED)]


def random_tokens(batch: int, length: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 352, (batch, length), dtype=np.int32)


def torch_states(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits and `hidden_states` after every decoder layer, the last one after the final norm."""
    import torch

    with torch.no_grad():
        output = model(torch.tensor(tokens, dtype=torch.long), output_hidden_states=True)
    return output.logits.numpy(), [states.numpy() for states in output.hidden_states[1:]]


@pytest.fixture(scope="module")
def loaded(tiny: Callable[..., Any]) -> LoadedTarget:
    return load_target(tiny("qwen3", tied=False).directory)


@functools.cache
def jitted(target: Target) -> Callable[..., TargetOutput]:
    return jax.jit(target.apply)


def whole(loaded: LoadedTarget, tokens: np.ndarray) -> TargetOutput:
    return jitted(Target(loaded.config, EVERY_LAYER))({"params": loaded.params}, tokens)


def scanned(loaded: LoadedTarget, tokens: np.ndarray) -> TargetOutput:
    target = Target(loaded.config, EVERY_LAYER, scan_layers=True)
    return jitted(target)({"params": stack_layers(loaded.params)}, tokens)


def step(loaded: LoadedTarget, tokens: np.ndarray, starts: list[int], cache: Any) -> TargetOutput:
    positions = np.array(starts, np.int32)[:, None] + np.arange(tokens.shape[1], dtype=np.int32)
    return jitted(Target(loaded.config, EVERY_LAYER))(
        {"params": loaded.params}, tokens, positions, cache=cache
    )


def assert_rows_equal(actual: TargetOutput, expected: TargetOutput, rows: list[slice]) -> None:
    """Row b of `actual` equals the positions `rows[b]` of row b of `expected`."""
    for row, piece in enumerate(rows):
        np.testing.assert_allclose(actual.hidden[row], expected.hidden[row, piece], atol=2e-5)
        np.testing.assert_allclose(actual.features[row], expected.features[row, piece], atol=2e-5)


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_target_equals_transformers(
    tiny: Callable[..., Any], kind: str, tied: bool, record_property: Callable[[str, object], None]
) -> None:
    reference, tokens = tiny(kind, tied=tied), random_tokens(2, 33)
    loaded = load_target(reference.directory)
    expected_logits, expected_states = torch_states(reference.model, tokens)
    assert np.abs(expected_logits).max() > 2, "the reference is too flat to show a difference"
    worst = 0.0
    for out in (whole(loaded, tokens), scanned(loaded, tokens)):
        logits = vocabulary_logits(out.hidden, lm_head_weight(loaded.params))
        chex.assert_shape(out.features, (2, 33, 4 * 32))
        states = np.split(np.asarray(out.features), 4, axis=-1)
        pairs = zip([logits, *states], [expected_logits, *expected_states], strict=True)
        worst = max(worst, *(float(np.abs(a - b).max()) for a, b in pairs))
    record_property("largest_difference", worst)
    print(f"{kind} tied={tied}: largest difference {worst:.2e}")
    assert worst < 1e-4


@pytest.mark.parametrize("kind", SCALED)
def test_rope_scaling_is_what_makes_the_logits_equal(tiny: Callable[..., Any], kind: str) -> None:
    loaded, tokens = load_target(tiny(kind, tied=False).directory), random_tokens(2, 33)
    assert loaded.config.rope_scaling is not None
    plain = loaded._replace(config=dataclasses.replace(loaded.config, rope_scaling=None))
    assert np.abs(whole(loaded, tokens).features - whole(plain, tokens).features).max() > 0.1


def test_lm_head_weight_is_the_embedding_only_when_tied(tiny: Callable[..., Any]) -> None:
    tied, untied = (
        load_target(tiny("llama", tied=flag).directory).params for flag in (True, False)
    )
    assert lm_head_weight(tied) is tied["embed_tokens"]
    assert lm_head_weight(untied) is untied["lm_head"]
    assert not np.array_equal(untied["lm_head"], untied["embed_tokens"])


@pytest.mark.parametrize("capture", [(), (2,), (0, 3), EVERY_LAYER])
def test_scanned_layers_equal_unrolled(loaded: LoadedTarget, capture: tuple[int, ...]) -> None:
    tokens = random_tokens(2, 12)
    unrolled = jitted(Target(loaded.config, capture))({"params": loaded.params}, tokens)
    scanned = jitted(Target(loaded.config, capture, scan_layers=True))(
        {"params": stack_layers(loaded.params)}, tokens
    )
    chex.assert_shape(scanned.features, (2, 12, len(capture) * 32))
    assert scanned.cache is None
    chex.assert_trees_all_close(scanned, unrolled, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_scanned_layers_with_a_cache_equal_unrolled(loaded: LoadedTarget, batch: int) -> None:
    tokens = random_tokens(batch, 9)
    apart = Target(loaded.config, capture=(0, 3))
    forms = [
        (apart, loaded.params),
        (replace(apart, scan_layers=True), stack_layers(loaded.params)),
    ]
    caches = [target.empty_cache(batch=batch, slots=12) for target, _ in forms]
    for start, stop in ((0, 6), (6, 7), (5, 9)):  # the last pass rewinds
        positions = np.tile(np.arange(start, stop, dtype=np.int32), (batch, 1))
        outs = [
            jitted(target)({"params": params}, tokens[:, start:stop], positions, cache=cache)
            for (target, params), cache in zip(forms, caches, strict=True)
        ]
        caches = [out.cache for out in outs]
        chex.assert_trees_all_close(outs[1][:2], outs[0][:2], atol=1e-5)
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *caches[0])
    chex.assert_trees_all_close(caches[1], stacked, atol=1e-5)


# One row is written by another code path.
@pytest.mark.parametrize(
    ("kind", "batch"), slow_after(4, [("llama", 1), *((kind, 2) for kind in FAMILIES[1:])])
)
def test_cached_pieces_equal_the_whole_pass(
    tiny: Callable[..., Any], kind: str, batch: int
) -> None:
    loaded, tokens = load_target(tiny(kind, tied=True).directory), random_tokens(batch, 17)
    expected = whole(loaded, tokens)
    cache, start = Target(loaded.config).empty_cache(batch=batch, slots=24), 0
    for length in (6, 1, 6, 1, 3):
        out = step(loaded, tokens[:, start : start + length], [start] * batch, cache)
        assert_rows_equal(out, expected, [slice(start, start + length)] * batch)
        cache, start = out.cache, start + length


def test_rewound_cache_hides_what_stood_there(loaded: LoadedTarget) -> None:
    tokens = random_tokens(2, 14)
    expected = whole(loaded, tokens)
    cache = step(
        loaded, tokens[:, :6], [0, 0], Target(loaded.config).empty_cache(batch=2, slots=16)
    ).cache
    # Eight wrong tokens leave stale keys at 6..13; the right ones come back in pieces over them.
    cache = step(loaded, random_tokens(2, 8, seed=5), [6, 6], cache).cache
    out = step(loaded, tokens[:, 6:9], [6, 6], cache)
    assert_rows_equal(out, expected, [slice(6, 9)] * 2)
    out = step(loaded, tokens[:, 9:14], [9, 9], out.cache)
    assert_rows_equal(out, expected, [slice(9, 14)] * 2)


def test_batched_rows_may_stand_at_different_positions(loaded: LoadedTarget) -> None:
    tokens = random_tokens(3, 16)
    expected = whole(loaded, tokens)
    cache = step(
        loaded, tokens[:, :11], [0, 0, 0], Target(loaded.config).empty_cache(batch=3, slots=20)
    ).cache
    starts = [3, 11, 7]
    rows = [slice(start, start + 4) for start in starts]
    pieces = np.stack([tokens[row, piece] for row, piece in enumerate(rows)])
    out = step(loaded, pieces, starts, cache)
    assert_rows_equal(out, expected, rows)
    rows = [slice(start + 2, start + 4) for start in starts]  # all rewound by two
    out = step(loaded, pieces[:, 2:], [start + 2 for start in starts], out.cache)
    assert_rows_equal(out, expected, rows)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(("capture", "depth"), [((0, 2), 3), ((0, 3), 4)])
def test_first_layers_give_the_same_captured_states(
    tiny: Callable[..., Any], kind: str, scan: bool, capture: tuple[int, ...], depth: int
) -> None:
    tokens, loaded = random_tokens(1, 9), load_target(tiny(kind, tied=False).directory)
    dropped = [f"layers_{index}" for index in range(depth, 4)]
    params = {name: leaf for name, leaf in loaded.params.items() if name not in dropped}
    cut = jitted(Target(loaded.config, capture, depth=depth, scan_layers=scan))
    out = cut({"params": stack_layers(params) if scan else params}, tokens)
    # The states of layer 2 are not normed where the cut ends with it: it is not the target's last.
    states = whole(loaded, tokens).features.reshape(1, 9, 4, -1)
    np.testing.assert_allclose(out.features, states[:, :, capture].reshape(1, 9, -1), atol=1e-5)


def test_a_captured_last_layer_is_what_the_head_reads(loaded: LoadedTarget) -> None:
    out = whole(loaded, random_tokens(2, 9))
    np.testing.assert_array_equal(out.features[..., -32:], out.hidden)


@pytest.mark.parametrize(("capture", "depth"), [((0, 3), 3), ((4,), None), ((-1,), None)])
def test_layers_that_do_not_run_are_not_captured(
    loaded: LoadedTarget, capture: tuple[int, ...], depth: int | None
) -> None:
    target = Target(loaded.config, capture, depth=depth)
    with pytest.raises(ValueError, match=r"cannot capture layers .* of a target that runs \d"):
        target.apply({"params": loaded.params}, random_tokens(1, 4))


LENGTHS = (5, 1, 9, 6)  # of the documents in a packed row


def packed_rows() -> tuple[np.ndarray, np.ndarray]:
    """Two rows of the same documents in different order, and each token's document by number."""
    documents = [random_tokens(1, length, seed=length)[0] for length in LENGTHS]
    numbers = [np.full(length, number, np.int32) for number, length in enumerate(LENGTHS)]
    orders = ((0, 1, 2, 3), (3, 2, 0, 1))
    rows = [
        [np.concatenate([parts[i] for i in order]) for order in orders]
        for parts in (documents, numbers)
    ]
    return np.stack(rows[0]), np.stack(rows[1])


@pytest.mark.parametrize("kind", ["qwen3_yarn", "qwen3_moe"])
@pytest.mark.parametrize("scan", slow_after(1, [True, False]))
def test_packed_documents_equal_each_alone(tiny: Callable[..., Any], kind: str, scan: bool) -> None:
    loaded, (tokens, documents) = load_target(tiny(kind, tied=False).directory), packed_rows()
    params = {"params": stack_layers(loaded.params) if scan else loaded.params}
    run = jitted(Target(loaded.config, EVERY_LAYER, scan_layers=scan))
    places = np.array([[np.flatnonzero(row == number)[0] for number in row] for row in documents])
    restarting = (np.arange(tokens.shape[1]) - places).astype(np.int32)
    packed = run(params, tokens, documents=documents)
    chex.assert_trees_all_equal(run(params, tokens, restarting, documents=documents), packed)
    for number in range(len(LENGTHS)):
        alone = whole(loaded, tokens[:1, documents[0] == number])
        logits = vocabulary_logits(alone.hidden[0], lm_head_weight(loaded.params))
        for row in range(2):
            own = documents[row] == number
            ours = vocabulary_logits(packed.hidden[row][own], lm_head_weight(loaded.params))
            np.testing.assert_allclose(ours, logits, atol=5e-5)
            np.testing.assert_allclose(packed.features[row][own], alone.features[0], atol=2e-5)
    # Seen as one document, the row gives something else: the check above is not empty.
    assert np.abs(run(params, tokens).features - packed.features).max() > 0.1


def test_one_document_equals_none(loaded: LoadedTarget) -> None:
    tokens = random_tokens(2, 9)
    run, params = jitted(Target(loaded.config, EVERY_LAYER)), {"params": loaded.params}
    whole_row = run(params, tokens, documents=np.full((2, 9), 3, np.int32))
    chex.assert_trees_all_equal(whole_row, run(params, tokens))


def test_documents_refuse_a_cache(loaded: LoadedTarget) -> None:
    tokens, cache = random_tokens(1, 4), Target(loaded.config).empty_cache(batch=1, slots=8)
    with pytest.raises(ValueError, match="documents have no cache"):
        Target(loaded.config).apply(
            {"params": loaded.params}, tokens, cache=cache, documents=np.zeros((1, 4), int)
        )


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("qwen2", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("qwen3_moe", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("qwen3_moe", {"data": 8}),
    ],
)
def test_eight_devices_equal_one(
    tiny: Callable[..., Any], kind: str, sizes: dict[str, int]
) -> None:
    loaded, tokens = load_target(tiny(kind, tied=False).directory), random_tokens(8, 12)
    expected, mesh = scanned(loaded, tokens), make_mesh(**sizes)
    target = Target(loaded.config, EVERY_LAYER, scan_layers=True)
    boxed = jax.eval_shape(target.init, jax.random.key(0), tokens)["params"]
    layout = parameter_shardings(boxed, mesh)
    params = jax.device_put(stack_layers(loaded.params), layout)
    if kind == "qwen3_moe":
        parts = layout["layers"]["layer"]["mlp"]["experts"]["up_proj"].spec
        assert parts == PartitionSpec(None, None, "tensor", "fsdp")
    rows = jax.device_put(tokens, NamedSharding(mesh, partition_spec("batch", None)))
    with jax.set_mesh(mesh):
        out = jax.jit(target.apply)({"params": params}, rows)
    chex.assert_trees_all_close(jax.device_get(out), jax.device_get(expected), atol=5e-5)


def test_bfloat16_keeps_activations_small_and_logits_wide(tiny: Callable[..., Any]) -> None:
    tokens = random_tokens(2, 10)
    narrow, wide = (
        load_target(tiny("qwen3", tied=True).directory, dtype=name)
        for name in ("bfloat16", "float32")
    )
    out, expected = whole(narrow, tokens), whole(wide, tokens)
    logits = vocabulary_logits(out.hidden, lm_head_weight(narrow.params))
    assert (out.hidden.dtype, out.features.dtype, logits.dtype) == (
        jnp.bfloat16,
        jnp.bfloat16,
        jnp.float32,
    )
    error = np.abs(logits - vocabulary_logits(expected.hidden, lm_head_weight(wide.params)))
    assert error.mean() < 0.1


# SmolLM2-135M-Instruct, converted from the GGUF file of its wheel.

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
    torch.set_num_threads(
        1
    )  # torch's threads spin: on a busy machine several take eight times as long as one
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
            expected = real.model(
                torch.tensor(row[None], dtype=torch.long), output_hidden_states=True
            )
        worst = max(worst, float(np.abs(logits - expected.logits[0].numpy()).max()))
        states = torch.cat([expected.hidden_states[layer + 1] for layer in (1, 15, 28)], dim=-1)[
            0
        ].numpy()
        # Some dimensions reach 25,000: the tolerance is relative to the row's largest.
        np.testing.assert_allclose(
            out.features[0, : len(row)], states, rtol=1e-4, atol=1e-6 * np.abs(states).max()
        )
    record_property("largest_difference", worst)
    print(f"SmolLM2: largest logit difference {worst:.2e}")
    assert worst < 2e-3


def test_smollm2_greedy_tokens_equal_transformers(real: Real) -> None:
    import torch

    loaded, count = real.loaded, 64
    prompts = np.array([real.tokenizer(text)["input_ids"][:48] for text in TEXTS], np.int32)
    start = prompts.shape[1]
    real.model.generation_config.eos_token_id = (
        None  # all 64 tokens, also past the end of an answer
    )
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

    cache = Target(loaded.config).empty_cache(batch=len(TEXTS), slots=start + count)
    token, cache = next_tokens(loaded.params, prompts, cache, positions(0, start))
    tokens = [token]
    for at in range(start, start + count - 1):
        token, cache = next_tokens(loaded.params, token[:, None], cache, positions(at, 1))
        tokens.append(token)
    np.testing.assert_array_equal(np.stack(tokens, axis=1), expected[:, start:])
