"""The verb `plan`: an accelerator is paid for by the hour, whether or not the step fits into it.

So the step is compiled for machines that are not here, and what its program takes is printed.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from domino_jax.base.errors import InputError
from domino_jax.base.files import write_whole
from domino_jax.base.user_cache import user_cache
from domino_jax.cli import options
from domino_jax.cli.interrupts import keeps
from domino_jax.cli.shared import echo, reporter, results
from domino_jax.config.run import RunConfig, load_config
from domino_jax.plan.topology import Compiler, compiler_for, parse_device_spec

if TYPE_CHECKING:
    from domino_jax.plan.plan import Plan
    from domino_jax.training.prepare import Models


@click.command("plan")
@click.argument("config", type=options.PATH)
@options.overrides
@click.option(
    "--on",
    "specs",
    multiple=True,
    required=True,
    metavar="PLACE",
    help="Where it would run: v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB or h100:N. May be repeated.",
)
@click.option("--largest-batch", is_flag=True, help="Search the largest data.batch_size that fits.")
@click.option("--json", "file", type=options.PATH, help="Also write the plans there.")
@click.pass_context
def plan_verb(
    ctx: click.Context,
    config: Path,
    overrides: tuple[str, ...],
    specs: tuple[str, ...],
    largest_batch: bool,
    file: Path | None,
) -> None:
    """Compile the step that `train` runs with CONFIG for machines that are not here.

    \b
    domino plan configs/qwen3-8b.yaml --on h100:1
    domino plan configs/qwen3-8b.yaml --on v5p:2x2x2 --on v6e:2x4 mesh.fsdp=8 data.batch_size=16

    Tells its memory, collectives, launches and FLOPs, and the bounds that the chip's published
    peaks put on them; no step time. Only the target's config.json is read. Exit code 1 where it
    does not fit.
    """
    settings = load_config(config, overrides)
    asked = [parse_device_spec(spec) for spec in specs]
    # Before minutes of compiling, not after them.
    if file is not None and not file.parent.is_dir():
        raise InputError(f"--json {file}: no directory {file.parent}; make it first")
    # Before `keeps`: until then a signal ends the process at once.
    import jax

    from domino_jax.plan.table import plan_table
    from domino_jax.training.prepare import read_models

    keeps("plans that were finished are kept; the same command resumes")
    # Before jax looks for devices: this machine's own are none of a plan's business.
    jax.config.update("jax_platforms", "cpu")
    compilers = [compiler_for(spec) for spec in asked]
    models = read_models(settings, reporter=reporter)
    plans = [_planned(settings, models, one, largest=largest_batch) for one in compilers]
    results().print(plan_table(plans))
    for one in plans:
        if one.refusal is not None:
            echo(f"{one.spec}: the compiler refused: {one.refusal}")
        if largest_batch:
            found = one.batch_size if one.fits else "none"
            echo(f"{one.spec}: largest data.batch_size that fits: {found}")
    if file is not None:
        tree = [dataclasses.asdict(one) for one in plans]
        write_whole(file, json.dumps(tree, indent=2) + "\n")
        echo(file)
    # After what was found is printed and written: not fitting is a result.
    if not all(one.fits for one in plans):
        ctx.exit(1)


def _planned(config: RunConfig, models: Models, compiler: Compiler, *, largest: bool) -> Plan:
    """The plan of the batch as it stands, or of the largest that fits, else of the smallest."""
    from domino_jax.plan.plan import largest_batch, plan
    from domino_jax.training.prepare import abstract_step

    cache = user_cache("plans", needs="domino plan")

    def with_batch(batch_size: int) -> Plan:
        data = dataclasses.replace(config.data, batch_size=batch_size)
        step = abstract_step(dataclasses.replace(config, data=data), models, compiler.devices)
        one = plan(step, compiler, cache=cache, reporter=reporter)
        if largest:
            fits = "fits" if one.fits else "does not fit"
            reporter.say(f"{one.spec}: batch {one.batch_size} {fits}")
        return one

    count, first = len(compiler.devices), config.data.batch_size
    # Where tensor does not divide the devices, the plan itself raises, and says what is wrong.
    if not largest or count % config.mesh.tensor:
        return with_batch(first)
    # A batch is a multiple of the devices that it is split over.
    return largest_batch(first, with_batch, multiple_of=count // config.mesh.tensor)
