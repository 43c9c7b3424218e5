"""The verb `evaluate`: a drafter measured on sets of prompts, with its target.

`measurement.py` measures; the record stays with the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from domino_jax.base.errors import InputError, Scalars
from domino_jax.base.lock import lock_beside
from domino_jax.cli import options
from domino_jax.cli.interrupts import keeps
from domino_jax.cli.shared import echo, own, reporter, results
from domino_jax.evaluation.record import (
    EVALUATION,
    Evaluator,
    read_earlier,
    set_names,
    write_evaluation,
)

if TYPE_CHECKING:
    from domino_jax.evaluation.servers import Server


@click.command()
@click.argument("run", type=options.PATH)
@click.argument("prompt_files", nargs=-1, required=True, type=options.PATH, metavar="PROMPTS...")
@click.option("--limit", type=click.IntRange(1), help="Only the first prompts of each file.")
@click.option(
    "--batch-size",
    type=options.BATCH_SIZE,
    default=32,
    help="Prompts decoded together; what is timed is decoded one by one.",
)
@click.option(
    "--timed",
    type=click.IntRange(0),
    default=4,
    help="Prompts of each file that are timed; 0: no time is measured.",
)
@click.option(
    "--replay",
    is_flag=True,
    help="Run the drafts alone on the target's own answers: the same tau, ties aside, in a "
    "fraction of the time; of the outputs only those that are timed are compared.",
)
@click.option(
    "--append", is_flag=True, help="Keep what evaluation.json holds already of other sets."
)
@options.endpoint
@options.max_new_tokens
@options.temperature
@options.seed
@options.run_dtype
@options.chat_template_kwargs
@options.step
def evaluate(
    run: Path,
    prompt_files: tuple[Path, ...],
    limit: int | None,
    batch_size: int,
    timed: int,
    replay: bool,
    append: bool,
    server: Server | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str | None,
    chat_template_kwargs: Scalars | None,
    step: int | None,
) -> None:
    """Measure the drafter of RUN on each JSONL file of PROMPTS and write RUN/evaluation.json.

    Every prompt is answered with K - 1 proposals, as serving engines do (the headline), with all
    that a block predicts, with the Domino head off, by prompt look-up (n-grams, the floor) and by
    the target alone: tokens per verification (tau) with 95 % intervals over prompts, acceptance by
    position, tokens per second, and whether the outputs are the same token by token. A file of
    answered conversations is asked again without its last answers.
    """
    if replay and temperature > 0:
        raise InputError("--replay follows greedy answers; leave --temperature out")
    evaluation = run / EVALUATION
    names = set_names(prompt_files, evaluation)
    if run.is_dir():  # otherwise `load_run` refuses it
        own(lock_beside, evaluation)
    # Before `keeps`: until then a signal ends the process at once.
    from domino_jax.cli.loading import load_run
    from domino_jax.cli.measurement import Measurement
    from domino_jax.page.terminal import evaluation_table, training_summary

    keeps(f"{evaluation} was not written; the same command starts over")
    loaded, drafter = load_run(
        run, dtype, chat_template_kwargs, step=step, max_new_tokens=max_new_tokens
    )
    record = drafter.record
    evaluator = Evaluator(
        target=record.target,
        target_sha256=record.target_sha256,
        chat_template=record.chat_template,
        step=drafter.step,
        block_size=record.config.block_size,
        head=record.config.projector_type,
        temperature=temperature,
        seed=seed,
        max_new_tokens=max_new_tokens,
        dtype=record.config.dtype,
    )
    earlier = read_earlier(evaluation, evaluator) if append else {"sets": {}, "cycle": None}
    training = training_summary(run)  # before the hours that a damaged log would cost
    if "notice" in training:
        reporter.say(f"{run}/{training['notice']}")
    sets = earlier["sets"]
    measurement = Measurement(loaded, drafter, evaluator, batch_size, timed, replay)
    for name, path in zip(names, prompt_files, strict=True):
        sets[name] = measurement.of_set(name, path, limit, server)
    # What was timed of the same draft stands until it is timed again.
    cycle = measurement.cycle() if timed and temperature == 0 else earlier["cycle"]
    reporter.say(f"saving {evaluation}")
    # Before the table, which a closed pipe may refuse.
    written = write_evaluation(evaluation, evaluator, training=training, cycle=cycle, sets=sets)
    keeps(f"{evaluation} is written")
    results().print(evaluation_table(written))
    for name in names:
        for mode, figures in sets[name]["ways"].items():
            for difference in figures.get("differences", ()):
                echo(f"{name}, {mode}: first difference {difference}")
    echo(evaluation)
