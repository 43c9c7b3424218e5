"""Trains, checks and exports Domino and DFlash speculative-decoding drafters in JAX.

What a script needs has one public name here, wherever its module stands. Each is imported when it
is asked for, not before: `domino` imports this package and must answer Ctrl-C before jax is there.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from domino_jax.interop.hf import hf_tensors, load_hf_draft, save_hf_draft
    from domino_jax.training.curriculum import get_lambda_base, lambda_base_schedule
    from domino_jax.training.domino_module import DominoTrainerModule, build_trainer
    from domino_jax.training.loss import compute_accept_len
    from domino_jax.training.modules import DFlashTrainerModule
    from domino_jax.training.objectives import register_objective
    from domino_jax.training.step_metrics import DFlashStepMetrics, DominoStepMetrics

__version__ = "0.1.0"

__all__ = [
    "DFlashStepMetrics",
    "DFlashTrainerModule",
    "DominoStepMetrics",
    "DominoTrainerModule",
    "__version__",
    "build_trainer",
    "compute_accept_len",
    "get_lambda_base",
    "hf_tensors",
    "lambda_base_schedule",
    "load_hf_draft",
    "register_objective",
    "save_hf_draft",
]

# The modules of the imports above, which only type checkers read.
_MODULES = (
    "interop.hf",
    "training.curriculum",
    "training.domino_module",
    "training.loss",
    "training.modules",
    "training.objectives",
    "training.step_metrics",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = importlib.import_module(f"domino_jax.{module}")
            if hasattr(found, name):
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
