"""The verb that trains: `train`."""

from pathlib import Path

import click

from domino_jax.cli.shared import logs
from domino_jax.config import load_config
from domino_jax.training.loop import train as train_run


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(config: Path, overrides: tuple[str, ...]) -> None:
    """Train the drafter that the YAML file CONFIG describes; KEY=VALUE words override it.

    \b
    domino train configs/smollm2-demo.yaml optimizer.learning_rate=1e-3 run_dir=runs/second

    The run directory receives config.yaml, metrics.jsonl and checkpoints/. The same command goes on after a stop,
    with the same bits as if there had been none.
    """
    click.echo(train_run(load_config(config, overrides), console=logs))
