"""The runs behind docs/experiments: Domino and DFlash by size of data and seed, and the trials.

    configs/answers/train-SIZE.jsonl.gz -> states of the target, once for all runs of a size
        -> domino, dflash, no-curriculum: the same rows, epochs, seeds and evaluator
            -> evaluation of each on all sets -> configs/experiments/records/SIZE-VARIANT-SEED/
    all records -> docs/experiments/summary.json

Unshifted DFlash is what other trainers call DFlash: position k of a block predicts token k, so a
block of K proposes K - 1. Domino's head on and off is measured on the same weights. `--trials` are
single changes of the Domino run at the middle size, each recorded whether it helped or not.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domino_jax.base.files import read_own_json, write_json, write_whole
from domino_jax.evaluation.record import EVALUATION, REMEDY

CONFIG = Path("configs/experiments/smollm2.yaml")
ANSWERS = Path("configs/answers")
WORK = Path("runs/experiment")
RESULTS = Path("configs/experiments/records")
SUMMARY = Path("docs/experiments/summary.json")
SETS = (
    ANSWERS / "heldout-own.jsonl.gz",
    Path("configs/prompts/everyday.jsonl"),
    Path("configs/prompts/humaneval.jsonl"),
    Path("configs/prompts/heldout.jsonl"),
)
# Those of a trial: long prompts cost as much as the training that they would judge.
TRIAL_SETS = tuple(path for path in SETS if path.stem != "humaneval")
NEW_TOKENS = 64
# Seeds of each size: how far runs differ that differ in their seed alone, where that is cheap.
SEEDS = {"30k": (0, 1, 2), "100k": (0,), "300k": (0,)}
# Decoded, compared with the target token by token, and timed; replay counts the others the same.
DECODED = "300k-domino-0"
TIMED = 8
VARIANTS: dict[str, tuple[str, ...]] = {
    "domino": (),
    "dflash": ("draft.projector_type=null",),
    "no-curriculum": ("loss.lambda_start=0",),
}
TRIAL_SIZE = "100k"
# Where the trials started; the experiment's configuration is what they led to.
TRIAL_BASE = ("draft.num_hidden_layers=2", "data.batch_size=2", "loss.kl_weight=0")
TRIALS: dict[str, tuple[str, ...]] = {
    "base": (),
    "rate-1e-3": ("optimizer.learning_rate=1.0e-3",),
    "rate-4e-3": ("optimizer.learning_rate=4.0e-3",),
    "batch-1": ("data.batch_size=1",),
    "layers-1": ("draft.num_hidden_layers=1",),
    "layers-4": ("draft.num_hidden_layers=4",),
    "layers-6": ("draft.num_hidden_layers=6",),
    "random-layers": ("draft.init_layers_from_target=false",),
    "block-8": ("draft.block_size=8",),
    "anchors-128": ("loss.num_anchors=128",),
    "gamma-none": ("loss.loss_decay_gamma=null",),
    "kl": ("loss.kl_weight=0.5",),
    "kl-0.9": ("loss.kl_weight=0.9",),
    "average": ("optimizer.ema_decay=0.99",),
    "head-first": ("draft.pure_draft_prefix_len=0",),
    "head-wide": ("draft.emb_dim=256", "draft.gru_hidden_dim=512"),
}


@dataclass(frozen=True)
class Training:
    """One run: its name, the size of its data, what it changes of the configuration, its sets."""

    name: str
    size: str
    overrides: tuple[str, ...]
    sets: tuple[Path, ...] = SETS

    @property
    def directory(self) -> Path:
        """Its run directory."""
        return WORK / self.name


def trainings() -> Iterator[Training]:
    """The experiment, the cheapest runs first."""
    for size, seeds in SEEDS.items():
        for seed in seeds:
            for variant, overrides in VARIANTS.items():
                yield Training(f"{size}-{variant}-{seed}", size, (*overrides, f"seed={seed}"))


def trials() -> Iterator[Training]:
    """Single changes of the middle Domino run."""
    for name, overrides in TRIALS.items():
        yield Training(f"trial-{name}", TRIAL_SIZE, (*TRIAL_BASE, *overrides), TRIAL_SETS)


def domino(*words: str | Path) -> None:
    """Runs a verb; its progress is seen."""
    print("== domino", *words, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "domino_jax", *map(str, words)], check=True)


def run(training: Training) -> None:
    """Trains, evaluates and records one run; what is there already is not done again."""
    result = RESULTS / training.name
    if (result / EVALUATION).exists():
        return
    domino("train", CONFIG, *rows(training), f"run_dir={training.directory}", *training.overrides)
    decoded = training.name == DECODED
    how = ("--timed", str(TIMED)) if decoded else ("--timed", "0", "--replay")
    words = ("--max-new-tokens", str(NEW_TOKENS), *how)
    domino("evaluate", training.directory, *training.sets, *words)
    result.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "metrics.jsonl", "timing.jsonl"):
        shutil.copy(training.directory / name, result)
    write_json(result / EVALUATION, record(training))


def rows(training: Training) -> tuple[str, ...]:
    """Where a run takes its rows: states that all runs of a size share."""
    states = WORK / f"states-{training.size}"
    answers = f"data.train={ANSWERS / f'train-{training.size}.jsonl.gz'}"
    domino("capture", CONFIG, states, answers, "--with-target-states")  # a divergence reads them
    return ("data.train=null", f"data.hidden_states={states}")


def record(training: Training) -> dict[str, Any]:
    """What the repository keeps of a run: its evaluation without texts, and what it was."""
    evaluation = read_own_json(training.directory / EVALUATION, remedy=REMEDY)
    for figures in evaluation["sets"].values():
        figures.pop("examples", None)
    answers = json.loads((ANSWERS / "record.json").read_text())["files"]
    data = answers[f"train-{training.size}.jsonl.gz"]
    known = {name: data[name] for name in ("lines", "answer_tokens", "unpacked_sha256")}
    run = {"name": training.name, "size": training.size, "overrides": training.overrides}
    return {"run": run, "data": known, **evaluation}


def summary() -> dict[str, Any]:
    """Tau with its interval of each record, by set and decoding mode."""
    runs = {}
    for path in sorted(RESULTS.glob(f"*/{EVALUATION}")):
        stored = json.loads(path.read_text())
        taus = {
            name: {
                mode: {"tau": round(figures["tau"], 4), "interval": figures["interval"]}
                for mode, figures in measured["ways"].items()
            }
            for name, measured in stored["sets"].items()
        }
        training = {name: stored["training"][name] for name in ("steps", "first_loss", "last_loss")}
        runs[path.parent.name] = {**stored["run"], **training, "sets": taus}
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", action="store_true", help="the trials instead")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="runs whose names hold one of these"
    )
    options = parser.parse_args()
    chosen = [
        one
        for one in (trials() if options.trials else trainings())
        if options.only is None or any(word in one.name for word in options.only)
    ]
    print(f"{len(chosen)} runs: {', '.join(one.name for one in chosen)}", file=sys.stderr)
    for number, training in enumerate(chosen, start=1):
        print(f"== {number}/{len(chosen)} {training.name}", file=sys.stderr)
        run(training)
    write_whole(SUMMARY, json.dumps(summary(), indent=1) + "\n")


if __name__ == "__main__":
    main()
