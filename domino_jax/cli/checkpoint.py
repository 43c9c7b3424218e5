"""Verbs that exchange checkpoints: `export`, `import`."""

from pathlib import Path

import click

from domino_jax.cli.shared import check_fit, say
from domino_jax.interop.hf import load_hf_draft, save_hf_draft
from domino_jax.strict import InputError
from domino_jax.target.gguf import resolve_target
from domino_jax.target.load import load_tokenizer, read_decoder_config
from domino_jax.target.model import Target
from domino_jax.training.checkpoint import DraftRecord, load_draft, save_draft, template_hash


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Type of the stored tensors.",
)
def export(run: Path, directory: Path, dtype: str) -> None:
    """Write the drafter of RUN to DIRECTORY as config.json and safetensors, the form that serving engines read."""
    record, params, step = load_draft(run)
    save_hf_draft(directory, record.config, params, dtype=dtype)
    say(f"step {step} of {run} exported and read back, {dtype}")
    click.echo(directory)


@click.command(name="import")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--target", "target_name", default="smollm2-135m-instruct", show_default=True, help="Target the draft belongs to."
)
def import_(directory: Path, run: Path, target_name: str) -> None:
    """Make the run directory RUN from the draft checkpoint in DIRECTORY, for generate, evaluate and export."""
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise InputError(f"{run}: already there and not an empty directory; give a new one")
    config, params = load_hf_draft(directory)
    path = resolve_target(target_name, progress=say)
    tokenizer = load_tokenizer(path)
    check_fit(config, Target(read_decoder_config(path, dtype="float32")), tokenizer)
    save_draft(run, params, DraftRecord(config, target_name, template_hash(tokenizer)))
    click.echo(run)
