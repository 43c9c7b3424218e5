"""NeMo AutoModel's own training loop on the rows, target and start of one of our runs.

`TrainDominoRecipe` and `TrainDFlashRecipe` load models and data in `setup`; here those are given,
and everything after it is NeMo's: anchors, losses, curriculum, accumulation, clipping, AdamW.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from nemo_automodel.recipes.llm._spec_train_utils import make_warmup_cosine_schedule
from nemo_automodel.recipes.llm.train_dflash import TrainDFlashRecipe
from nemo_automodel.recipes.llm.train_domino import TrainDominoRecipe
from reference import Batch, nemo_trainer
from tiny import quiet, run_config
from whole_run import train

from domino_jax.config.run import RunConfig, load_config
from domino_jax.interop.hf import hf_tensors
from domino_jax.target.decoder import Target, lm_head_weight
from domino_jax.training.checkpoint import load_draft
from domino_jax.training.log import read_metrics
from domino_jax.training.prepare import prepare
from domino_jax.training.run import Run

# As many slots as positions: both programs then train every candidate, and no anchor is drawn.
EVERY_ANCHOR = 24


class NemoLoop(NamedTuple):
    """What NeMo's loop did.

    Attributes:
        losses: of each micro-batch that has an anchor.
        lambdas: weight of its base loss; 0 for plain DFlash.
        rates: learning rate of the update that it is part of.
        logged_rates: learning rate in the log line of each update.
        parameters: the draft after each update, by the names of its checkpoint.
    """

    losses: list[float]
    lambdas: list[float]
    rates: list[float]
    logged_rates: list[float]
    parameters: list[dict[str, np.ndarray]]


def twin(tmp_path: Path, target: Path, name: str, **sections: Any) -> RunConfig:
    """The configuration of a float32 run of thirty updates that NeMo's loop can follow."""
    directory = tmp_path / name
    directory.mkdir()
    sections["data"] = {"eval": None} | sections.get("data", {})
    sections["loss"] = {"num_anchors": EVERY_ANCHOR} | sections.get("loss", {})
    steps = {"steps": 30, "log_every": 1, "checkpoint_every": 1, "keep_checkpoints": 30}
    sections["train"] = steps | sections.get("train", {})
    return load_config(run_config(directory, target, **sections))


def training_lines(config: RunConfig) -> list[dict[str, Any]]:
    """Trains a run; returns the lines that `metrics.jsonl` has of its steps."""
    directory = train(config, reporter=quiet())
    return [line for line in read_metrics(directory) if line["split"] == "train"]


def draft_tensors(config: RunConfig, step: int) -> dict[str, np.ndarray]:
    """The draft of a checkpoint of a run, by the names of its export."""
    draft = load_draft(config.run_dir, reporter=quiet(), step=step)
    return hf_tensors(draft.record.config, draft.params)


def nemo_loop(config: RunConfig) -> NemoLoop:
    """Runs NeMo's loop on the rows of a run that has not started, from the draft it starts with."""
    run = prepare(config, reporter=quiet())
    params = jax.device_get(run.state.params)
    lm_head, embed_tokens = lm_head_weight(run.target_params), run.target_params["embed_tokens"]
    nothing = np.zeros(0)
    trainer = nemo_trainer(
        run.inputs.record.config,
        params,
        Batch(nothing, nothing, nothing, np.asarray(lm_head), np.asarray(embed_tokens), {}),
        num_anchors=run.inputs.program.trainer.num_anchors,
        loss_decay_gamma=run.inputs.program.trainer.loss_decay_gamma,
    )
    recipe = _recipe(run, config, trainer)
    recipe.run_train_validation_loop()
    return recipe.found


