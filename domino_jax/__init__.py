"""Train, check and export Domino and DFlash speculative-decoding drafters in JAX. The public names."""

from domino_jax.interop.hf import hf_tensors, load_hf_draft, save_hf_draft
from domino_jax.training.curriculum import get_lambda_base, lambda_base_schedule
from domino_jax.training.loss import compute_accept_len
from domino_jax.training.modules import (
    DFlashStepMetrics,
    DFlashTrainerModule,
    DominoStepMetrics,
    DominoTrainerModule,
    build_trainer,
)
from domino_jax.training.objectives import register_objective

__all__ = [
    "DFlashStepMetrics",
    "DFlashTrainerModule",
    "DominoStepMetrics",
    "DominoTrainerModule",
    "build_trainer",
    "compute_accept_len",
    "get_lambda_base",
    "hf_tensors",
    "lambda_base_schedule",
    "load_hf_draft",
    "register_objective",
    "save_hf_draft",
]
