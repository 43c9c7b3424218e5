"""NeMo AutoModel's draft and trainers beside ours: equal weights and anchors, random batches.

Torch and NeMo are imported where they are used: tests without them take random inputs from here.
"""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.config.heads import DominoHeadConfig
from domino_jax.config.model import DecoderConfig, DecoderShape, DraftConfig
from domino_jax.draft.build import boxed_parameters
from domino_jax.interop.hf import hf_tensors, save_hf_draft
from domino_jax.objective.modules import DFlashTrainerModule, build_trainer

METRIC, GRADIENT = 1e-5, 1e-4  # relative, of a metric and of a gradient's norm


def target_config(draft: DraftConfig, *, layers: int = 4) -> DecoderConfig:
    """A target of the same widths as a draft."""
    shape = {field.name: getattr(draft, field.name) for field in dataclasses.fields(DecoderShape)}
    return DecoderConfig(**shape | {"num_hidden_layers": layers})


def draft_config(**changes: Any) -> DraftConfig:
    """A tiny Domino draft in which no two widths are equal, so that a mixed-up axis cannot pass."""
    tiny = DraftConfig(
        vocab_size=120,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
        block_size=5,
        mask_token_id=119,
        num_target_layers=6,
        target_layer_ids=(0, 2, 4),
        head=DominoHeadConfig(emb_dim=12, gru_hidden_dim=20),
        pure_draft_prefix_len=1,
        shift_label=True,
    )
    return dataclasses.replace(tiny, **changes)


def dflash_config(**changes: Any) -> DraftConfig:
    """The same without the Domino head."""
    return draft_config(head=None, shift_label=False, pure_draft_prefix_len=0, **changes)


def random_params(config: DraftConfig, *, seed: int = 0) -> Any:
    """Float32 weights of the draft at a scale at which every one of them shows in the loss."""
    rng = np.random.default_rng(seed)
    shapes = nn.meta.unbox(boxed_parameters(config))

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        x = rng.standard_normal(leaf.shape)
        x = 1.0 + 0.2 * x if len(leaf.shape) == 1 else x * 2.0 * leaf.shape[-1] ** -0.5
        return jnp.asarray(x, jnp.float32)

    return jax.tree.map(draw, shapes)


class Batch(NamedTuple):
    """What a trainer module is called with; `packing` has three arrays for packed rows, or none."""

    input_ids: np.ndarray
    hidden_states: np.ndarray
    loss_mask: np.ndarray
    lm_head: np.ndarray
    embed_tokens: np.ndarray
    packing: dict[str, np.ndarray]

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The five positional arguments of a trainer module."""
        return self[:5]


def random_batch(
    config: DraftConfig,
    *,
    rows: int = 3,
    length: int = 32,
    packed: bool = False,
    seed: int = 0,
    frozen_seed: int = 1,
) -> Batch:
    """A batch in which some predictions come true.

    Its first four tokens are frequent and have large rows in the head. `frozen_seed` draws the
    target's head and embedding, `seed` the rest.
    """
    frozen, rng = np.random.default_rng(frozen_seed), np.random.default_rng(seed)
    table = (config.vocab_size, config.hidden_size)
    lm_head = frozen.standard_normal(table) * config.hidden_size**-0.5
    lm_head[:4] *= 5.0
    embed_tokens = frozen.standard_normal(table)
    ids = rng.integers(0, config.vocab_size - 1, (rows, length))
    ids = np.where(rng.random((rows, length)) < 0.8, ids % 4, ids)
    features = rng.standard_normal(
        (rows, length, len(config.target_layer_ids) * config.hidden_size)
    )
    packing: dict[str, np.ndarray] = {}
    loss_mask = rng.random((rows, length)) < 0.75
    if packed:
        # Two long documents, a hole of length 0, a shorter one, and padding behind the last.
        first = rng.integers(length // 3, length // 2, rows)
        seq_lens = np.stack(
            [first, np.zeros(rows, int), length - 6 - first, np.full(rows, 4)], axis=1
        )
        seq_lens[-1, -1] += 2
        packing = {"seq_lens": seq_lens.astype(np.int32), **_document_positions(seq_lens, length)}
        loss_mask &= np.arange(length) < seq_lens.sum(axis=1, keepdims=True)
    return Batch(
        ids.astype(np.int32),
        features.astype(np.float32),
        loss_mask,
        lm_head.astype(np.float32),
        embed_tokens.astype(np.float32),
        packing,
    )


def _document_positions(seq_lens: np.ndarray, length: int) -> dict[str, np.ndarray]:
    position_ids = np.zeros((len(seq_lens), length), np.int32)
    doc_remaining = np.zeros((len(seq_lens), length), np.int32)
    for row, lens in enumerate(seq_lens):
        start = 0
        for size in lens:
            position_ids[row, start : start + size] = np.arange(size)
            doc_remaining[row, start : start + size] = np.arange(size)[::-1]
            start += size
        position_ids[row, start:] = np.arange(length - start)
    return {"position_ids": position_ids, "doc_remaining": doc_remaining}


def random_anchors(
    config: DraftConfig, batch: Batch, *, slots: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Ascending anchors int32 [B, slots] and which slots hold one.

    Odd rows keep a third of their candidates only.
    """
    rng, size = np.random.default_rng(seed), config.block_size
    rows, length = batch.loss_mask.shape
    anchors, keep = np.zeros((rows, slots), np.int32), np.zeros((rows, slots), bool)
    for row in range(rows):
        candidates = [
            position
            for position in range(max(length - size, 0) + 1)
            if batch.loss_mask[row, position]
        ]
        if batch.packing:
            remaining = batch.packing["doc_remaining"][row]
            candidates = [position for position in candidates if remaining[position] >= size - 1]
        if row % 2:
            candidates = candidates[::3]
        drawn = sorted(rng.permutation(candidates)[:slots])
        anchors[row, : len(drawn)], keep[row, : len(drawn)] = drawn, True
    return anchors, keep


