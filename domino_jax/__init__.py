"""Trains, checks and exports Domino and DFlash speculative-decoding drafters in JAX.

What a script needs has one public name here, wherever its module stands (`docs/library.md` says
what each is). Each is imported when it is asked for, not before: `domino` imports this package and
must answer Ctrl-C before jax is there.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from domino_jax.base.errors import InputError
    from domino_jax.config.heads import DominoHeadConfig
    from domino_jax.config.model import DraftConfig
    from domino_jax.decoding.decoder import Decoder, Weights, make_decoder
    from domino_jax.decoding.generate import generate
    from domino_jax.draft.backbone import DraftModel
    from domino_jax.draft.build import init_draft
    from domino_jax.evaluation.evaluate import evaluate
    from domino_jax.interop.hf import hf_tensors, load_hf_draft, save_hf_draft
    from domino_jax.objective.curriculum import get_lambda_base, lambda_base_schedule
    from domino_jax.objective.domino_module import DominoTrainerModule, build_trainer
    from domino_jax.objective.loss import compute_accept_len
    from domino_jax.objective.metrics import DFlashStepMetrics, DominoStepMetrics
    from domino_jax.objective.modules import DFlashTrainerModule
    from domino_jax.objective.objectives import register_objective
    from domino_jax.target.decoder import Target, lm_head_weight
    from domino_jax.target.load import load_target
    from domino_jax.training.metrics import metric_means, metric_sums

__version__ = "0.1.0"

# Written out: type checkers read it, and take nothing else of a typed package for public.
__all__ = [
    "DFlashStepMetrics",
    "DFlashTrainerModule",
    "Decoder",
    "DominoHeadConfig",
    "DominoStepMetrics",
    "DominoTrainerModule",
    "DraftConfig",
    "DraftModel",
    "InputError",
    "Target",
    "Weights",
    "__version__",
    "build_trainer",
    "compute_accept_len",
    "evaluate",
    "generate",
    "get_lambda_base",
    "hf_tensors",
    "init_draft",
    "lambda_base_schedule",
    "lm_head_weight",
    "load_hf_draft",
    "load_target",
    "make_decoder",
    "metric_means",
    "metric_sums",
    "register_objective",
    "save_hf_draft",
]

# Where each name is, as in the imports above, which only type checkers read.
_MODULES = {
    "DFlashStepMetrics": "objective.metrics",
    "DFlashTrainerModule": "objective.modules",
    "Decoder": "decoding.decoder",
    "DominoHeadConfig": "config.heads",
    "DominoStepMetrics": "objective.metrics",
    "DominoTrainerModule": "objective.domino_module",
    "DraftConfig": "config.model",
    "DraftModel": "draft.backbone",
    "InputError": "base.errors",
    "Target": "target.decoder",
    "Weights": "decoding.decoder",
    "build_trainer": "objective.domino_module",
    "compute_accept_len": "objective.loss",
    "evaluate": "evaluation.evaluate",
    "generate": "decoding.generate",
    "get_lambda_base": "objective.curriculum",
    "hf_tensors": "interop.hf",
    "init_draft": "draft.build",
    "lambda_base_schedule": "objective.curriculum",
    "lm_head_weight": "target.decoder",
    "load_hf_draft": "interop.hf",
    "load_target": "target.load",
    "make_decoder": "decoding.decoder",
    "metric_means": "training.metrics",
    "metric_sums": "training.metrics",
    "register_objective": "objective.objectives",
    "save_hf_draft": "interop.hf",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"domino_jax.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
