"""The target against transformers' torch models; its scanned and packed passes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doubles import slow_after
from jax.sharding import NamedSharding, PartitionSpec
from passes import EVERY_LAYER, SCALED, jitted, random_tokens, scanned, whole
from tiny import stack_layers

from domino_jax.kernels.matmul import vocabulary_logits
from domino_jax.sharding import make_mesh, parameter_shardings, partition_spec
from domino_jax.target.decoder import Target, lm_head_weight
from domino_jax.target.load import LoadedTarget, load_target

KINDS = [("llama", True), ("qwen3", True), ("qwen2", True), ("llama", False)]
KINDS += [(kind, False) for kind in ("qwen3", "qwen2", "qwen3_moe", "qwen3_moe_raw", *SCALED)]


def torch_states(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits and `hidden_states` after every decoder layer, the last one after the final norm."""
    import torch

    with torch.no_grad():
        output = model(torch.tensor(tokens, dtype=torch.long), output_hidden_states=True)
    return output.logits.numpy(), [states.numpy() for states in output.hidden_states[1:]]


@pytest.mark.pitfall(
    "hidden state off by one layer",
    seen="target/decoder.py: a layer's input captured, unrolled; the same, scanned",
)
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
    unscaled = dataclasses.replace(loaded.config, rope_scaling=None)
    plain = dataclasses.replace(loaded, config=unscaled)
    assert np.abs(whole(loaded, tokens).features - whole(plain, tokens).features).max() > 0.1


@pytest.mark.pitfall(
    "a tied head ignored",
    seen="target/decoder.py: zeros where no head is stored; the embedding always",
)
def test_lm_head_weight_is_the_embedding_only_when_tied(tiny: Callable[..., Any]) -> None:
    tied = load_target(tiny("llama", tied=True).directory).params
    untied = load_target(tiny("llama", tied=False).directory).params
    assert lm_head_weight(tied) is tied["embed_tokens"]
    assert lm_head_weight(untied) is untied["lm_head"]
    assert not np.array_equal(untied["lm_head"], untied["embed_tokens"])


@pytest.mark.parametrize("capture", [(), (0, 3)])
def test_scanned_layers_equal_unrolled(loaded: LoadedTarget, capture: tuple[int, ...]) -> None:
    tokens = random_tokens(2, 12)
    unrolled = jitted(Target(loaded.config, capture))({"params": loaded.params}, tokens)
    scanned = jitted(Target(loaded.config, capture, scan_layers=True))(
        {"params": stack_layers(loaded.params)}, tokens
    )
    chex.assert_shape(scanned.features, (2, 12, len(capture) * 32))
    assert scanned.cache is None
    chex.assert_trees_all_close(scanned, unrolled, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "scan", "capture", "depth"),
    [
        ("qwen3", False, (0, 2), 3),
        ("qwen3_moe", True, (0, 2), 3),
        ("qwen3", True, (0, 3), 4),
        ("qwen3_moe", False, (0, 3), 4),
    ],
)
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
    orders = ((0, 1, 2, 3), (3, 2, 0, 1))
    tokens = [np.concatenate([documents[i] for i in order]) for order in orders]
    numbers = [np.repeat(order, [LENGTHS[i] for i in order]) for order in orders]
    return np.stack(tokens), np.stack(numbers).astype(np.int32)


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
    directory = tiny("qwen3", tied=True).directory
    narrow, wide = (load_target(directory, dtype=name) for name in ("bfloat16", "float32"))
    out, expected = whole(narrow, tokens), whole(wide, tokens)
    logits = vocabulary_logits(out.hidden, lm_head_weight(narrow.params))
    assert out.hidden.dtype == out.features.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    error = np.abs(logits - vocabulary_logits(expected.hidden, lm_head_weight(wide.params)))
    assert error.mean() < 0.1
