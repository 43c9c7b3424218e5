"""NeMo AutoModel 0.7.0 as its Domino recipe runs it, on the weights of `benchmark_weights`.

From `recipes/llm/train_dflash.py` and `train_domino.py`: draft, gradients and AdamW's moments are
bfloat16 on a GPU (float32 on a CPU), there is no autocast, attention is FlexAttention, which it
compiles, the target is the whole Hugging Face model, whose layers are read through hooks, and
`compile: {enabled: true}` compiles the draft, which is off by default. Anchors are given here; the
recipe draws them, which costs it a sort.
"""

import importlib
import importlib.machinery
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import transformers
from benchmark_sides import Worker
from benchmark_weights import fill_torch
from benchmark_workloads import BETAS, CLIP_NORM, LAMBDA_BASE, LEARNING_RATE, LOSS_DECAY_GAMMA

from domino_jax.config.model import SIZES, DecoderConfig, DraftConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def importable_without_datasets() -> Iterator[None]:
    """NeMo imports `datasets` for loaders that no benchmark uses: an empty one will do."""
    try:
        importlib.import_module("datasets")
    except ModuleNotFoundError:
        pass
    else:
        yield
        return

    class Empty(types.ModuleType):
        def __getattr__(self, name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    empty = Empty("datasets")
    empty.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    sys.modules["datasets"] = empty
    try:
        yield
    finally:
        del sys.modules["datasets"]


# Before the empty `datasets`, whose version transformers would ask for.
from transformers.models.qwen3 import modeling_qwen3  # noqa: E402, F401

with importable_without_datasets():
    from nemo_automodel.components.speculative.dflash import draft_qwen3
    from nemo_automodel.components.speculative.dflash.domino_core import DominoTrainerModule
    from nemo_automodel.components.speculative.dflash.target import HFDFlashTargetModel


def default_dtype() -> str:
    """What the recipe computes in on this machine."""
    return "bfloat16" if DEVICE == "cuda" else "float32"


def versions() -> dict[str, str]:
    """Of the packages that the peer runs on."""
    names = ("torch", "transformers", "nemo-automodel")
    return {name: importlib.metadata.version(name) for name in names}


def hf_config(config: DecoderConfig) -> Any:
    """The Hugging Face config of a Qwen3 target."""
    names = (*SIZES, "rms_norm_eps", "tie_word_embeddings")
    fields = {name: getattr(config, name) for name in names}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return transformers.Qwen3Config(**fields, rope_parameters=rope)


def filled(module: torch.nn.Module, prefix: str = "") -> torch.nn.Module:
    """The same module with the shared weights."""
    for name, parameter in module.named_parameters():
        fill_torch(prefix + name, parameter.data)
    return module


def target_model(config: DecoderConfig) -> torch.nn.Module:
    """The frozen target, made on the device."""
    make = transformers.AutoModelForCausalLM.from_config
    with torch.device(DEVICE):
        model = make(hf_config(config), dtype=DTYPES[config.dtype])
    return filled(model.to(DEVICE)).requires_grad_(False).eval()


def target_tables(config: DecoderConfig) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The target's head and embedding alone, which draft-only training reads."""
    vocabulary, width = config.vocab_size, config.hidden_size
    spec = {"device": DEVICE, "dtype": DTYPES[config.dtype]}
    embed_tokens = torch.nn.Embedding(vocabulary, width, **spec).requires_grad_(False)
    lm_head = torch.nn.Linear(width, vocabulary, bias=False, **spec).requires_grad_(False)
    fill_torch("model.embed_tokens.weight", embed_tokens.weight)
    if config.tie_word_embeddings:
        lm_head.weight = embed_tokens.weight
    else:
        fill_torch("lm_head.weight", lm_head.weight)
    return lm_head, embed_tokens


def draft_model(config: DraftConfig, target: DecoderConfig, *, attention: str) -> Any:
    """A draft made on the device: float32 first, then cast, as the recipe does."""
    dflash: dict[str, Any] = {
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
    }
    if config.head is not None:
        names = ("projector_type", "pure_draft_prefix_len", "shift_label")
        dflash |= {name: getattr(config, name) for name in names} | asdict(config.head)
    draft_config = draft_qwen3.build_qwen3_dflash_draft_config(
        hf_config(target),
        num_draft_layers=config.num_hidden_layers,
        num_target_layers=config.num_target_layers,
        block_size=config.block_size,
        dflash_config=dflash,
        attention_backend=attention,
    )
    with torch.device(DEVICE):
        model = draft_qwen3.Qwen3DFlashDraftModel(draft_config)
    return filled(model.to(device=DEVICE, dtype=DTYPES[config.dtype]), prefix="draft.")


@dataclass(frozen=True)
class Frozen:
    """What the target gives a step: its head, its embedding, and its states each time anew."""

    lm_head: torch.nn.Module
    embed_tokens: torch.nn.Module
    features: Callable[[], torch.Tensor]


def running_target(config: DraftConfig, target: DecoderConfig, ids: torch.Tensor) -> Frozen:
    """The whole target, which runs in every step."""
    model = target_model(target)
    wrapper = HFDFlashTargetModel(model, config.target_layer_ids)
    everything = torch.ones_like(ids)

    def features() -> torch.Tensor:
        return wrapper.generate_batch(ids, everything, everything.float()).hidden_states

    return Frozen(model.get_output_embeddings(), model.get_input_embeddings(), features)


def given_states(config: DraftConfig, target: DecoderConfig, ids: torch.Tensor) -> Frozen:
    """The target's two tables, beside states that are the same in every step."""
    lm_head, embed_tokens = target_tables(target)
    width = len(config.target_layer_ids) * config.hidden_size
    given = torch.empty(*ids.shape, width, device=DEVICE, dtype=DTYPES[config.dtype])
    fill_torch("features", given, std=1.0)
    return Frozen(lm_head, embed_tokens, lambda: given)


def recipe_step(
    config: DraftConfig,
    target: DecoderConfig,
    *,
    input_ids: np.ndarray,
    anchors: np.ndarray,
    keep: np.ndarray,
    online: bool,
    compiled: bool,
) -> Worker:
    """One optimisation step after another, and what to say at the end.

    Args:
        config: the Domino draft.
        target: its target.
        input_ids: int [1, S], all supervised.
        anchors: int [steps, 1, N], of each step.
        keep: bool [steps, 1, N].
        online: run the target in the step; otherwise its states are given.
        compiled: compile the draft with the defaults of the recipe's `compile` section.
    """
    attention = "flex_attention" if DEVICE == "cuda" else "sdpa"  # the former is for CUDA only
    draft = draft_model(config, target, attention=attention)
    if compiled:
        from nemo_automodel.components.utils import compile_utils

        compile_utils.compile_module_inplace(draft, compile_utils.CompileConfig(enabled=True))
    ids = torch.tensor(input_ids, device=DEVICE)
    loss_mask = torch.ones(ids.shape, device=DEVICE)
    frozen = (running_target if online else given_states)(config, target, ids)
    trainer = DominoTrainerModule(
        draft,
        frozen.lm_head,
        frozen.embed_tokens,
        mask_token_id=config.mask_token_id,
        block_size=config.block_size,
        attention_backend=attention,
        num_anchors=anchors.shape[-1],
        loss_decay_gamma=LOSS_DECAY_GAMMA,
        shift_label=config.shift_label,
    )
    trainer.to(DEVICE).train()
    of_steps = iter(zip(*(torch.tensor(x, device=DEVICE) for x in (anchors, keep)), strict=True))
    # It has no argument for them.
    trainer._sample_anchor_positions = lambda *args, **kwargs: next(of_steps)
    optimizer = torch.optim.AdamW(
        trainer.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0
    )
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # the float32 draft is no part of training

    def step() -> float:
        metrics = trainer(
            input_ids=ids,
            hidden_states=frozen.features(),
            loss_mask=loss_mask,
            lambda_base=LAMBDA_BASE,
        )
        metrics.loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = metrics.loss.item()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return loss

    def finish() -> dict[str, Any]:
        return {
            "peak_bytes": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None,
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
            "dtype": config.dtype,
            "versions": versions(),
            "attention": attention,
            "compiled": compiled,
        }

    return step, finish


def matrix_product(x: np.ndarray) -> Callable[[], Any]:
    """x @ x on the device."""
    on_device = torch.tensor(x, device=DEVICE)
    return lambda: on_device @ on_device


def crop_to_length() -> None:
    """Lets programs that crop a cache *to* a length run on any transformers.

    NeMo 0.7.0 means transformers 5.18, its own version; later ones crop *by* a number. All of them
    take a negative number as tokens to remove.
    """
    cut = transformers.DynamicCache.crop

    def crop(cache: Any, length: int) -> None:
        removed = cache.get_seq_length() - length if length > 0 else -length
        if removed > 0:
            cut(cache, -removed)

    transformers.DynamicCache.crop = crop