def _recipe(run: Run, config: RunConfig, trainer: Any) -> Any:
    """NeMo's recipe as its `setup` leaves it, with our rows and target."""
    recipe_type = TrainDFlashRecipe if run.inputs.record.config.head is None else TrainDominoRecipe
    recipe = _noting(recipe_type)
    recipe.device = torch.device("cpu")
    recipe.dist_env = SimpleNamespace(is_main=False)
    recipe.runtime = SimpleNamespace(global_step=0)
    recipe.trainer_module = trainer
    recipe.target_wrapper = SimpleNamespace(generate_batch=functools.partial(_target_batch, run))
    recipe.train_dataloader = list(_micro_batches(run))
    recipe.val_dataloader = None
    recipe.num_epochs, recipe.log_every_steps = 1, 1
    recipe.grad_accumulation_steps = run.inputs.shape.grad_accumulation
    recipe.total_optim_steps = run.inputs.last_step
    recipe._skipped_micro_batches = 0
    recipe.lambda_base_start = config.loss.lambda_start
    recipe.lambda_base_decay_ratio = config.loss.decay_ratio
    settings = config.optimizer
    recipe.max_grad_norm = settings.max_grad_norm
    recipe.optimizer = torch.optim.AdamW(
        trainer.parameters(),
        lr=settings.learning_rate,
        betas=(settings.b1, settings.b2),
        weight_decay=settings.weight_decay,
    )
    warmup = max(1, int(settings.warmup_ratio * run.inputs.last_step))
    schedule = make_warmup_cosine_schedule(warmup, run.inputs.last_step, settings.min_lr_ratio)
    recipe.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(recipe.optimizer, schedule)
    return recipe


def _noting(recipe_type: type[Any]) -> Any:
    """A recipe that notes what its loop does and saves nothing."""

    class Noting(recipe_type):
        def __init__(self) -> None:
            self.found = NemoLoop([], [], [], [], [])

        def _run_trainer_step(self, target_batch: Any) -> Any:
            metrics = super()._run_trainer_step(target_batch)
            self.found.losses.append(float(metrics.loss.detach()))
            self.found.lambdas.append(float(getattr(metrics, "lambda_base", 0.0)))
            self.found.rates.append(self.optimizer.param_groups[0]["lr"])
            return metrics

        def _maybe_save_step_checkpoint(self, epoch: int) -> bool:
            # Behind each update.
            self.found.logged_rates.append(self.lr_scheduler.get_last_lr()[0])
            parameters = self.trainer_module.draft_model.named_parameters()
            self.found.parameters.append(
                {name: x.detach().numpy().copy() for name, x in parameters}
            )
            return False

        def _maybe_save_final_checkpoint(self, completed_epochs: int) -> bool:
            return False

        def _finalize_and_close_checkpointer(self) -> None:
            """Nothing was opened."""

        def _make_progress_bar(self, total: int | None = None, initial: int = 0) -> None:
            """None, as on all ranks but the first."""

    return Noting()


def _micro_batches(run: Run) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of each step of the run, in the micro-batches that it would split them into."""
    batches = run.inputs.batches()
    for _ in range(run.inputs.last_step):
        rows = next(batches)
        parts = [
            np.split(rows[name], run.inputs.shape.grad_accumulation)
            for name in ("input_ids", "loss_mask")
        ]
        for input_ids, loss_mask in zip(*parts, strict=True):
            ids = torch.tensor(input_ids, dtype=torch.int64)
            mask = torch.tensor(loss_mask, dtype=torch.float32)
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "loss_mask": mask}


def _target_batch(run: Run, **rows: torch.Tensor) -> SimpleNamespace:
    """Rows with the states of our target, as NeMo's wrapper of a target returns them."""
    ids = jnp.asarray(rows["input_ids"].numpy(), jnp.int32)
    target = _target_program(run.inputs.program.target)({"params": run.target_params}, ids)
    states = torch.tensor(np.asarray(target.features))
    unpacked = dict.fromkeys(("position_ids", "seq_lens", "doc_remaining"))
    return SimpleNamespace(hidden_states=states, **rows | unpacked)


@functools.cache
def _target_program(target: Target) -> Any:
    return jax.jit(target.apply)
