"""The public names of `domino_jax`, each once: the module that defines it.

`__init__.py` reads this file at run time, type checkers read it too. `as` makes a name public.
"""

from .base.errors import InputError as InputError
from .config.heads import DominoHeadConfig as DominoHeadConfig
from .config.model import DraftConfig as DraftConfig
from .decoding.decoder import Decoder as Decoder
from .decoding.decoder import Weights as Weights
from .decoding.decoder import make_decoder as make_decoder
from .decoding.generate import generate as generate
from .draft.backbone import DraftModel as DraftModel
from .draft.build import init_draft as init_draft
from .evaluation.evaluate import evaluate as evaluate
from .interop.hf import hf_tensors as hf_tensors
from .interop.hf import load_hf_draft as load_hf_draft
from .interop.hf import save_hf_draft as save_hf_draft
from .objective.curriculum import get_lambda_base as get_lambda_base
from .objective.curriculum import lambda_base_schedule as lambda_base_schedule
from .objective.loss import compute_accept_len as compute_accept_len
from .objective.metrics import DFlashStepMetrics as DFlashStepMetrics
from .objective.metrics import DominoStepMetrics as DominoStepMetrics
from .objective.modules import DFlashTrainerModule as DFlashTrainerModule
from .objective.modules import DominoTrainerModule as DominoTrainerModule
from .objective.modules import build_trainer as build_trainer
from .objective.objectives import register_objective as register_objective
from .target.decoder import Target as Target
from .target.decoder import lm_head_weight as lm_head_weight
from .target.load import load_target as load_target
from .training.metrics import metric_means as metric_means
from .training.metrics import metric_sums as metric_sums

__version__: str
