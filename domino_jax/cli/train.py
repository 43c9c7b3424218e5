"""Training runs long and may be stopped at any time, so each verb says first what a stop keeps.

The verbs are `train` and `capture`, which stores what a training reads of its target.
"""

import functools
from dataclasses import replace
from pathlib import Path

import click

from domino_jax.base.errors import InputError
from domino_jax.base.lock import lock_inside
from domino_jax.base.output_paths import check_output_directory
from domino_jax.cli import options
from domino_jax.cli.interrupts import keeps, stop_requested
from domino_jax.cli.shared import echo, own, reporter, results
from domino_jax.config.run import load_config
from domino_jax.target.fingerprint import target_fingerprint


@click.command()
@click.argument("config", type=options.PATH)
@options.overrides
@click.option(
    "--dry-run", is_flag=True, help="Check the run, print what it would be, and create nothing."
)
def train(config: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Train the drafter that the YAML file CONFIG describes; KEY=VALUE words override it.

    \b
    domino train configs/smollm2-demo.yaml optimizer.learning_rate=1e-3 run_dir=runs/second

    The run directory receives config.yaml, metrics.jsonl and checkpoints/. The same command resumes
    after a stop, with the same bits as if there had been none.
    """
    settings = load_config(config, overrides)
    if dry_run:
        keeps("nothing was written", at_once=True)
        from domino_jax.training.prepare import check, read_inputs
        from domino_jax.training.preview import print_preview

        # It changes nothing: a damaged checkpoint is told and stays where it is.
        checked = check(settings, reporter=reporter, set_aside=False)
        # Asked for only where captured states are read: it takes a pass over the target's files.
        fingerprint = functools.partial(target_fingerprint, checked.target)
        inputs = read_inputs(checked, target_sha256=fingerprint, reporter=reporter)
        print_preview(inputs, results())
        return
    check_output_directory("run_dir", settings.run_dir)
    own(lock_inside, settings.run_dir)
    # At once: up to the first step nothing is written that a signal could cut in two.
    keeps(
        f"the checkpoints in {settings.run_dir} stay as they are; the same command resumes",
        at_once=True,
    )
    from domino_jax.training.loop import train as train_run
    from domino_jax.training.prepare import prepare

    # Without a safe point: training ends by itself, once its step is saved.
    unstoppable = replace(reporter, safe_point=lambda: None)
    run = prepare(settings, reporter=unstoppable)
    directory = train_run(run, reporter=unstoppable, stop_requested=stop_requested)
    echo(directory)


@click.command()
@click.argument("config", type=options.PATH)
@click.argument("directory", type=options.PATH)
@options.overrides
@click.option("--dtype", type=options.DTYPE, default="bfloat16", help="Type of the stored states.")
@click.option(
    "--with-target-states",
    is_flag=True,
    help="Also store the target's states after its final norm.",
)
@click.option(
    "--limit-gb",
    type=options.FiniteRange(0, min_open=True),
    default=50.0,
    help="Refuse to write more than this many gigabytes without --yes.",
)
@click.option("--yes", is_flag=True, help="Write above the limit.")
def capture(
    config: Path,
    directory: Path,
    overrides: tuple[str, ...],
    dtype: str,
    with_target_states: bool,
    limit_gb: float,
    yes: bool,
) -> None:
    """Store the target's states of the training rows of CONFIG in DIRECTORY.

    Training then reads them and does not run the target.

    \b
    domino capture configs/smollm2-demo.yaml states
    domino train configs/smollm2-demo.yaml data.train=null data.hidden_states=states

    Worth it where several runs share rows and layers. The size is printed first: each token takes
    as many values as the captured layers are wide together. The same command resumes after a stop.
    """
    # Where DIRECTORY was forgotten, the first override stands in its place.
    if "=" in directory.name:
        raise InputError(
            f"DIRECTORY is {str(directory)!r}, which looks like an override; "
            "expected: domino capture CONFIG DIRECTORY [KEY=VALUE]..."
        )
    settings = load_config(config, overrides)
    check_output_directory("DIRECTORY", directory)
    own(lock_inside, directory)
    # Before `keeps`: until then a signal ends the process at once.
    from domino_jax.datagen.capture import capture as capture_states
    from domino_jax.training.prepare import capture_inputs

    keeps(f"shards that were written to {directory} stay; the same command resumes")
    capture_states(
        functools.partial(capture_inputs, settings, reporter=reporter),
        directory,
        dtype=dtype,
        target_states=with_target_states,
        limit_gb=limit_gb,
        confirmed=yes,
        reporter=reporter,
    )
    echo(directory)