def nemo_draft(config: DraftConfig, params: Any) -> Any:
    """NeMo's draft with our weights, by way of an export; every weight comes from the file."""
    import torch
    from nemo_automodel.components.speculative.dflash.draft_qwen3 import Qwen3DFlashDraftModel

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "draft"
        save_hf_draft(path, config, params, dtype="float32")
        draft, report = Qwen3DFlashDraftModel.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    assert not any(report.values()), report
    return draft


def nemo_trainer(
    config: DraftConfig,
    params: Any,
    batch: Batch,
    *,
    num_anchors: int = 512,
    loss_decay_gamma: float | None = None,
    dtype: str = "float32",
    **options: Any,
) -> Any:
    """NeMo's trainer of the same draft and frozen target, both in `dtype`.

    Further options are those of its DFlash class.
    """
    import torch
    from nemo_automodel.components.speculative.dflash import core, domino_core

    lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size)
    for module, table in ((lm_head, batch.lm_head), (embed_tokens, batch.embed_tokens)):
        module.weight = torch.nn.Parameter(torch.tensor(table), requires_grad=False)
    kind = core.DFlashTrainerModule
    if config.projector_type == "domino":
        kind = domino_core.DominoTrainerModule
        options["shift_label"] = config.shift_label
    parts = (nemo_draft(config, params), lm_head, embed_tokens)
    trainer = kind(
        *(module.to(getattr(torch, dtype)) for module in parts),
        mask_token_id=config.mask_token_id,
        block_size=config.block_size,
        attention_backend="sdpa",  # the dense additive mask; the draft itself runs eager
        num_anchors=num_anchors,
        loss_decay_gamma=loss_decay_gamma,
        **options,
    )
    trainer.sliding_window = config.sliding_window  # its Domino class has no argument for it
    return trainer


def nemo_step(
    trainer: Any,
    batch: Batch,
    *,
    anchors: tuple[np.ndarray, np.ndarray] | None = None,
    lambda_base: float | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics and gradients of NeMo's trainer by name, at given anchors or at those it draws.

    `lambda_base` is for the Domino trainer only. The gradients stay in the parameters too.
    """
    import torch

    if anchors is not None:
        given = tuple(torch.tensor(x) for x in (anchors[0].astype(np.int64), anchors[1]))
        trainer._sample_anchor_positions = lambda *args, **kwargs: given
    options: dict[str, Any] = {
        name: torch.tensor(x.astype(np.int64)) for name, x in batch.packing.items()
    }
    if lambda_base is not None:
        options["lambda_base"] = lambda_base
    trainer.draft_model.zero_grad()
    metrics = trainer(
        torch.tensor(batch.input_ids.astype(np.int64)),
        torch.tensor(batch.hidden_states).to(trainer.draft_model.dtype),
        torch.tensor(batch.loss_mask.astype(np.float32)),
        **options,
    )
    metrics.loss.backward()
    gradients = {
        name: x.grad.float().numpy().copy() for name, x in trainer.draft_model.named_parameters()
    }
    return {
        field.name: float(getattr(metrics, field.name).detach())
        for field in dataclasses.fields(metrics)
    }, gradients


def show_same_prefixes(trainer: Any, step: "Step", anchors: tuple[np.ndarray, np.ndarray]) -> None:
    """Makes NeMo's trainer show the prefixes that our module draws from seed 0 at given anchors."""
    import torch

    # With given anchors the module draws only the prefixes, so the same key draws the same here.
    prefixes = step.module.apply(
        {},
        jnp.asarray(anchors[0]),
        rngs={"anchors": jax.random.key(0)},
        method="draw_prefix_lengths",
    )
    trainer._sample_prefix_lengths = lambda *_: torch.tensor(np.asarray(prefixes, np.int64))


class Step(NamedTuple):
    """A module and its jitted loss with gradients, with fixed anchors or with drawn ones."""

    module: DFlashTrainerModule
    run: Any


@functools.cache  # compiling takes longer than everything else here
def make_step(config: DraftConfig, **options: Any) -> Step:
    module = build_trainer(config, **options)

    def loss(
        params: Any, arrays: tuple[jax.Array, ...], given: dict[str, Any], key: jax.Array
    ) -> tuple[Any, Any]:
        variables = {"params": {"draft_model": params}}
        metrics = module.apply(variables, *arrays, rngs={"anchors": key}, **given)
        return metrics.loss, metrics

    # The results are the same and compiling takes half as long.
    quick = {"xla_backend_optimization_level": 0}
    return Step(module, jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=quick))


def our_step(
    step: Step,
    config: DraftConfig,
    params: Any,
    batch: Batch,
    *,
    anchors: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int = 0,
    **given: Any,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics and gradients by the checkpoint's names, like `nemo_step`."""
    if anchors is not None:
        given |= {
            "anchor_positions": jnp.asarray(anchors[0]),
            "block_keep_mask": jnp.asarray(anchors[1]),
        }
    (_, metrics), gradient = step.run(
        params, batch.arrays, batch.packing | given, jax.random.key(seed)
    )
    return {name: float(x) for name, x in vars(metrics).items()}, hf_tensors(config, gradient)


def check_metrics(found: dict[str, float], expected: dict[str, float]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=METRIC, err_msg=name)


def check_close(found: dict[str, Any], expected: dict[str, Any], *, relative: float) -> None:
    """Each array of `found` lies near its namesake in `expected`; the names are the same.

    Its distance is at most `relative` times the norm of the expected array.
    """
    assert set(found) == set(expected)
    norms = {name: float(np.linalg.norm(expected[name])) for name in expected}
    errors = {
        name: float(np.linalg.norm(np.asarray(found[name]) - expected[name])) for name in expected
    }
    wrong = {
        name: (error, norms[name])
        for name, error in errors.items()
        if not error <= relative * norms[name]
    }
    assert not wrong, wrong


@functools.cache  # many tests compare with the same plain draft
def compare_with_nemo(
    config: DraftConfig,
    *,
    rows: int = 3,
    length: int = 32,
    packed: bool = False,
    slots: int = 11,
    gamma: float | None = None,
    chunk_blocks: int = 0,
    lambda_base: float = 0.5,
    seed: int = 0,
) -> dict[str, float]:
    """Compares our metrics and gradients with NeMo's at the same anchors; returns our metrics."""
    params, batch = (
        random_params(config, seed=seed),
        random_batch(config, rows=rows, length=length, packed=packed, seed=seed),
    )
    anchors = random_anchors(config, batch, slots=slots, seed=seed)
    curriculum = {"lambda_base": lambda_base} if config.projector_type else {}
    theirs = nemo_trainer(config, params, batch, loss_decay_gamma=gamma)
    expected, expected_gradient = nemo_step(theirs, batch, anchors=anchors, **curriculum)
    step = make_step(config, loss_decay_gamma=gamma, chunk_blocks=chunk_blocks)
    found, gradient = our_step(step, config, params, batch, anchors=anchors, **curriculum)
    check_metrics(found, expected)
    check_close(gradient, expected_gradient, relative=GRADIENT)
    return found


def slow_document_ids(seq_lens: np.ndarray, length: int) -> np.ndarray:
    """Documents of packed rows by counting, one position at a time."""
    ids = np.zeros((len(seq_lens), length), np.int32)
    for row, lens in enumerate(seq_lens):
        for position in range(length):
            end = 0
            for size in lens:
                end += size
                ids[row, position] += end <= position
    return ids


def slow_mask(
    anchors: np.ndarray,
    keep: np.ndarray,
    seq_lens: np.ndarray | None,
    *,
    length: int,
    size: int,
    window: int | None = None,
    causal: bool = False,
) -> np.ndarray:
    """What each query of each block sees of `[context | all blocks]`, bool [B, N*K, S + N*K]."""
    rows, slots = anchors.shape
    documents = None if seq_lens is None else slow_document_ids(seq_lens, length)
    mask = np.zeros((rows, slots * size, length + slots * size), bool)
    for b, n, k in np.ndindex(rows, slots, size):
        a = anchors[b, n]
        for j in range(length):
            same = documents is None or documents[b, j] == documents[b, a]
            near = window is None or (a + k) - j < window
            mask[b, n * size + k, j] = keep[b, n] and j < a and same and near
        for other in range(k + 1 if causal else size):
            mask[b, n * size + k, length + n * size + other] = True
    return mask
